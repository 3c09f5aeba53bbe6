"""The clients' `embed`: against a peer that speaks the protocol, and its order of requests by itself."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest

from sterna import AsyncClient, Client
from sterna.runtime.client.embedding import WINDOW, Embedding
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import BadRequest, EngineLost, Overloaded, ProtocolError, TooLong

from .peer import Peer

MANY = ["a" * (number % 40 + 1) for number in range(3 * WINDOW)]


def test_one_text_is_one_row_and_many_are_a_matrix(peer: Peer) -> None:
    with Client(peer.url) as client:
        one = client.embed("abc")
        assert (one.dtype, one.tolist()) == (np.float32, [3.0, 1.0])
        assert client.embed([5, 6]).tolist() == [2.0, 1.0]
        assert client.embed(np.array([5, 6])).tolist() == [2.0, 1.0]
        assert client.embed(["abc"], normalize=False).tolist() == [[3.0, 0.0]]
        assert client.embed(["abc", [1, 2]], pooling="cls").tolist() == [[3.0, 1.0], [2.0, 1.0]]
        assert [request.pooling for request in peer.messages(m.Embed)][-2:] == ["cls", "cls"]
        assert client.embed(MANY)[:, 0].tolist() == [len(text) for text in MANY]
    assert len(peer.connections()) == 1


def test_asyncio_client_gives_the_same_and_has_calls_side_by_side(peer: Peer) -> None:
    async def talk() -> None:
        async with AsyncClient(peer.url) as client:
            one, many, answer = await asyncio.gather(
                client.embed("abc", normalize=False), client.embed(MANY), client.generate("ab")
            )
            assert one.tolist() == [3.0, 0.0]
            assert many[:, 0].tolist() == [len(text) for text in MANY]
            assert answer.text == "ab!"
            with pytest.raises(TooLong, match="as you wish"):
                await client.embed(["a", "fail too_long", "b"])
            assert not client._channel._mailboxes
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.embed(["mute", "aa"])
            assert not client._channel._mailboxes
            cancels = await asyncio.to_thread(peer.wait_for, m.Cancel, 2)
            requests = [r for r in peer.messages(m.Embed) if isinstance(r, m.Embed)]
            given_up = [request.id for request in requests if request.prompt in ("b", "mute")]
            assert [cancel.id for cancel in cancels if isinstance(cancel, m.Cancel)] == given_up

    asyncio.run(talk())


def test_failures(peer: Peer) -> None:
    with Client(peer.url, timeout_s=0.2) as client:
        with pytest.raises(TooLong, match="as you wish"):
            client.embed(["a", "fail too_long"])
        with pytest.raises(EngineLost, match=r"nothing came for 0\.2 s"):
            client.embed("mute")
        sent = len(peer.messages(m.Embed))
        with pytest.raises(BadRequest, match="pooling"):
            client.embed("a", pooling="rank")
        with pytest.raises(BadRequest, match="expected at least one"):
            client.embed([])
        with pytest.raises(BadRequest, match=r"token_ids\[0\]"):
            client.embed([-1])
        assert client.embed("a").tolist() == [1.0, 1.0]
        assert len(peer.messages(m.Embed)) == sent + 1


def test_heartbeat_is_no_vector(peer: Peer, hurried: None) -> None:
    with (
        Client(peer.url, timeout_s=0.5) as client,
        pytest.raises(EngineLost, match=r"nothing came for 0\.5 s"),
    ):
        client.embed("mute")
    assert len(peer.messages(m.Ping)) >= 2


def embedded(request: m.Embed, value: float) -> m.Embedded:
    usage = m.Usage(prompt_tokens=1, completion_tokens=0)
    timings = m.Timings(queue_s=0.0, prefill_s=0.0, decode_s=0.0)
    vector = np.array([value], "<f4").tobytes()
    return m.Embedded(id=request.id, vector=vector, dim=1, pooling="last", usage=usage, timings=timings)


def overloaded(request: m.Embed) -> m.Failed:
    return m.Failed(id=request.id, code=Overloaded.code, text="full", retryable=True)


def test_full_queue_is_waited_for_by_the_answers_to_others() -> None:
    run = Embedding([str(number) for number in range(40)], None, True)
    first = list(run.due())
    assert len(first) == WINDOW
    for request in first[3:]:
        run.feed(overloaded(request))
    assert list(run.due()) == []
    run.feed(embedded(first[1], 1.0))
    (again,) = run.due()
    assert again == first[-1]
    run.feed(embedded(first[0], 0.0))
    run.feed(embedded(first[2], 2.0))
    left = [again]
    while left:
        for request in left:
            run.feed(embedded(request, float(request.prompt or "nan")))
        left = list(run.due())
        assert len(left) <= 3
    assert run.done
    assert run.result()[:, 0].tolist() == list(range(40))


def test_full_queue_of_others_is_an_error() -> None:
    run = Embedding("a", None, True)
    (request,) = run.due()
    with pytest.raises(Overloaded, match="full"):
        run.feed(overloaded(request))


def test_another_answer_is_an_error() -> None:
    run = Embedding("a", None, True)
    (request,) = run.due()
    with pytest.raises(ProtocolError, match="expected Embedded, found Tokenized"):
        run.feed(m.Tokenized(id=request.id, token_ids=[]))


def sterna(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    command = [sys.executable, "-m", "sterna.runtime.cli.main", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=30, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_command(peer: Peer) -> None:
    assert sterna("embed", "abc", "-", "--socket", peer.url, stdin=b"ab") == (0, "3.0 1.0\n2.0 1.0\n", "")
    code, out, _ = sterna("embed", "a", "--raw", "--pooling", "mean", "--json", "--socket", peer.url)
    assert (code, json.loads(out)) == (0, {"dim": 2, "embeddings": [[1.0, 0.0]]})
    (request,) = peer.messages(m.Embed)[2:]
    assert isinstance(request, m.Embed)
    assert request.pooling == "mean"
    code, out, err = sterna("embed", "a", "--pooling", "rank", "--socket", peer.url)
    assert (code, out) == (64, "")
    assert "'rank' is not one of" in err
