"""The blocking client against a peer that speaks the protocol over real sockets."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sterna.runtime.client import heartbeat, replies
from sterna.runtime.client.client import Client
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import (
    REQUEST_ERRORS,
    BadRequest,
    Cancelled,
    ConfigError,
    DaemonUnreachable,
    EngineLost,
    InternalError,
    NotFound,
    ProtocolError,
    ShuttingDown,
    TooLong,
    Unauthorized,
    UsageError,
)

from .peer import FACTS, Peer


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with Peer(tmp_path) as peer:
        yield peer


@pytest.fixture
def client(peer: Peer) -> Iterator[Client]:
    with Client(peer.url) as client:
        yield client


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the heartbeat, so that its failure is a matter of half a second."""
    monkeypatch.setattr(heartbeat, "PING_AFTER_S", 0.1)
    monkeypatch.setattr(heartbeat, "LOST_AFTER_PING_S", 0.3)


# ---- answers ----


def test_whole_answer(client: Client) -> None:
    result = client.generate("abc", logprobs=1, prompt_logprobs=True)
    assert (result.text, result.token_ids, result.finish_reason) == ("abc!", (97, 98, 99), "stop")
    assert result.prompt_token_ids == (1, 2)
    assert result.prompt_logprobs == (None, -1.5)
    assert result.logprobs is not None
    assert [entry.top for entry in result.logprobs] == [[(97, -0.5)], [(98, -0.5)], [(99, -0.5)]]
    assert (result.usage.completion_tokens, result.timings.prefill_s, result.seed) == (3, 0.5, 7)


def test_streamed_answer(client: Client, peer: Peer) -> None:
    stream = client.generate("abc", stream=True)
    assert stream.id == peer.wait_for(m.Generate)[0].id
    assert [(chunk.text, chunk.token_ids) for chunk in stream] == [
        ("a", (97,)),
        ("b", (98,)),
        ("c", (99,)),
        ("!", ()),
    ]
    assert stream.result is not None
    assert stream.result.text == "abc!"
    assert list(stream) == []


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


