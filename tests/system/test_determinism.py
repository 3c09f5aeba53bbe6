"""The same request gives the same bytes: with any workers, alone or in company, in one chunk or many."""

from __future__ import annotations

from sterna.runtime.client.results import Result

from .conftest import Serve
from .requests import Request, essence, run_alone, run_together

LONG = (
    "There was once a king who had three daughters, and the youngest of them was so fair that the sun itself"
)
NUM_TOKENS = 24

REQUESTS: list[Request] = [
    {"prompt": LONG, "temperature": 0.0, "logprobs": 5, "prompt_logprobs": True},
    {"prompt": "Once upon a time", "temperature": 0.9, "top_k": 40, "seed": 1, "logprobs": 3},
    {"prompt": "Once upon a time", "temperature": 0.9, "top_k": 0, "top_p": 0.9, "seed": 2, "logprobs": 0},
    {"prompt": LONG, "temperature": 0.9, "top_k": 0, "min_p": 0.05, "seed": 3, "prompt_logprobs": True},
    {"prompt": "The wolf", "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "seed": 4},
    {"prompt": "The queen", "temperature": 0.0, "logprobs": 20, "prompt_logprobs": True},
]
for request in REQUESTS:
    request |= {"max_tokens": NUM_TOKENS, "ignore_eos": True}


def essences(results: list[Result]) -> list[bytes]:
    return [essence(result) for result in results]


def test_answers_are_byte_identical(serve: Serve) -> None:
    """Five daemons: 1, 2, 3 workers, chunks of 7 tokens, and two starts of the same."""
    expected: list[bytes] = []
    steps: list[int] = []
    for arguments in (
        ["--workers", "2"],
        ["--workers", "1"],
        ["--workers", "3"],
        ["--workers", "2", "--max-batch-tokens", "7"],
        ["--workers", "2"],
    ):
        daemon = serve(*arguments)
        alone = run_alone(daemon.url, REQUESTS)
        steps.append(daemon.status()["totals"]["steps"])
        expected = expected or essences(alone)
        assert essences(alone) == expected, arguments
        assert essences(run_together(daemon.url, REQUESTS)) == expected, arguments
        daemon.stop()
    assert len(set(expected)) == len(REQUESTS)
    whole, one_worker, three_workers, chunked, again = steps
    assert whole == one_worker == three_workers == again == len(REQUESTS) * NUM_TOKENS
    assert chunked > whole + 4  # two long prompts, each of several chunks
