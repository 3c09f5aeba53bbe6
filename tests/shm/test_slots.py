"""Slots: where they lie, and when their content counts."""

from __future__ import annotations

import os

import numpy as np
import pytest

from sterna.shm.arena import Arena
from sterna.shm.slots import EMPTY, FILLING, HEADER, READY, SlotTable, arena_nbytes, slots_at

SLOT_NBYTES = 8192


def table(num_slots: int = 5) -> SlotTable:
    return SlotTable(np.zeros(arena_nbytes([(num_slots, SLOT_NBYTES)]), np.uint8), [(num_slots, SLOT_NBYTES)])


@pytest.mark.parametrize("num_slots", [1, 5, 64, 65, 2944])
def test_slots_start_at_pages_behind_all_headers_and_fill_the_arena(num_slots: int) -> None:
    assert slots_at(num_slots) % 4096 == 0
    assert slots_at(num_slots) >= num_slots * HEADER.itemsize
    slots = table(num_slots) if num_slots < 100 else None
    if slots is not None:
        assert [slots.at(i + 1) - slots.at(i) for i in range(num_slots - 1)] == [SLOT_NBYTES] * (
            num_slots - 1
        )
        assert slots.at(0) == slots_at(num_slots)
        assert slots.at(num_slots - 1) + SLOT_NBYTES == len(slots.memory)


def test_classes_of_slots_lie_behind_each_other() -> None:
    classes = [(2, 4096), (0, 8192), (3, 12288)]
    slots = SlotTable(np.zeros(arena_nbytes(classes), np.uint8), classes)
    assert slots.num_slots == 5
    assert [slots.at(slot) - slots.at(0) for slot in range(5)] == [0, 4096, 8192, 20480, 32768]
    assert [slots.nbytes(slot) for slot in range(5)] == [4096, 4096, 12288, 12288, 12288]
    assert slots.at(4) + slots.nbytes(4) == len(slots.memory)


def test_a_cleared_slot_holds_nothing_and_is_a_new_generation() -> None:
    slots = table()
    slots.begin(1)
    slots.publish(1, layer=1, expert=1, form=0, nbytes=1, precision=0, checksum=0)
    before = int(slots.headers[1]["generation"])
    slots.clear(1)
    assert not slots.holds(1, 1, 1)
    assert slots.headers[1]["generation"] > before
    assert slots.headers[1]["generation"] % 2 == 0


def test_a_header_is_one_cache_line() -> None:
    assert HEADER.itemsize == 64


def test_fresh_memory_holds_nothing() -> None:
    """Zeroed headers name expert 0 of layer 0: they must not count."""
    slots = table()
    assert not any(slots.holds(slot, 0, 0) for slot in range(5))
    assert slots.num_ready() == 0
    assert (slots.headers["state"] == EMPTY).all()


def test_a_slot_holds_what_was_published_and_nothing_else() -> None:
    slots = table()
    slots.begin(2)
    assert slots.headers[2]["state"] == FILLING
    assert not slots.holds(2, 7, 3)
    slots.publish(2, layer=7, expert=3, precision=2, form=4, nbytes=100, checksum=2**63 + 5)
    assert slots.holds(2, 7, 3)
    assert not slots.holds(2, 7, 4)
    assert not slots.holds(2, 6, 3)
    assert not slots.holds(1, 7, 3)
    assert slots.num_ready() == 1
    header = slots.headers[2]
    assert (header["format"], header["nbytes"], header["checksum"]) == (4, 100, 2**63 + 5)
    assert header["precision"] == 2
    assert header["state"] == READY


def test_a_slot_being_refilled_is_absent_to_everybody() -> None:
    slots = table()
    reader = SlotTable(slots.memory, [(5, SLOT_NBYTES)])
    slots.begin(0)
    slots.publish(0, layer=1, expert=1, form=0, nbytes=1, precision=0, checksum=0)
    slots.begin(0)
    assert not reader.holds(0, 1, 1)
    assert reader.num_ready() == 0
    slots.publish(0, layer=1, expert=2, form=0, nbytes=1, precision=0, checksum=0)
    assert reader.holds(0, 1, 2)
    assert not reader.holds(0, 1, 1)


def test_the_generation_is_odd_while_filling_and_never_repeats() -> None:
    slots = table()
    seen = [int(slots.headers[3]["generation"])]
    for _ in range(4):
        slots.begin(3)
        seen.append(int(slots.headers[3]["generation"]))
        slots.publish(3, layer=0, expert=0, form=0, nbytes=0, precision=0, checksum=0)
        seen.append(int(slots.headers[3]["generation"]))
    assert [value % 2 for value in seen] == [0, 1] * 4 + [0]
    assert seen == sorted(set(seen))


def test_a_fill_that_was_broken_off_can_be_begun_again() -> None:
    slots = table()
    slots.begin(4)
    slots.begin(4)
    assert slots.headers[4]["generation"] % 2 == 1
    slots.publish(4, layer=2, expert=5, form=0, nbytes=0, precision=0, checksum=0)
    assert slots.headers[4]["generation"] % 2 == 0
    assert slots.holds(4, 2, 5)


def test_headers_and_slots_do_not_overlap() -> None:
    slots = table()
    slots.memory[slots.at(0) :] = 255
    assert slots.num_ready() == 0
    slots.begin(4)
    slots.publish(4, layer=-1, expert=-1, form=-1, nbytes=-1, precision=-1, checksum=2**64 - 1)
    assert (slots.memory[slots.at(0) :] == 255).all()


def test_a_slot_published_in_one_mapping_is_seen_in_another() -> None:
    arena = Arena.create("slots", arena_nbytes([(3, SLOT_NBYTES)]))
    other = Arena.attach("slots", os.dup(arena.fd))
    writer = SlotTable(arena.bytes, [(3, SLOT_NBYTES)])
    reader = SlotTable(other.bytes, [(3, SLOT_NBYTES)])
    writer.begin(1)
    writer.memory[writer.at(1)] = 42
    writer.publish(1, layer=3, expert=9, form=0, nbytes=1, precision=0, checksum=0)
    assert reader.holds(1, 3, 9)
    assert reader.memory[reader.at(1)] == 42
    arena.close()
    other.close()
