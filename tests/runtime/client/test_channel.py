"""Many calls over the one connection of the asyncio client: they wait for their turn, and only for it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from sterna import AsyncClient
from sterna.runtime.client.turns import Turns
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import DaemonUnreachable, EngineLost, Overloaded, TooLong

from .loops import run_async
from .peer import Peer


def is_idle(client: AsyncClient) -> bool:
    """Tell whether the client has forgotten all its calls and the daemon has none of them."""
    return client._channel.is_idle


async def until_idle(client: AsyncClient) -> None:
    async with asyncio.timeout(5):
        while not is_idle(client):
            await asyncio.sleep(0.005)


def prompts(peer: Peer) -> list[str | None]:
    return [message.prompt for message in peer.messages(m.Generate) if isinstance(message, m.Generate)]


def test_three_hundred_requests_wait_for_their_turn(tmp_path: Path) -> None:
    asked = [f"soon {number} tale" for number in range(300)]

    async def talk(client: AsyncClient) -> None:
        peer.seen.clear()
        results = await asyncio.gather(*(client.generate(prompt) for prompt in asked))
        assert [result.text for result in results] == [f"{number} tale!" for number in range(300)]
        assert prompts(peer) == asked  # in the order of the calls
        assert is_idle(client)

    with Peer(tmp_path, max_queue=20, max_sequences=2) as peer:
        run_async(peer, talk)


def test_a_thousand_short_calls_at_once(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        words = [f"word {number}" for number in range(1000)]
        found = await asyncio.gather(*(client.tokenize(word) for word in words))
        assert found == [list(map(ord, word)) for word in words]
        assert is_idle(client)

    run_async(peer, talk)


def test_messages_wait_for_a_daemon_that_reads_nothing_for_a_while(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        await client.connect()
        peer.pause()
        text = "x" * 20_000  # 8 MB in all: more than sockets and queues hold
        calls = [asyncio.ensure_future(client.tokenize(text)) for _ in range(400)]
        done, _ = await asyncio.wait(calls, timeout=0.3)
        assert not done
        peer.resume()
        for ids in await asyncio.gather(*calls):
            assert len(ids) == len(text)

    run_async(peer, talk)


def test_embeddings_take_their_turn_among_answers(tmp_path: Path) -> None:
    async def talk(client: AsyncClient) -> None:
        texts = ["a" * (number % 7 + 1) for number in range(60)]
        answers = [client.generate(f"soon {number}") for number in range(60)]
        first, second, *results = await asyncio.gather(client.embed(texts), client.embed(texts), *answers)
        assert first[:, 0].tolist() == second[:, 0].tolist() == [len(text) for text in texts]
        assert [result.text for result in results] == [f"{number}!" for number in range(60)]
        assert is_idle(client)

    with Peer(tmp_path, max_queue=6, max_sequences=1) as peer:
        run_async(peer, talk)


def test_a_task_cancelled_while_it_waits_leaves_nothing_behind(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        peer.seen.clear()
        running = [asyncio.ensure_future(client.generate("mute")) for _ in range(4)]
        waiting = [asyncio.ensure_future(client.generate("never")) for _ in range(3)]
        vectors = asyncio.ensure_future(client.embed(["never", "never either"]))
        await asyncio.to_thread(peer.wait_for, m.Generate, 4)
        await asyncio.sleep(0.05)
        for task in (*waiting, vectors):
            task.cancel()
        await asyncio.wait([*waiting, vectors], timeout=5)
        await client.ping()
        assert prompts(peer) == ["mute"] * 4
        assert not peer.messages(m.Embed)
        assert not peer.messages(m.Cancel)
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=5)
        assert (await client.generate("a")).text == "a!"
        await until_idle(client)
        assert len(peer.messages(m.Cancel)) == 4

    run_async(peer, talk)


@pytest.mark.parametrize("how", ["stream", "client"])
def test_a_request_that_waits_can_be_cancelled(peer: Peer, how: str) -> None:
    async def talk(client: AsyncClient) -> None:
        peer.seen.clear()
        running = [client.generate("mute", stream=True) for _ in range(4)]
        for stream in running:
            await stream.start()
        waiting = client.generate("never", stream=True)
        await waiting.start()
        await (waiting.cancel() if how == "stream" else client.cancel(waiting.id))
        result = await waiting.read()
        assert (result.finish_reason, result.text, result.usage.prompt_tokens) == ("cancelled", "", 0)
        for stream in running:
            await stream.aclose()
        await until_idle(client)
        assert prompts(peer) == ["mute"] * 4

    run_async(peer, talk)


def test_all_that_wait_notice_a_daemon_that_dies(tmp_path: Path) -> None:
    async def talk() -> None:
        with Peer(tmp_path) as peer:
            client = AsyncClient(peer.url)
            calls = [asyncio.ensure_future(client.generate("mute")) for _ in range(300)]
            await asyncio.sleep(0)
            await client.connect()  # calls find the connection one by one; this one is the last
            await asyncio.to_thread(peer.wait_for, m.Generate, 4)
        start_s = time.monotonic()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert time.monotonic() - start_s < 1
        assert {(type(error), str(error)) for error in found} == {
            (DaemonUnreachable, f"the daemon at {client.url} went away")
        }
        assert is_idle(client)
        with Peer(tmp_path):
            assert (await client.generate("a")).text == "a!"
        await client.close()

    asyncio.run(talk())


def test_a_daemon_that_hangs_is_noticed_though_its_socket_is_full(peer: Peer, hurried: None) -> None:
    async def talk(client: AsyncClient) -> None:
        await client.connect()
        peer.pause()
        start_s = time.monotonic()
        calls = [client.tokenize("x" * 20_000) for _ in range(400)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert 0.3 <= time.monotonic() - start_s < 2
        assert {type(error) for error in found} == {DaemonUnreachable}
        assert "has not answered for" in str(found[0])
        peer.resume()

    run_async(peer, talk)


def test_a_queue_that_others_fill_is_overloaded_and_not_unreachable(tmp_path: Path) -> None:
    with Peer(tmp_path, max_queue=3, max_sequences=1) as peer:

        async def talk(client: AsyncClient) -> None:
            async with AsyncClient(peer.url) as other:
                held = [other.generate("mute", stream=True) for _ in range(3)]
                for stream in held:
                    await stream.start()
                await other.ping()
                mine = client.generate("mute", stream=True)
                await mine.start()
                await client.ping()
                with pytest.raises(Overloaded) as caught:
                    await client.generate("a")
                assert caught.value.retryable
                await held[0].aclose()
                await other.ping()
                assert (await client.generate("a")).text == "a!"
                await mine.aclose()

        run_async(peer, talk)


def test_waiting_for_a_turn_is_no_silence(tmp_path: Path) -> None:
    async def talk(client: AsyncClient) -> None:
        start_s = time.monotonic()
        await asyncio.gather(*(client.generate("soon a") for _ in range(34)))
        assert time.monotonic() - start_s > 3 * client.timeout_s

    with Peer(tmp_path, max_queue=2, max_sequences=2, soon_s=0.08) as peer:
        run_async(peer, talk, timeout_s=0.8)


def test_a_request_behind_silent_ones_is_answered_when_they_are_given_up(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        silent = [asyncio.ensure_future(client.generate("mute")) for _ in range(4)]
        await asyncio.sleep(0.2)
        assert (await client.generate("a")).text == "a!"
        lost = await asyncio.gather(*silent, return_exceptions=True)
        assert [type(error) for error in lost] == [EngineLost] * 4

    run_async(peer, talk, timeout_s=0.4)


def test_a_request_behind_silent_ones_that_nobody_reads_has_its_own_bound(peer: Peer) -> None:
    async def talk(client: AsyncClient) -> None:
        unread = [client.generate("mute", stream=True) for _ in range(4)]
        for stream in unread:
            await stream.start()
        start_s = time.monotonic()
        with pytest.raises(EngineLost, match=r"nothing came for 0\.3 s"):
            await client.generate("a")
        assert 0.3 <= time.monotonic() - start_s < 2

    run_async(peer, talk, timeout_s=0.3)


def test_a_request_that_is_too_long_leaves_the_line_as_it_was(tmp_path: Path) -> None:
    async def talk(client: AsyncClient) -> None:
        asked = [client.generate(prompt) for prompt in ("soon a", "x" * 70_000, "soon b")]
        first, too_long, last = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(too_long, TooLong)
        assert not isinstance(first, BaseException)
        assert not isinstance(last, BaseException)
        assert (first.text, last.text) == ("a!", "b!")
        assert is_idle(client)

    with Peer(tmp_path, max_frame_bytes=65_536, max_queue=1, max_sequences=1) as peer:
        run_async(peer, talk)


def test_a_client_that_was_not_connected_has_no_turns() -> None:
    assert Turns().num_open == 0
    assert AsyncClient("ipc:///nowhere/sterna.sock")._channel.is_idle
