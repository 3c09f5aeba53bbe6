"""The daemon's messages with its scheduler, over real sockets: the test speaks as the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import zmq
import zmq.asyncio

from sterna.runtime.daemon.engine import link as link_module
from sterna.runtime.daemon.engine.link import EngineLink
from sterna.scheduler import messages as wire
from sterna.shm.errors import EngineLost, OutOfResources, SternaError

T = TypeVar("T", bound=wire.EngineMessage)
WAIT_S = 5.0
GENERATION = 1
EXPERTS = wire.ExpertStats(
    slots=4, resident=2, loading=0, resident_of_workers=[2], events=0, logical=0, distinct=0, hits=0,
    misses=0, fetched=0, fetched_bytes=0, waited_ns=0, page_in_p50_ns=0, page_in_p99_ns=0,
    needed_per_slot=0.0, cycle_guard=1.0, layer_hit_rates=[], foreseen=0, foreseen_used=0, foreseen_late=0,
)  # fmt: skip


def stats_of(nonce: int, steps: int = 0) -> wire.Stats:
    return wire.Stats(
        nonce=nonce, steps=steps, running=0, free_blocks=1, workers=[0], resident_experts=2, experts=EXPERTS
    )


class Scheduler:
    """The other end of the link, as the scheduler of one generation."""

    def __init__(self, url: str, generation: int) -> None:
        socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTING_ID, f"s{generation}".encode())
        socket.connect(url)
        self._socket = socket

    async def say(self, message: wire.EngineMessage) -> None:
        await self._socket.send(msgspec.msgpack.encode(message))

    async def heard(self, expected: type[T]) -> T:
        """Return the next message, which must be one of `expected`."""
        async with asyncio.timeout(WAIT_S):
            message = wire.decode_for_scheduler(await self._socket.recv())
        assert isinstance(message, expected), message
        return message

    def close(self) -> None:
        self._socket.close()


class Stage:
    """A link that serves a scheduler, which has said that it is ready."""

    def __init__(self, folder: Path) -> None:
        self.link = EngineLink(folder)
        self.troubles: list[SternaError] = []
        self.ready = asyncio.Event()
        self.trouble = asyncio.Event()
        self.loaded = asyncio.Event()
        self.link.on_ready = self.ready.set
        self.link.on_loading = lambda _: self.loaded.set()
        self.link.on_trouble = self._note
        self.scheduler = Scheduler(self.link.url, GENERATION)

    def _note(self, error: SternaError) -> None:
        self.troubles.append(error)
        self.trouble.set()

    async def serve(self) -> None:
        self.link.begin(GENERATION)
        await self.scheduler.say(wire.Ready(seconds=0.1, threads=1, streaming_threads=1))
        await self.until(self.ready)
        self.link.serve()

    async def until(self, event: asyncio.Event) -> None:
        async with asyncio.timeout(WAIT_S):
            await event.wait()

    async def until_read(self) -> None:
        """Wait until the link has read all that the scheduler has said so far."""
        self.loaded.clear()
        await self.scheduler.say(wire.Loading(what="a mark", done=1, total=1))
        await self.until(self.loaded)

    def close(self) -> None:
        self.scheduler.close()
        self.link.close()


def play(folder: Path, scene: Callable[[Stage], Awaitable[None]]) -> None:
    async def run() -> None:
        stage = Stage(folder)
        try:
            await stage.serve()
            await scene(stage)
        finally:
            stage.close()

    asyncio.run(run())


def resized(nonce: int, freed: int, error: str | None = None) -> wire.Resized:
    return wire.Resized(nonce=nonce, resident_experts=2, freed_bytes=freed, error=error)


def test_resize_returns_what_the_scheduler_freed(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        asked = asyncio.create_task(stage.link.resize([2, 1]))
        message = await stage.scheduler.heard(wire.Resize)
        assert message.limits == [2, 1]
        await stage.scheduler.say(resized(message.nonce, 4096))
        assert (await asked).freed_bytes == 4096

    play(tmp_path, scene)


def test_late_answer_is_not_taken_for_one_to_the_next_resize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stage: Stage) -> None:
        monkeypatch.setattr(link_module, "RESIZE_TIMEOUT_S", 0.05)
        with pytest.raises(EngineLost, match="changed no slots"):
            await stage.link.resize([3])
        late = await stage.scheduler.heard(wire.Resize)
        monkeypatch.setattr(link_module, "RESIZE_TIMEOUT_S", WAIT_S)
        asked = asyncio.create_task(stage.link.resize([1]))
        message = await stage.scheduler.heard(wire.Resize)
        await stage.scheduler.say(resized(late.nonce, 1, "an error of the first one"))
        await stage.until_read()
        assert not asked.done()
        await stage.scheduler.say(resized(message.nonce, 2))
        assert (await asked).freed_bytes == 2

    play(tmp_path, scene)


def test_resize_without_memory_to_grow_into_is_refused(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        asked = asyncio.create_task(stage.link.resize([8]))
        message = await stage.scheduler.heard(wire.Resize)
        await stage.scheduler.say(resized(message.nonce, 0, "no memory"))
        with pytest.raises(OutOfResources, match="no memory"):
            await asked

    play(tmp_path, scene)


def test_trouble_while_resizing_is_reported_and_ends_the_resize_with_the_scheduler(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        asked = asyncio.create_task(stage.link.resize([1]))
        await stage.scheduler.heard(wire.Resize)
        await stage.scheduler.say(wire.Trouble(code=OutOfResources.code, text="no memory for the arena"))
        await stage.until(stage.trouble)
        assert [type(error) for error in stage.troubles] == [OutOfResources]
        assert not asked.done()
        stage.link.lost("the scheduler was ended")
        with pytest.raises(EngineLost, match="was ended"):
            await asked

    play(tmp_path, scene)


def test_scheduler_that_goes_away_takes_its_answers_with_it(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        link = stage.link
        gone: list[str] = []
        asked = asyncio.create_task(link.resize([1]))
        message = await stage.scheduler.heard(wire.Resize)
        link.cancel(0, 1, lambda: gone.append("cancelled"))
        link.lost("scheduler killed by SIGKILL")
        with pytest.raises(EngineLost, match="SIGKILL"):
            await asked
        with pytest.raises(EngineLost, match="being replaced"):
            await link.resize([1])
        assert gone == []  # what it has begun may go on until all its processes have ended
        link.begin(GENERATION + 1)
        assert gone == ["cancelled"]
        restarted = asyncio.Event()
        link.on_restart = restarted.set
        successor = Scheduler(link.url, GENERATION + 1)
        try:
            stage.ready.clear()
            await successor.say(wire.Ready(seconds=0.1, threads=1, streaming_threads=1))
            await stage.until(stage.ready)
            link.serve_again()
            assert restarted.is_set()
            asked = asyncio.create_task(link.resize([1]))
            own = await successor.heard(wire.Resize)
            await stage.scheduler.say(resized(message.nonce, 1))
            await successor.say(resized(own.nonce, 2))
            assert (await asked).freed_bytes == 2
        finally:
            successor.close()

    play(tmp_path, scene)


def test_late_figures_are_not_taken_for_the_present_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stage: Stage) -> None:
        monkeypatch.setattr(link_module, "QUERY_TIMEOUT_S", 0.05)
        assert await stage.link.stats() is None
        late = await stage.scheduler.heard(wire.Query)
        monkeypatch.setattr(link_module, "QUERY_TIMEOUT_S", WAIT_S)
        asked = [asyncio.create_task(stage.link.stats()) for _ in range(2)]
        query = await stage.scheduler.heard(wire.Query)  # one, shared by both
        await stage.scheduler.say(stats_of(late.nonce, steps=1))
        await stage.until_read()
        assert not any(task.done() for task in asked)
        await stage.scheduler.say(stats_of(query.nonce, steps=2))
        found = await asyncio.gather(*asked)
        assert [stats.steps for stats in found if stats is not None] == [2, 2]

    play(tmp_path, scene)


def test_cancel_is_over_when_the_scheduler_has_taken_it(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        over = asyncio.Event()
        stage.link.cancel(3, 7, over.set)
        cancel = await stage.scheduler.heard(wire.Cancel)
        assert (cancel.stream, cancel.serial) == (3, 7)
        query = await stage.scheduler.heard(wire.Query)
        assert not over.is_set()
        await stage.scheduler.say(stats_of(query.nonce))
        await stage.until(over)

    play(tmp_path, scene)
