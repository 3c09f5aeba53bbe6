"""Long texts wait for their turn: how many, how large, and what becomes of those whose client has gone."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from sterna.runtime.config import Config, embedded_model
from sterna.runtime.daemon import conversions as conversions_module
from sterna.runtime.daemon.conversions import Asker, Conversions
from sterna.runtime.daemon.engine.link import EngineLink
from sterna.runtime.daemon.model.model_memory import ModelMemory
from sterna.runtime.daemon.model.served_model import ServedModel
from sterna.runtime.daemon.service import Service
from sterna.runtime.daemon.tasks import TaskSet
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import Overloaded, ShuttingDown, SternaError, TooLong

LONG = "a tale of old " * 1_000  # 14,000 characters: not converted in the loop
HELD = sys.getsizeof(LONG)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    path: Path = tmp_path_factory.mktemp("model") / "model.gguf"
    path.symlink_to(embedded_model())
    model = ServedModel.load(Config(model=path, max_num_seqs=2, ctx_size=64))
    yield model
    model.close()


class Bench:
    """Conversions with the real tokenizer; no engine is asked for anything."""

    def __init__(self, model: ServedModel, group: asyncio.TaskGroup, max_waiting: int) -> None:
        self.memory = ModelMemory(model)
        config = Config(max_num_seqs=2, ctx_size=model.context)
        service = Service(config, model, self.memory, cast(EngineLink, _NoEngine()), lambda *_: None, 0.0)
        self.tasks = TaskSet(group)
        self.conversions = Conversions(model.tokenizer, service, self.tasks, max_waiting)
        self.answers: list[m.Message] = []
        self.refusals: list[SternaError] = []

    def asker(self, owner: bytes = b"one") -> Asker:
        return Asker(owner=owner, frame_bytes=len(LONG), refuse=self.refusals.append)

    def tokenize(self, text: str = LONG, owner: bytes = b"one") -> None:
        request = m.Tokenize(id=f"t{len(self.answers)}", text=text)
        self.conversions.answer(request, self.asker(owner), self.answers.append)

    async def settle(self) -> None:
        """Wait until nobody waits for a conversion."""
        async with asyncio.timeout(30):
            while self.conversions.owners():
                await asyncio.sleep(0.005)


class _NoEngine:
    """Stands where the link to the scheduler is: these tests hand nothing to it."""


def play(model: ServedModel, scene: Callable[[Bench], Awaitable[None]], max_waiting: int = 64) -> None:
    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            bench = Bench(model, group, max_waiting)
            try:
                await scene(bench)
            finally:
                bench.tasks.cancel()
                bench.memory.close()

    asyncio.run(run())
    gc.collect()  # the stream memory stays mapped as long as something over it does


def test_sixty_long_texts_at_once_are_all_converted(model: ServedModel) -> None:
    async def scene(bench: Bench) -> None:
        for _ in range(60):
            bench.tokenize()
        await bench.settle()
        assert len(bench.answers) == 60
        assert bench.refusals == []

    play(model, scene)


def test_sixty_long_prompts_at_once_are_all_answered(model: ServedModel) -> None:
    async def scene(bench: Bench) -> None:
        for number in range(60):
            message = m.Generate(id=f"g{number}", prompt=LONG)
            bench.conversions.convert_prompt(message, bench.asker(), lambda ids: None)
        await bench.settle()
        assert [type(error) for error in bench.refusals] == [TooLong] * 60

    play(model, scene)


def test_more_than_may_wait_are_refused_in_the_tick_they_come(model: ServedModel) -> None:
    async def scene(bench: Bench) -> None:
        for _ in range(3):
            bench.tokenize()
        with pytest.raises(Overloaded, match="3 long texts wait"):
            bench.tokenize()
        bench.tokenize("a short one")  # waits for nothing
        assert len(bench.answers) == 1
        await bench.settle()
        bench.tokenize()
        await bench.settle()
        assert len(bench.answers) == 5

    play(model, scene, max_waiting=3)


def test_waiting_texts_are_bounded_by_bytes(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(bench: Bench) -> None:
        monkeypatch.setattr(conversions_module, "MAX_HELD_BYTES", 2 * HELD)
        bench.tokenize()
        bench.tokenize()
        with pytest.raises(Overloaded, match=f"{3 * HELD} bytes, at most {2 * HELD}"):
            bench.tokenize()
        await bench.settle()
        bench.tokenize(LONG * 4)  # a single one may be larger
        await bench.settle()
        assert len(bench.answers) == 3

    play(model, scene)


def test_what_waits_for_a_client_that_has_gone_is_dropped(model: ServedModel) -> None:
    async def scene(bench: Bench) -> None:
        for _ in range(3):
            bench.tokenize(owner=b"gone")
        bench.tokenize(owner=b"stays")
        assert bench.conversions.owners() == {b"gone", b"stays"}
        assert bench.conversions.forget_owner(b"gone") == 3  # none of them has begun
        assert bench.conversions.owners() == {b"stays"}
        await bench.settle()
        assert len(bench.answers) == 1
        assert bench.refusals == []

    play(model, scene, max_waiting=4)


def test_a_conversion_that_runs_keeps_its_turn_when_its_client_goes(model: ServedModel) -> None:
    async def scene(bench: Bench) -> None:
        for owner in (b"gone", b"gone", b"stays"):
            bench.tokenize(owner=owner)
        await asyncio.sleep(0)  # the first has begun
        assert bench.conversions.forget_owner(b"gone") == 1
        await bench.settle()
        assert len(bench.answers) == 2

    play(model, scene)


def test_all_that_wait_are_told_when_the_daemon_stops(model: ServedModel) -> None:
    async def scene(bench: Bench) -> None:
        for _ in range(5):
            bench.tokenize()
        await asyncio.sleep(0)
        bench.conversions.close()
        assert [type(error) for error in bench.refusals] == [ShuttingDown] * 5
        assert bench.conversions.owners() == set()
        await asyncio.sleep(0.05)
        assert bench.answers == []

    play(model, scene)
