"""Answers of the blocking client in parts: cancelled early, broken off, and read by who was away."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from sterna.runtime.client.client import Client
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import (
    Cancelled,
    DaemonUnreachable,
    ProtocolError,
)

from .peer import Peer


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


def test_reading_a_closed_stream(client: Client, peer: Peer) -> None:
    peer.answers_pings = False
    stream = client.generate("mute", stream=True)
    peer.wait_for(m.Generate)
    peer.stop()
    stream.close()
    with pytest.raises(Cancelled, match="closed by this client"):
        stream.read()


def test_lost_token_is_noticed(client: Client) -> None:
    with pytest.raises(ProtocolError, match="expected token 1, found 2"):
        client.generate("gap")


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


def test_caller_who_is_away_for_long_loses_nothing(client: Client, hurried: None) -> None:
    stream = client.generate("slow", stream=True)
    next(stream)
    time.sleep(0.8)
    assert next(stream).text == "x"
    stream.close()


def test_close_while_a_stream_runs(peer: Peer) -> None:
    client = Client(peer.url)
    stream = client.generate("slow", stream=True)
    client.close()
    next(stream)
    stream.close()
    assert len(peer.messages(m.Cancel)) == 1
