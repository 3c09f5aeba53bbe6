"""The embedded model through the whole system against llama.cpp's answers (tests/data/tales-golden.json)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from sterna.runtime.client.results import Result

from .daemon_process import Daemon

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "tales-golden.json").read_text())
CASES = GOLDEN["cases"]

NUM_COMPARED = 48
# Two tokens whose logits lie closer than this there may change places here.
NEAR_TIE = 0.05
MAX_MEAN_DIFFERENCE = 0.02


@pytest.fixture(scope="module")
def results(session_daemon: Daemon) -> list[Result]:
    with session_daemon.client() as client:
        return [
            client.generate(
                case["text"],
                max_tokens=len(case["greedy_ids"]),
                temperature=0.0,
                logprobs=0,
                prompt_logprobs=True,
                ignore_eos=True,
            )
            for case in CASES
        ]


def test_prompt_ids_are_the_same(results: list[Result]) -> None:
    for case, result in zip(CASES, results, strict=True):
        assert list(result.prompt_token_ids) == case["prompt_ids"], case["text"]


def test_greedy_tokens_are_the_same_up_to_a_near_tie(results: list[Result]) -> None:
    equal = 0
    for case, result in zip(CASES, results, strict=True):
        expected, found = case["greedy_ids"][:NUM_COMPARED], list(result.token_ids)[:NUM_COMPARED]
        first = next((i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b), None)
        equal += first is None
        assert first is None or case["gaps"][first] < NEAR_TIE, (
            f"{case['text']!r}: token {first} is {found[first]}, there {expected[first]} "
            f"by a gap of {case['gaps'][first]}"
        )
    print(f"\ngolden: {equal} of {len(CASES)} answers equal, the others from a near tie on")
    assert equal > len(CASES) // 2


def test_prompt_logprobs_are_close(results: list[Result]) -> None:
    differences = []
    for case, result in zip(CASES, results, strict=True):
        assert result.prompt_logprobs is not None
        assert result.prompt_logprobs[0] is None
        found = result.prompt_logprobs[1:]
        differences += [
            abs(a - b) for a, b in zip(found, case["prompt_logprobs"], strict=True) if a is not None
        ]
    assert len(differences) == sum(len(case["prompt_ids"]) - 1 for case in CASES)
    mean = statistics.mean(differences)
    print(f"\ngolden: mean difference of {len(differences)} prompt log-probabilities {mean:.4f}")
    assert mean < MAX_MEAN_DIFFERENCE


def test_logprobs_of_the_answer_are_close_while_it_is_the_same(results: list[Result]) -> None:
    differences = []
    for case, result in zip(CASES, results, strict=True):
        assert result.logprobs is not None
        for expected_id, expected, found in zip(
            case["greedy_ids"], case["greedy_logprobs"], result.logprobs, strict=True
        ):
            if found.token_id != expected_id:
                break
            differences.append(abs(found.logprob - expected))
    assert statistics.mean(differences) < 2 * MAX_MEAN_DIFFERENCE
