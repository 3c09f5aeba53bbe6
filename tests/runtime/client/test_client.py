"""The blocking client against a peer that speaks the protocol over real sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sterna.runtime.client.client import Client
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import (
    REQUEST_ERRORS,
    BadRequest,
    ConfigError,
    EngineLost,
    InternalError,
    NotFound,
    TooLong,
)

from .peer import FACTS, Peer


def test_whole_answer(client: Client) -> None:
    result = client.generate("abc", logprobs=1, prompt_logprobs=True)
    assert (result.text, result.token_ids, result.finish_reason) == ("abc!", (97, 98, 99), "stop")
    assert result.prompt_token_ids == (1, 2)
    assert result.prompt_logprobs == (None, -1.5)
    assert result.logprobs is not None
    assert [entry.top for entry in result.logprobs] == [[(97, -0.5)], [(98, -0.5)], [(99, -0.5)]]
    assert (result.usage.completion_tokens, result.timings.prefill_s, result.seed) == (3, 0.5, 7)


def test_options_arrive(client: Client, peer: Peer) -> None:
    client.generate(
        token_ids=np.array([5, 6]), max_tokens=3, temperature=0, seed=1, stop=["x"], add_bos=False
    )
    (sent,) = peer.messages(m.Generate)
    assert (sent.prompt, sent.token_ids, sent.max_tokens, sent.temperature) == (None, [5, 6], 3, 0.0)
    assert (sent.seed, sent.stop, sent.add_bos, sent.top_k) == (1, ["x"], False, 40)


def test_other_calls(client: Client) -> None:
    assert client.status() == {"model": {"name": "tiny"}, "workers": [1]}
    assert client.tokenize("ab") == [97, 98]
    assert client.detokenize(np.array([97, 98])) == "ab"
    assert 0 < client.ping() < 5
    client.drain()
    assert client.connect().model == FACTS


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda client: client.embed(["a", 5]), "texts[1]: expected text or token ids, found 5"),
        (lambda client: client.embed(["a", [5, "b"]]), "texts[1][1]: expected int, found 'b'"),
        (lambda client: client.embed([5, "a"]), "token_ids[1]: expected int, found 'a'"),
        (lambda client: client.embed(5), "texts: expected text, token ids or a list of them, found int"),
        (lambda client: client.embed({"a": 1}),
         "texts: expected text, token ids or a list of them, found dict"),
        (lambda client: client.detokenize(["a"]), "token_ids[0]: expected int, found 'a'"),
        (lambda client: client.detokenize([1, 2.5]), "token_ids[1]: expected int, found 2.5"),
        (lambda client: client.detokenize(5), "token_ids: expected token ids, found 5"),
        (lambda client: client.generate(token_ids=[1, None]), "token_ids[1]: expected int, found None"),
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_are_named(
    client: Client, peer: Peer, call: Callable[[Client], object], complaint: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        call(client)
    assert str(caught.value) == complaint
    assert peer.seen == []


def test_ping_measures_no_connecting(peer: Peer) -> None:
    peer.pause()
    resume = threading.Timer(0.5, peer.resume)
    resume.start()
    with Client(peer.url) as client:
        start_s = time.monotonic()
        seconds = client.ping()
        assert time.monotonic() - start_s > 0.4
        assert 0 < seconds < 0.3
    resume.join(5)


def test_a_fault_inside_a_lazy_import_is_told(tmp_path: Path) -> None:
    """Python would turn it into "cannot import name", without a word on the fault."""
    (tmp_path / "msgspec.py").write_text("import sys\nsys.no_such_thing\n")
    done = subprocess.run(
        [sys.executable, "-c", "from sterna import Client"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=30,
    )
    assert done.returncode == 1
    said = "sterna.Client cannot be imported: module 'sys' has no attribute 'no_such_thing'"
    assert done.stderr.splitlines()[-1] == f"ImportError: {said}"
    assert "msgspec.py" in done.stderr


def test_cancel_of_what_does_not_run(client: Client) -> None:
    with pytest.raises(NotFound, match="no such request"):
        client.cancel("nothing")


@pytest.mark.parametrize("code", REQUEST_ERRORS)
def test_failure_is_a_typed_exception(client: Client, code: str) -> None:
    with pytest.raises(REQUEST_ERRORS[code], match="as you wish"):
        client.generate(f"fail {code}")


def test_failure_of_an_unknown_code(client: Client) -> None:
    with pytest.raises(InternalError):
        client.generate("fail tomorrow")


def test_wrong_values_are_not_sent(client: Client, peer: Peer) -> None:
    with pytest.raises(BadRequest, match=r"^max_tokens: expected int >= 1, found 0$"):
        client.generate("a", max_tokens=0)
    with pytest.raises(BadRequest, match=r"^temperature: expected a finite number, found nan$"):
        client.generate("a", temperature=float("nan"))
    with pytest.raises(BadRequest, match="exactly one of the two, found neither"):
        client.generate()
    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'tempreature', did you mean 'temperature'"
    ):
        client.generate("a", tempreature=1)
    with pytest.raises(BadRequest, match="lone surrogate"):
        client.generate("\ud800")
    assert peer.messages(m.Generate) == []


def test_request_over_the_daemons_limit(tmp_path: Path) -> None:
    with Peer(tmp_path, max_frame_bytes=65_536) as peer, Client(peer.url) as client:
        with pytest.raises(TooLong, match="over the daemon's limit of 65536"):
            client.generate("x" * 70_000)
        assert client.generate("a").text == "a!"


def test_daemon_that_lives_but_brings_no_token(peer: Peer, hurried: None) -> None:
    with Client(peer.url, timeout_s=0.6) as client:
        start_s = time.monotonic()
        with pytest.raises(EngineLost, match=r"nothing came for 0\.6 s \(timeout_s\); it was cancelled"):
            client.generate("mute")
        assert 0.6 <= time.monotonic() - start_s < 2
        assert len(peer.messages(m.Ping)) >= 3
        assert len(peer.messages(m.Cancel)) == 1


def test_url_is_checked() -> None:
    with pytest.raises(ConfigError, match="CURVE"):
        Client("tcp://127.0.0.1:5555")
