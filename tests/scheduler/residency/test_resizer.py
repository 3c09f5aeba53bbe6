"""Fewer and more slots over a real arena: pages go and come back, and nothing is lost when they cannot."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from sterna.runtime.config import embedded_model
from sterna.scheduler.messages import Resize, Resized
from sterna.scheduler.model.planner import read_plan
from sterna.scheduler.residency.expert_memory import ExpertMemory
from sterna.scheduler.residency.resizer import Resizer
from sterna.shm.arena import Arena
from sterna.shm.errors import OutOfResources
from sterna.shm.slots import SlotTable, arena_nbytes
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.ownership import owners


class Stage:
    """The embedded model's memory with all experts in their slots, and a resizer over it."""

    def __init__(self) -> None:
        with GgufFile.open(embedded_model()) as file:
            self.plan = read_plan(file)
        self.classes = self.plan.all_slots()
        self.arena = Arena.create("weights", arena_nbytes(self.classes))
        self.slots = SlotTable(self.arena.bytes, self.classes)
        owned = owners(self.plan.hyper.moe_layers, 16, [1.0])
        self.memory = ExpertMemory(self.plan, self.slots, self.classes, owned, None)
        self.resizer = Resizer(self.memory, self.slots, self.arena, self.classes, [80])
        for key in self.memory.missing(range(80)):
            self.read(key)

    def close(self) -> None:
        """Leave no memfd behind: system tests look for those."""
        self.arena.close()
        self.__dict__.clear()
        gc.collect()

    def read(self, key: int) -> None:
        slot = self.memory.free_slot(key)
        if slot is None:
            slot = self.memory.take(self.memory.victim(key))
        self.memory.loading(key, key, slot, awaited=True)
        self.publish(key, slot)
        self.memory.loaded(key)

    def publish(self, key: int, slot: int) -> None:
        layer, expert = divmod(key, 16)
        at = self.slots.at(slot)
        self.arena.bytes[at : at + self.slots.nbytes(slot)] = key + 1
        self.slots.publish(
            slot, layer=layer + 1, expert=expert, precision=0, form=0, nbytes=53_248, checksum=key
        )

    @property
    def held(self) -> int:
        return os.fstat(self.arena.fd).st_blocks * 512

    def resize(self, limit: int) -> Resized:
        self.resizer.ask(Resize(nonce=limit, limits=[limit]))
        answer = self.resizer.advance()
        assert answer is not None
        return answer

    def check(self) -> None:
        """Every expert that is said to be there has its bytes."""
        for key in range(80):
            if self.memory.ready(key):
                at = self.slots.at(int(self.memory.slot_of[key]))
                assert (self.arena.bytes[at : at + 53_248] == key + 1).all()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def test_pages_go_and_come_back(stage: Stage) -> None:
    before = stage.held
    assert stage.memory.holds_all
    answer = stage.resize(30)
    assert (answer.nonce, answer.resident_experts, answer.error) == (30, 30, None)
    assert answer.freed_bytes == before - stage.held == 50 * 53_248
    assert not stage.memory.holds_all
    stage.check()
    stage.read(75)  # one gives way now
    assert stage.memory.num_resident == 30
    answer = stage.resize(50)
    assert answer.freed_bytes == -20 * 53_248
    for key in stage.memory.missing(range(80)):
        stage.read(key)
    assert (stage.memory.num_resident, stage.held) == (50, before - 30 * 53_248)
    stage.check()
    assert stage.resize(50).freed_bytes == 0
    assert stage.resizer.advance() is None


def test_it_waits_for_what_is_being_read(stage: Stage) -> None:
    stage.resize(79)
    stage.resize(80)
    (key,) = stage.memory.missing(range(80))
    slot = stage.memory.free_slot(key)
    assert slot == 79
    stage.memory.loading(7, key, slot, awaited=False)
    stage.resizer.ask(Resize(nonce=1, limits=[40]))
    assert stage.resizer.advance() is None
    assert stage.memory.num_resident == 40
    stage.publish(key, slot)
    stage.memory.loaded(7)
    answer = stage.resizer.advance()
    assert answer is not None
    assert (answer.nonce, answer.resident_experts, answer.freed_bytes) == (1, 40, 40 * 53_248)


def test_no_memory_to_grow_into_changes_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.resize(30)
    held = stage.held

    def no_space(fd: int, at: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        answer = stage.resize(60)
    assert answer.error is not None
    assert answer.error.startswith("no memory for 1.5 MiB more of the weights arena: No space left")
    assert (answer.freed_bytes, stage.held, stage.memory.num_resident) == (0, held, 30)
    assert stage.memory.missing(range(80)) == []
    assert stage.resize(60).error is None


def test_a_successor_gives_back_what_was_left(stage: Stage) -> None:
    owned = owners(stage.plan.hyper.moe_layers, 16, [1.0])
    memory = ExpertMemory(stage.plan, stage.slots, stage.classes, owned, None)
    before = stage.held
    Resizer(memory, stage.slots, stage.arena, stage.classes, [20])
    assert memory.num_resident == 20
    assert before - stage.held == 60 * 53_248


def test_punching_keeps_the_neighbours() -> None:
    arena = Arena.create("test", 16 * 4096)
    arena.bytes[:] = 7
    assert arena.punch(4096 + 1, 4096 * 3) == 4096 * 2
    assert (arena.bytes[: 2 * 4096] == 7).all()
    assert (arena.bytes[2 * 4096 : 4 * 4096] == 0).all()
    assert (arena.bytes[4 * 4096 :] == 7).all()
    assert arena.punch(4096 + 1, 4096) == 0
    arena.restore(2 * 4096, 2 * 4096)
    assert os.fstat(arena.fd).st_blocks * 512 == 16 * 4096
    with pytest.raises(OutOfResources, match="more of the test arena"):
        arena.restore(0, 17 * 4096)  # sealed: it cannot grow
    arena.close()