def test_threads_share_a_client(client: Client, peer: Peer) -> None:
    inside = threading.Barrier(4, timeout=10)
    answers: list[str] = []

    def ask(word: str) -> None:
        with client.generate("slow", stream=True) as stream:
            next(stream)
            inside.wait()  # all four are in flight now
        answers.extend([client.generate(word).text for _ in range(20)])

    threads = [threading.Thread(target=ask, args=(word * 5,)) for word in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == sorted([word * 5 + "!" for word in "abcd"] * 20)
    assert len(peer.connections()) == 4
    assert len({hello.client for hello in peer.messages(m.Hello)}) == 1


def test_connections_are_used_again(client: Client, peer: Peer) -> None:
    for _ in range(5):
        client.generate("a")
        with pytest.raises(NotFound):
            client.generate("fail not_found")
    assert len(peer.connections()) == 1


# ---- cancelling ----


def test_close_cancels(client: Client, peer: Peer) -> None:
    stream = client.generate("slow", stream=True)
    assert next(stream).text == "x"
    stream.close()
    assert peer.messages(m.Cancel) == [m.Cancel(id=stream.id)]
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"
    assert list(stream) == []
    assert client.generate("a").text == "a!"
    assert len(peer.connections()) == 1


def test_leaving_a_loop_cancels(client: Client, peer: Peer) -> None:
    for _ in client.generate("slow", stream=True):
        break
    gc.collect()
    assert len(peer.wait_for(m.Cancel)) == 1


def test_an_exception_in_a_with_block_cancels(client: Client, peer: Peer) -> None:
    with pytest.raises(KeyError), client.generate("slow", stream=True):
        raise KeyError
    assert len(peer.messages(m.Cancel)) == 1


def test_cancel_from_another_thread(client: Client) -> None:
    stream = client.generate("slow", stream=True)
    timer = threading.Timer(0.05, stream.cancel)
    timer.start()
    for _ in stream:
        pass
    timer.join(5)
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"


def test_cancel_of_what_does_not_run(client: Client) -> None:
    with pytest.raises(NotFound, match="no such request"):
        client.cancel("nothing")


def test_reading_a_closed_stream(client: Client, peer: Peer) -> None:
    peer.answers_pings = False
    stream = client.generate("mute", stream=True)
    peer.wait_for(m.Generate)
    peer.stop()
    stream.close()
    with pytest.raises(Cancelled, match="closed by this client"):
        stream.read()


# ---- errors ----


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


def test_lost_token_is_noticed(client: Client) -> None:
    with pytest.raises(ProtocolError, match="expected token 1, found 2"):
        client.generate("gap")


def test_refused(client: Client, peer: Peer) -> None:
    peer.refuses = True
    with pytest.raises(Unauthorized, match="not you"):
        client.status()


def test_no_socket(tmp_path: Path) -> None:
    start_s = time.monotonic()
    url = f"ipc://{tmp_path}/none.sock"
    with Client(url) as client, pytest.raises(DaemonUnreachable) as caught:
        client.status()
    assert str(caught.value) == f"no daemon at {url}: there is no such socket; start one with 'sterna serve'"
    assert time.monotonic() - start_s < 1


def test_silent_daemon(peer: Peer) -> None:
    peer.answers_hello = False
    start_s = time.monotonic()
    with (
        Client(peer.url, connect_timeout_s=0.3) as client,
        pytest.raises(
            DaemonUnreachable, match=r"gave no answer within 0\.3 s; start one with 'sterna serve'"
        ),
    ):
        client.status()
    assert 0.3 <= time.monotonic() - start_s < 2


def test_daemon_that_dies_in_an_answer(client: Client, peer: Peer) -> None:
    stream = client.generate("slow", stream=True)
    next(stream)
    peer.stop()
    start_s = time.monotonic()
    with pytest.raises(DaemonUnreachable, match="went away"):
        for _ in stream:
            pass
    assert time.monotonic() - start_s < 1
    with pytest.raises(DaemonUnreachable):
        client.generate("a")


def test_daemon_that_hangs_in_an_answer(client: Client, peer: Peer, hurried: None) -> None:
    stream = client.generate("mute", stream=True)
    peer.wait_for(m.Generate)
    peer.answers_pings = False
    start_s = time.monotonic()
    with pytest.raises(DaemonUnreachable, match="has not answered for 0 s"):
        next(stream)
    assert 0.3 <= time.monotonic() - start_s < 2


def test_daemon_that_lives_but_brings_no_token(peer: Peer, hurried: None) -> None:
    with Client(peer.url, timeout_s=0.6) as client:
        start_s = time.monotonic()
        with pytest.raises(EngineLost, match=r"nothing came for 0\.6 s \(timeout_s\); it was cancelled"):
            client.generate("mute")
        assert 0.6 <= time.monotonic() - start_s < 2
        assert len(peer.messages(m.Ping)) >= 3
        assert len(peer.messages(m.Cancel)) == 1


def test_caller_who_is_away_for_long_loses_nothing(client: Client, hurried: None) -> None:
    stream = client.generate("slow", stream=True)
    next(stream)
    time.sleep(0.8)
    assert next(stream).text == "x"
    stream.close()


def test_daemon_that_was_restarted(tmp_path: Path) -> None:
    with Client(f"ipc://{tmp_path}/peer.sock") as client:
        for _ in range(3):
            with Peer(tmp_path):
                assert client.generate("a").text == "a!"
            with pytest.raises(DaemonUnreachable):
                client.generate("a")


def test_daemon_that_announces_its_end(client: Client, peer: Peer) -> None:
    stream = client.generate("slow", stream=True)
    peer.go_away()
    time.sleep(0.05)
    next(stream)  # goes on
    stream.close()
    client.generate("a")
    assert len(peer.connections()) == 2


def test_going_away_instead_of_welcome() -> None:
    with pytest.raises(ShuttingDown, match="stopping"):
        replies.settle(m.GoingAway(text="stopping"), m.Welcome)


# ---- life of a client ----


def test_closed_client(client: Client) -> None:
    client.close()
    client.close()
    with pytest.raises(UsageError, match="this client is closed"):
        client.status()


def test_close_while_a_stream_runs(peer: Peer) -> None:
    client = Client(peer.url)
    stream = client.generate("slow", stream=True)
    client.close()
    next(stream)
    stream.close()
    assert len(peer.messages(m.Cancel)) == 1


def test_url_is_checked() -> None:
    with pytest.raises(ConfigError, match="CURVE"):
        Client("tcp://127.0.0.1:5555")


def test_use_after_fork(peer: Peer) -> None:
    script = """
        import os, sys
        from sterna.runtime.client.client import Client
        client = Client(sys.argv[1])
        client.status()
        stream = client.generate("slow", stream=True)
        if os.fork() == 0:
            for call in (client.status, stream.__next__):
                try:
                    call()
                except Exception as e:
                    print(type(e).__name__, e, flush=True)
            del stream
            client.close()
            os._exit(0)
        os.wait()
        print(next(stream).text, client.generate("a").text)
        stream.close()
        client.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), peer.url], capture_output=True, text=True, timeout=30
    )
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert first.startswith("UsageError this client was made in process ")
    assert last == "x a!"
    assert done.returncode == 0, done.stderr


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_open(peer: Peer) -> None:
    def use() -> None:
        with Client(peer.url) as client, client.generate("slow", stream=True) as stream:
            next(stream)

    use()
    time.sleep(0.1)
    before = open_descriptors()
    for _ in range(20):
        use()
    time.sleep(0.2)  # the peer closes its ends
    assert open_descriptors() <= before + 2
