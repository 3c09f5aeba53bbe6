"""What an answer is: its end, its parts, its figures; and the other things a client can ask for."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sterna import AsyncClient
from sterna.shm.errors import BadRequest, NotFound

from . import gguf_copy as gc
from .conftest import Serve
from .daemon_process import Daemon, wait_until
from .requests import Request, essence, run_alone, run_together, sampled

NEWLINE = 199  # a token of the embedded model
GREEDY: Request = {"prompt": "Once upon a time", "temperature": 0.0}
LONG = "There was once a king who had three daughters, and the youngest was so fair that the sun wondered. "


def test_stop_string_over_several_tokens(shared: Daemon) -> None:
    """The answer ends before it, whatever the tokens; nothing of it is ever sent."""
    (whole,) = run_alone(shared.url, [GREEDY | {"max_tokens": 40}])
    for stop in (whole.text[20:29], whole.text[13:15], whole.text[30:31]):
        with shared.client() as client:
            stream = client.generate(stream=True, **GREEDY, max_tokens=40, stop=["never said", stop])
            parts = [chunk.text for chunk in stream]
            result = stream.read()
        assert result.text == whole.text[: whole.text.index(stop)] == "".join(parts)
        assert result.finish_reason == "stop"
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        assert result.usage.completion_tokens == len(result.token_ids) < 40


def test_beginning_of_a_stop_string_at_the_end_is_not_lost(shared: Daemon) -> None:
    (whole,) = run_alone(shared.url, [GREEDY | {"max_tokens": 20}])
    (found,) = run_alone(shared.url, [GREEDY | {"max_tokens": 20, "stop": [whole.text[-3:] + "!!!"]}])
    assert (found.text, found.finish_reason) == (whole.text, "length")


def test_end_of_text_and_ignoring_it(serve: Serve, shared: Daemon, tmp_path: Path) -> None:
    """The embedded model ends a text once in ten thousand tokens; a copy of it does at every line's end."""
    request = GREEDY | {"max_tokens": 40}
    (whole,) = run_alone(shared.url, [request])
    count = whole.token_ids.index(NEWLINE) + 1
    metadata = {"tokenizer.ggml.eos_token_id": NEWLINE}
    daemon = serve(str(gc.copy_model(tmp_path / "model.gguf", metadata=metadata)))
    ended, ignoring = run_alone(daemon.url, [request, request | {"ignore_eos": True}])
    assert ended.finish_reason == "stop"
    assert ended.token_ids == whole.token_ids[:count]
    assert ended.usage.completion_tokens == count
    assert (ignoring.finish_reason, ignoring.token_ids) == ("length", whole.token_ids)


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_max_tokens(shared: Daemon, max_tokens: int) -> None:
    (result,) = run_alone(shared.url, [GREEDY | {"max_tokens": max_tokens}])
    assert (len(result.token_ids), result.finish_reason) == (max_tokens, "length")


def test_stream_is_the_whole_in_parts(shared: Daemon) -> None:
    request = sampled(5, 60) | {"logprobs": 2, "prompt_logprobs": True}
    (whole,) = run_alone(shared.url, [request])
    with shared.client() as client:
        stream = client.generate(stream=True, **request)
        chunks = list(stream)
        assert essence(stream.read()) == essence(whole)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.token_ids)
    assert [entry for chunk in chunks for entry in chunk.logprobs or ()] == list(whole.logprobs or ())
    assert len(chunks) > 30


def test_logprobs_are_probabilities_of_the_tokens(shared: Daemon) -> None:
    (greedy,) = run_alone(shared.url, [GREEDY | {"max_tokens": 10, "logprobs": 20}])
    for token, entry in zip(greedy.token_ids, greedy.logprobs or (), strict=True):
        assert entry.token_id == token == entry.top[0][0]
        assert entry.logprob == entry.top[0][1] < 0
        assert len(entry.top) == 20
        assert all(a[1] >= b[1] for a, b in pairwise(entry.top))
    (none,) = run_alone(shared.url, [GREEDY | {"max_tokens": 3, "logprobs": 0}])
    assert [entry.top for entry in none.logprobs or ()] == [[], [], []]
    (without,) = run_alone(shared.url, [GREEDY | {"max_tokens": 3}])
    assert (without.logprobs, without.prompt_logprobs) == (None, None)


