"""Slots that follow the memory of the machine: real arenas and slots, a /proc of the test's own."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sterna.runtime.config import Config
from sterna.runtime.daemon import memory_control
from sterna.runtime.daemon.memory_control import MemoryControl
from sterna.runtime.daemon.model.model_memory import ModelMemory
from sterna.runtime.daemon.model.served_model import ServedModel
from sterna.runtime.memory import pressure
from sterna.scheduler.messages import Resize, Resized
from sterna.scheduler.residency.expert_memory import ExpertMemory
from sterna.scheduler.residency.resizer import Resizer
from sterna.shm.arena import Arena
from sterna.shm.errors import BadRequest, OutOfResources, Overloaded
from sterna.shm.slots import SlotTable
from sterna.workers.ownership import owners

GIB = 2**30


class LocalEngine:
    """The scheduler's side of a resize, in this process and between steps at all times."""

    def __init__(self, model: ServedModel, memory: ModelMemory) -> None:
        arena = Arena("weights", memory.worker_fds["weights"], memory.memory_bytes["arena"])
        slots = SlotTable(arena.bytes, model.slots)
        owned = owners(model.plan.hyper.moe_layers, model.plan.hyper.experts, [1.0])
        experts = ExpertMemory(model.plan, slots, model.slots, owned, None)
        self.resizer = Resizer(experts, slots, arena, model.slots, memory.limits)

    async def resize(self, limits: list[int]) -> Resized:
        self.resizer.ask(Resize(nonce=1, limits=limits))
        answer = self.resizer.advance()
        assert answer is not None
        if answer.error:
            raise OutOfResources(answer.error)
        return answer


def meminfo(root: Path, available: int) -> None:
    (root / "proc").mkdir(exist_ok=True)
    text = f"MemTotal: {16 * GIB >> 10} kB\nMemAvailable: {available >> 10} kB\n"
    (root / "proc" / "next").write_text(text)
    (root / "proc" / "next").rename(root / "proc" / "meminfo")


@pytest.fixture
def model() -> Iterator[ServedModel]:
    model = ServedModel.load(Config(ternary="2", ctx_size=64, max_num_seqs=2, workers=1, memory="300MiB"))
    yield model
    model.close()


@pytest.fixture
def memory(model: ServedModel) -> Iterator[ModelMemory]:
    memory = ModelMemory(model)
    yield memory
    memory.close()
    memory.__dict__.clear()
    gc.collect()  # leave no memfd behind: system tests look for those


def control(model: ServedModel, memory: ModelMemory, root: Path) -> MemoryControl:
    engine = LocalEngine(model, memory)
    return MemoryControl(model, memory, engine, root)  # type: ignore[arg-type] # all that it uses of it


async def reached(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_it_shrinks_when_memory_is_short_and_grows_back(
    model: ServedModel, memory: ModelMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_control, "WATCH_S", 0.002)
    monkeypatch.setattr(pressure, "SHRINK_EVERY_S", 0.01)
    monkeypatch.setattr(pressure, "CALM_S", 0.02)
    held = [memory.arena_nbytes_held]

    async def run() -> None:
        meminfo(tmp_path, GIB // 2)
        task = asyncio.create_task(control(model, memory, tmp_path).watch())
        await reached(lambda: memory.decision.num_slots == 11)
        held.append(memory.arena_nbytes_held)
        meminfo(tmp_path, 8 * GIB)
        await reached(lambda: memory.decision.num_slots == 80)
        held.append(memory.arena_nbytes_held)
        task.cancel()

    asyncio.run(run())
    changes = [b - a for a, b in itertools.pairwise(held)]
    assert changes == [-69 * 53_248, 69 * 53_248]
    assert memory.limits == [80]


def test_a_size_is_carried_out_and_remembered(
    model: ServedModel, memory: ModelMemory, tmp_path: Path
) -> None:
    meminfo(tmp_path, 8 * GIB)
    whole = memory.decision

    async def run() -> None:
        each = control(model, memory, tmp_path)
        small = await each.resize(str(whole.total - 20 * 53_248))
        assert (small["slots"], small["freed_bytes"]) == (60, 20 * 53_248)
        assert (memory.limits, memory.decision.num_slots) == ([60], 60)
        assert memory.decision.total <= whole.total - 20 * 53_248
        with pytest.raises(OutOfResources, match=r"at least \d+ MiB \(\d+ bytes\) work$"):
            await each.resize("1MiB")
        with pytest.raises(BadRequest, match="memory: expected a size"):
            await each.resize("much")
        with pytest.raises(OutOfResources, match=r"^memory is 1000 GiB, but this machine has 16 GiB$"):
            await each.resize("1000GiB")
        meminfo(tmp_path, 2**19)
        with pytest.raises(Overloaded, match=r"1 MiB more are needed, but 512 KiB are free on this machine"):
            await each.resize("auto")
        assert memory.limits == [60]
        meminfo(tmp_path, GIB)
        assert (await each.resize("auto"))["slots"] == 80
        assert (await each.resize("8GiB"))["slots"] == 80

    asyncio.run(run())
