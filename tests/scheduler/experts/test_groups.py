"""MoeBatchScheduler against the pinned vectors of ruvllm (ADR-092) and a naive grouping."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.scheduler.experts.groups import ExpertGroups, MoeBatchScheduler

from ... import oracles

GOLDEN = Path(__file__).parents[2] / "data" / "moe-golden.jsonl"
SCHEDULES = [case for case in map(json.loads, GOLDEN.read_text().splitlines()) if case["kind"] == "schedule"]


def as_dict(groups: ExpertGroups) -> dict[int, list[tuple[int, int]]]:
    """Return {expert: [(token, rank), ...]} in the order of `experts`."""
    return {
        e: list(
            zip(
                groups.tokens[groups.ends[e] : groups.ends[e + 1]].tolist(),
                groups.ranks[groups.ends[e] : groups.ends[e + 1]].tolist(),
                strict=True,
            )
        )
        for e in groups.experts.tolist()
    }


def test_c8_three_tokens_of_two_experts_each() -> None:
    selected = np.array([[2, 5], [5, 3], [2, 7]], np.int32)
    weights = np.array([[0.6, 0.4], [0.7, 0.3], [0.7, 0.3]], np.float32)
    found = as_dict(MoeBatchScheduler(8, 2, 4).schedule(selected, 3))
    assert found == {2: [(0, 0), (2, 0)], 3: [(1, 1)], 5: [(0, 1), (1, 0)], 7: [(2, 1)]}
    assert list(found) == [2, 3, 5, 7]
    carried = {e: [float(weights[pair]) for pair in pairs] for e, pairs in found.items()}
    assert carried == {
        e: pytest.approx(w) for e, w in {2: [0.6, 0.7], 3: [0.3], 5: [0.4, 0.7], 7: [0.3]}.items()
    }


def test_c9_one_token() -> None:
    found = as_dict(MoeBatchScheduler(8, 2, 1).schedule(np.array([[4, 1]], np.int32), 1))
    assert found == {1: [(0, 1)], 4: [(0, 0)]}
    assert list(found) == [1, 4]


@pytest.mark.parametrize("case", SCHEDULES, ids=[f"case {case['case']}" for case in SCHEDULES])
def test_golden_schedules(case: dict[str, list]) -> None:  # type: ignore[type-arg]
    """The vectors' tokens select different numbers of experts: one row here is one of their pairs."""
    pairs = [(token, expert, weight) for token, chosen in case["decisions"] for expert, weight in chosen]
    selected = np.array([[expert] for _, expert, _ in pairs], np.int32)
    groups = MoeBatchScheduler(max(p[1] for p in pairs) + 1, 1, len(pairs)).schedule(selected, len(pairs))
    found = [
        [e, [pairs[row][0] for row, _ in rows], [pairs[row][2] for row, _ in rows]]
        for e, rows in as_dict(groups).items()
    ]
    assert found == case["batches"]


def test_all_golden_schedules_are_there() -> None:
    assert len(SCHEDULES) == 5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1), experts=st.integers(1, 64), k=st.integers(1, 8), count=st.integers(1, 40)
)
def test_random_batches_agree_with_naive_grouping(seed: int, experts: int, k: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    scheduler = MoeBatchScheduler(experts, k, 40)
    for _ in range(2):  # buffers are used again
        selected = rng.integers(0, experts, (40, k)).astype(np.int32)
        groups = scheduler.schedule(selected, count)
        assert as_dict(groups) == oracles.group_by_expert(selected[:count].tolist())
        assert len(groups.tokens) == len(groups.ranks) == count * k == groups.ends[-1]


def test_nothing_in_gives_nothing_out() -> None:
    groups = MoeBatchScheduler(8, 2, 4).schedule(np.zeros((4, 2), np.int32), 0)
    assert as_dict(groups) == {}
    assert len(groups.tokens) == len(groups.experts) == 0
    assert not groups.ends.any()


def test_512_tokens_allocate_no_new_buffers() -> None:
    scheduler = MoeBatchScheduler(64, 4, 512)
    selected = np.random.default_rng(1).integers(0, 64, (512, 4)).astype(np.int32)
    first = scheduler.schedule(selected, 512)
    second = scheduler.schedule(selected[::-1].copy(), 100)
    assert np.shares_memory(first.tokens, second.tokens)
    assert np.shares_memory(first.ranks, second.ranks)
    assert np.shares_memory(first.ends, second.ends)
