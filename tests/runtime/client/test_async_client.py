"""The asyncio client against a peer that speaks the protocol over real sockets."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

import pytest

from sterna.runtime.client.async_client import AsyncClient
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import (
    REQUEST_ERRORS,
    BadRequest,
    DaemonUnreachable,
    EngineLost,
    NotFound,
    ProtocolError,
    UsageError,
)

from .loops import run_async
from .peer import FACTS, Peer


def test_answers(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        assert (await client.generate("abc")).text == "abc!"
        stream = client.generate("ab", stream=True)
        assert [chunk.text async for chunk in stream] == ["a", "b", "!"]
        assert stream.result is not None
        assert stream.result.token_ids == (97, 98)
        assert await client.status() == {"model": {"name": "tiny"}, "workers": [1]}
        assert await client.tokenize("ab") == [97, 98]
        assert await client.detokenize([97, 98]) == "ab"
        assert 0 < await client.ping() < 5
        await client.drain()
        assert (await client.connect()).model == FACTS

    run_async(peer, talk)
    assert len(peer.connections()) == 2  # one per client


def test_calls_side_by_side(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        words = [chr(97 + i % 26) * (i + 1) for i in range(50)]
        results = await asyncio.gather(*(client.generate(word) for word in words))
        assert [result.text for result in results] == [word + "!" for word in words]

    run_async(peer, talk)


def test_cancelled_task_cancels_its_request(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        count = len(peer.messages(m.Cancel))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.generate("slow")
        await asyncio.to_thread(peer.wait_for, m.Cancel, count + 1)
        assert (await client.generate("a")).text == "a!"

    run_async(peer, talk)


def test_early_close_cancels_even_if_the_client_closes_at_once(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        async with client.generate("slow", stream=True) as stream:
            await anext(stream)

    run_async(peer, talk)
    assert len(peer.messages(m.Cancel)) == 2


def test_forgotten_stream_is_cancelled(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        count = len(peer.messages(m.Cancel))
        async for _ in client.generate("slow", stream=True):
            break
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.to_thread(peer.wait_for, m.Cancel, count + 1)

    run_async(peer, talk)


def test_cancel(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        stream = client.generate("slow", stream=True)
        await anext(stream)
        await stream.cancel()
        async for _ in stream:
            pass
        assert stream.result is not None
        assert stream.result.finish_reason == "cancelled"
        with pytest.raises(NotFound):
            await client.cancel("nothing")

    run_async(peer, talk)


def test_failures(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        with pytest.raises(REQUEST_ERRORS["overloaded"], match="as you wish"):
            await client.generate("fail overloaded")
        with pytest.raises(BadRequest):
            client.generate("a", top_p=2)
        with pytest.raises(ProtocolError, match="expected token 1"):
            await client.generate("gap")
        assert (await client.generate("a")).text == "a!"

    run_async(peer, talk)


def test_daemon_that_dies(tmp_path: Path) -> None:
    async def talk() -> None:
        async with AsyncClient(f"ipc://{tmp_path}/peer.sock") as client:
            with pytest.raises(DaemonUnreachable, match="no such socket"):
                await client.status()
            with Peer(tmp_path):
                stream = client.generate("slow", stream=True)
                await anext(stream)
                other = asyncio.ensure_future(client.generate("mute"))
                await asyncio.sleep(0.05)
            start_s = time.monotonic()
            with pytest.raises(DaemonUnreachable, match="went away"):
                async for _ in stream:
                    pass
            with pytest.raises(DaemonUnreachable, match="went away"):
                await other
            assert time.monotonic() - start_s < 1
            with Peer(tmp_path):
                assert (await client.generate("a")).text == "a!"
            await asyncio.sleep(0.1)  # lost while nothing runs
            with Peer(tmp_path):
                assert (await client.generate("a")).text == "a!"

    asyncio.run(talk())


def test_daemon_that_hangs(peer: Peer, hurried: None) -> None:
    async def talk(client: AsyncClient) -> None:
        peer.answers_pings = True
        stream = client.generate("mute", stream=True)
        await stream.start()
        await asyncio.sleep(0.5)  # pings are answered
        peer.answers_pings = False
        start_s = time.monotonic()
        with pytest.raises(DaemonUnreachable, match="has not answered"):
            await anext(stream)
        assert 0.2 <= time.monotonic() - start_s < 2

    run_async(peer, talk)


def test_daemon_that_brings_no_token(peer: Peer, hurried: None) -> None:
    async def talk(client: AsyncClient) -> None:
        count = len(peer.messages(m.Cancel))
        with pytest.raises(EngineLost, match=r"nothing came for 0\.5 s"):
            await client.generate("mute")
        await asyncio.to_thread(peer.wait_for, m.Cancel, count + 1)

    run_async(peer, talk, timeout_s=0.5)


def test_silent_daemon(peer: Peer) -> None:
    peer.answers_hello = False

    async def talk(client: AsyncClient) -> None:
        results = await asyncio.gather(client.status(), client.generate("a"), return_exceptions=True)
        assert [type(result) for result in results] == [DaemonUnreachable, DaemonUnreachable]

    run_async(peer, talk, connect_timeout_s=0.2)


def test_close_ends_what_runs(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        running = asyncio.ensure_future(client.generate("mute"))
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(UsageError, match="closed"):
            await running
        with pytest.raises(UsageError, match="closed"):
            await client.status()

    run_async(peer, talk)


def test_client_belongs_to_one_loop(peer: Peer) -> None:
    client = AsyncClient(peer.url)

    async def use() -> None:
        await client.status()

    with asyncio.Runner() as runner:
        runner.run(use())
        with asyncio.Runner() as other, pytest.raises(UsageError, match="another event loop"):
            other.run(use())
        runner.run(client.close())
