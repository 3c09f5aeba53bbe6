"""What the command prints for people: lines that fit, tables, and no bytes that command a terminal."""

from __future__ import annotations

import dataclasses

from sterna.runtime.cli import render
from sterna.runtime.client.results import Result
from sterna.runtime.daemon.announcement import Announcement
from sterna.runtime.protocol import messages as m
from sterna.runtime.protocol.sockets import default_socket_url


def test_model_output_cannot_command_a_terminal() -> None:
    assert render.for_terminal("a\x1b[2Jb\tc\n\r\x9b1m\x07ä") == "a\ufffd[2Jb\tc\n\ufffd\ufffd1m\ufffdä"


def result(prompt: int, answer: int, reason: m.FinishReason, queue_s: float, seed: int) -> Result:
    return Result(
        text="",
        token_ids=(),
        logprobs=None,
        prompt_token_ids=(),
        prompt_logprobs=None,
        routing=None,
        finish_reason=reason,
        usage=m.Usage(prompt_tokens=prompt, completion_tokens=answer),
        timings=m.Timings(queue_s=queue_s, prefill_s=7.6, decode_s=1.36),
        seed=seed,
    )


def test_statistics_fit_a_line() -> None:
    line = render.statistics(result(1024, 256, "length", 12.34, 2**63 - 1))
    assert line == (
        "prompt 1024 tokens (135 tok/s), answer 256 tokens (188 tok/s), waited 12.3 s, length, "
        "seed 9223372036854775807"
    )
    assert len(render.statistics(result(4096, 1024, "length", 0.0, 2**63 - 1))) <= 100


def test_an_answer_that_was_cut_is_told() -> None:
    whole = result(10, 20, "stop", 0.0, 1)
    assert render.cut_line(whole, None, 512) == ""
    cut = result(10, 256, "length", 0.0, 1)
    assert render.cut_line(cut, None, 512) == "sterna: the answer is cut at 256 tokens; -n sets how many"
    full = result(12, 500, "length", 0.0, 1)
    assert render.cut_line(full, 800, 512) == "sterna: the answer is cut at the context of 512 tokens"
    assert render.cut_line(full, 500, 512) == "sterna: the answer is cut at 500 tokens; -n sets how many"


def test_ready_line_says_what_to_try_and_what_is_short() -> None:
    whole = Announcement(socket="ipc:///none/s", name="tiny", context=512, wished_context=512)
    assert render.ready_line(whole) == (
        "sterna: ready: tiny, context 512 tokens; try in another terminal: "
        "sterna generate --socket ipc:///none/s "
        '"Once upon a time"; Ctrl-C stops'
    )
    short = dataclasses.replace(whole, wished_context=4096, socket=default_socket_url())
    assert "context 512 tokens instead of 4096, for want of memory; try" in render.ready_line(short)
    assert "--socket" not in render.ready_line(short)


def test_table() -> None:
    body = {"a": {"b": 1, "long": 0.123456789}, "list": [{"x": True}, {"x": None}], "c": ["p", "q"], "e": []}
    assert render.table(body).splitlines() == [
        "a.b        1",
        "a.long     0.123457",
        "list[0].x  yes",
        "list[1].x  -",
        "c          p, q",
        "e          -",
    ]
