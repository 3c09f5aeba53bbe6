"""Experts that come and go: the same bits with any number of slots, and each read once a batch."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.scheduler.residency.expert_memory import ExpertMemory
from sterna.shm.errors import ModelReadError, WorkerLost
from sterna.workers.messages import PageIn

from ..local_engine import LocalEngine

LONG = [int(token) for token in np.random.default_rng(5).integers(300, 2000, 120)]
PROMPTS = [[1, 400, 500, 600], LONG, [1, 1200, 900]]


@pytest.fixture(scope="module")
def expected() -> object:
    return LocalEngine(streams=3).run(PROMPTS, 24)


@pytest.mark.parametrize(("resident", "workers"), [(40, 1), (20, 1), (11, 3), (10, 2)])
def test_any_number_of_slots_gives_the_same_bits(expected: object, resident: int, workers: int) -> None:
    engine = LocalEngine(streams=3, resident=resident, workers=workers)
    assert engine.run(PROMPTS, 24) == expected
    counts = engine.runner.counts
    assert counts.fetched > 0
    assert engine.lane.pages == counts.fetched
    assert counts.hits + counts.fetched == counts.distinct + resident  # the first `resident` fill the slots
    assert_consistent(engine.memory)


def test_a_long_batch_reads_each_expert_once(expected: object) -> None:
    """In 10 slots, of which each layer's batch needs up to 16 experts."""
    engine = LocalEngine(streams=1, resident=10)
    before = engine.lane.pages
    engine.run([LONG], 1)
    assert engine.runner.counts.distinct > 5 * 10
    assert engine.lane.pages - before <= engine.runner.counts.distinct


def test_slots_hold_what_the_file_says_after_any_sequence() -> None:
    """INV-1, through the whole engine: the slots' bytes are those of a fresh read."""
    engine = LocalEngine(streams=3, resident=12)
    engine.run(PROMPTS, 8)
    other = LocalEngine(streams=1)
    compared = 0
    for key in np.flatnonzero(engine.memory.slot_of >= 0):
        here, there = (each.slots.at(int(each.memory.slot_of[key])) for each in (engine, other))
        nbytes = engine.plan.slot_sizes()[0]
        assert (
            engine.slots.memory[here : here + nbytes].tobytes()
            == other.slots.memory[there : there + nbytes].tobytes()
        )
        compared += 1
    assert compared == 12


def assert_consistent(memory: ExpertMemory) -> None:
    """Slots and keys name each other, and nothing is left over."""
    held = [slot for slot in memory.slot_of.tolist() if slot >= 0]
    assert len(held) == len(set(held)) == memory.num_resident
    assert memory.num_loading == 0
    assert (memory.resident == (memory.slot_of >= 0)).all()


def test_an_expert_that_cannot_be_read_fails_the_step_and_leaves_its_slot(
    monkeypatch: pytest.MonkeyPatch, expected: object
) -> None:
    engine = LocalEngine(streams=3, resident=12)
    worker, read = engine.lane.workers[0], engine.lane.workers[0].page_in
    calls = []

    def page_in(message: PageIn) -> object:
        calls.append(message)
        if len(calls) == 3:
            raise ModelReadError("for a test")
        return read(message)

    monkeypatch.setattr(worker, "page_in", page_in)
    with pytest.raises(ModelReadError, match="for a test"):
        engine.run(PROMPTS, 4)
    while engine.memory.num_loading:
        engine.runner.take_loaded(engine.lane.collect((), (), ""))  # type: ignore[arg-type]
    assert_consistent(engine.memory)


def test_a_lost_worker_frees_what_it_was_reading() -> None:
    engine = LocalEngine(streams=1, resident=12, workers=2)
    wanted = next(key for key in range(80) if engine.memory.slot_of[key] < 0)
    slot = engine.memory.take(engine.memory.victim(wanted))
    engine.memory.loading(10**6, wanted, slot, awaited=True)
    assert engine.memory.resident[wanted]
    assert not engine.memory.ready(wanted)
    assert engine.memory.request_of(wanted) == 10**6
    engine.memory.worker_lost(1 - engine.memory.owner(wanted))
    assert engine.memory.num_loading == 1
    engine.memory.worker_lost(engine.memory.owner(wanted))
    assert engine.memory.loaded(10**6) is None
    assert engine.memory.missing([wanted]) == [wanted]
    assert_consistent(engine.memory)


def test_a_request_that_cannot_be_sent_leaves_the_slot_free(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(streams=1, resident=12)

    def page_in(*_: object, **__: object) -> int:
        raise WorkerLost("worker 0 is gone")

    monkeypatch.setattr(engine.lane, "page_in", page_in)
    with pytest.raises(WorkerLost):
        engine.run([PROMPTS[0]], 2)
    assert_consistent(engine.memory)
    monkeypatch.undo()
    assert engine.memory.missing(range(80))


def test_fewer_and_more_slots_while_it_runs(expected: object) -> None:
    engine = LocalEngine(streams=3, resident=40)
    engine.run([PROMPTS[0]], 4)
    assert engine.memory.resize([15]) == list(range(15, 40))
    assert engine.memory.num_resident == 15
    engine.run([PROMPTS[2]], 4)
    assert engine.memory.num_resident == 15
    assert engine.memory.resize([30]) == list(range(30, 40))
    engine.run([PROMPTS[1]], 4)
    assert 15 < engine.memory.num_resident <= 30
    assert_consistent(engine.memory)


def test_a_successor_finds_the_experts_in_the_arena() -> None:
    engine = LocalEngine(streams=1, resident=20)
    engine.run([PROMPTS[0]], 4)
    memory = engine.memory
    owners = {divmod(key, 16): memory.owner(key) for key in range(80)}
    again = ExpertMemory(
        engine.plan,
        engine.slots,
        [(20, *engine.plan.slot_sizes())],
        {(layer + 1, expert): worker for (layer, expert), worker in owners.items()},
        None,
    )
    assert (again.slot_of == memory.slot_of).all()
    assert again.num_resident == 20


def test_prefetching_changes_no_bit(expected: object) -> None:
    engine = LocalEngine(streams=3, resident=30, prefetch="on")
    assert engine.run(PROMPTS, 24) == expected
    assert engine.runner.counts.foreseen > 0
    meter = engine.engine._mixture.foresight.meter
    print(f"{meter.issued} foreseen, {meter.useful} of them used")
    assert 0 < meter.useful <= meter.issued <= engine.runner.counts.foreseen
    while engine.memory.num_loading:
        engine.runner.take_loaded(engine.lane.collect((), (), ""))  # type: ignore[arg-type]
    assert_consistent(engine.memory)


@pytest.mark.parametrize("resident", [10, 20])
def test_what_stays_does_not_depend_on_the_order_of_the_answers(resident: int) -> None:
    """In a quality budget the experts in memory decide what is routed, so they may not depend on the disk."""
    found = []
    for seed in range(3):
        engine = LocalEngine(streams=3, resident=resident, workers=2, prefetch="on")
        engine.lane.shuffle = np.random.default_rng(seed) if seed else None
        results = engine.run(PROMPTS, 16, epsilon=0.05)
        found.append((results, np.flatnonzero(engine.memory.resident).tolist()))
    assert found[0] == found[1] == found[2]