def test_prompt_logprobs_agree_with_those_of_the_same_tokens_generated(shared: Daemon) -> None:
    (answer,) = run_alone(shared.url, [GREEDY | {"max_tokens": 12, "logprobs": 0, "ignore_eos": True}])
    ids = [*answer.prompt_token_ids, *answer.token_ids]
    again: Request = {"token_ids": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": True}
    (scored,) = run_alone(shared.url, [again])
    generated = [entry.logprob for entry in answer.logprobs or ()]
    assert list(scored.prompt_logprobs or ())[len(answer.prompt_token_ids) :] == generated


def test_seed(shared: Daemon) -> None:
    drawn: Request = {"prompt": "Once", "temperature": 1.0, "max_tokens": 24}
    one, other = run_alone(shared.url, [drawn, drawn])
    assert one.seed != other.seed
    assert one.token_ids != other.token_ids
    (again,) = run_alone(shared.url, [drawn | {"seed": one.seed}])
    assert again.token_ids == one.token_ids


def test_top_k_one_is_greedy(shared: Daemon) -> None:
    hot = GREEDY | {"temperature": 5.0, "top_k": 1, "max_tokens": 20}
    cold, found = run_alone(shared.url, [GREEDY | {"max_tokens": 20}, hot])
    assert found.token_ids == cold.token_ids


def test_usage_and_timings(shared: Daemon) -> None:
    with shared.client() as client:
        result = client.generate(LONG, max_tokens=40, ignore_eos=True)
    assert result.usage.prompt_tokens == len(result.prompt_token_ids)
    assert result.usage.completion_tokens == 40
    assert 0 <= result.timings.queue_s < 1
    assert 0 < result.timings.prefill_s < 5
    assert 0.01 < result.timings.decode_s < 20


def test_tokenize_and_detokenize(shared: Daemon) -> None:
    text = "Once upon a time, \U0001f42d said: »grün«!\n"
    with shared.client() as client:
        ids = client.tokenize(text)
        assert client.tokenize(text, add_bos=False) == ids[1:]
        assert client.detokenize(ids) == text
        assert client.generate(token_ids=ids, max_tokens=4, temperature=0.0).token_ids == (
            client.generate(text, max_tokens=4, temperature=0.0).token_ids
        )


def test_own_cancel_keeps_what_there_is(shared: Daemon) -> None:
    (whole,) = run_alone(shared.url, [sampled(0, 300)])
    with shared.client() as client:
        stream = client.generate(stream=True, **sampled(0, 300))
        for _ in range(5):
            next(stream)
        stream.cancel()
        result = stream.read()
    assert result.finish_reason == "cancelled"
    assert 5 <= len(result.token_ids) < 300
    assert whole.text.startswith(result.text)


def test_cancelled_task_frees_its_sequence(shared: Daemon) -> None:
    async def run() -> None:
        async with AsyncClient(shared.url) as client:
            task = asyncio.ensure_future(client.generate(**sampled(0, 400)))
            while (await client.status())["sequences"]["running"] != 1:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(NotFound):
                await client.cancel("unheard of")

    asyncio.run(asyncio.wait_for(run(), 30))
    wait_until(lambda: shared.status()["sequences"]["running"] == 0, 1.0, "the sequence is gone")


def test_record_is_not_used_again_while_a_step_still_writes_to_it(serve: Serve) -> None:
    """A stop string ends the answer here while the engine computes one token more for it."""
    daemon = serve("--max-num-seqs", "1")
    following: Request = {"prompt": LONG, "max_tokens": 4, "temperature": 0.0, "prompt_logprobs": True}
    (expected,) = run_alone(daemon.url, [following])
    stopped = [sampled(number, 300) | {"stop": ["e"]} for number in range(20)]
    pairs = [request for stop in stopped for request in (stop, following)]
    for result in run_together(daemon.url, pairs)[1::2]:
        assert essence(result) == essence(expected)


def test_status_shows_what_runs(shared: Daemon) -> None:
    with shared.client() as client, client.generate(stream=True, **sampled(0, 300)) as stream:
        next(stream)
        report: dict[str, Any] = shared.status()
    assert [row["name"] for row in report["processes"]] == [
        "daemon", "nursery", "scheduler", "worker 0", "worker 1",
    ]  # fmt: skip
    assert all(row["rss_mib"] > 10 and row["private_mib"] > 0 for row in report["processes"])
    assert {"arena", "dense", "kv", "streams", "processes"} <= report["memory_mib"].keys()
    assert all(report["memory_mib"][name] > 1 for name in ("arena", "dense", "kv", "processes"))
    assert report["model"]["resident_experts"] == report["model"]["experts"] == 80
    assert report["sequences"]["running"] == 1
    assert report["sequences"]["kv_blocks_free"] < report["sequences"]["kv_blocks"]
    assert report["tokens_per_second"]["generated"] > 0
    assert report["state"] == "serving"


def test_request_with_an_unknown_option_never_leaves_the_client(shared: Daemon) -> None:
    with shared.client() as client:
        with pytest.raises(TypeError, match="did you mean 'temperature'"):
            client.generate("abc", temprature=1.0)  # type: ignore[call-overload]
        with pytest.raises(BadRequest, match="max_tokens"):
            client.generate("abc", max_tokens=0)
