"""Kills loaders at random moments while looking at every slot; run by test_paging, no test in here."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np

from sterna.runtime.config import embedded_model
from sterna.shm.slots import FILLING, READY
from sterna.workers.messages import PageIn

from ..expert_bench import Bench, Bytes, answers

SLOTS = 5
EXPERTS = 12


def load_for_ever(bench: Bench, seed: int) -> None:
    """Fill random slots with random experts until killed."""
    choice = random.Random(seed)
    pager = bench.pager(choice.choice((1, 2)), direct=choice.random() < 0.5)
    while True:
        slots = choice.sample(range(SLOTS), 3)
        for slot, expert in zip(slots, choice.sample(range(EXPERTS), 3), strict=True):
            pager.submit(PageIn(seq=slot, page=bench.page(1, expert, slot)))
        answers(pager, 3)


def look(bench: Bench, packed: list[Bytes], slot: int) -> bool:
    """Compare a slot that says it is complete; return whether it was so all the while."""
    headers = bench.slots.headers
    before = headers[slot].copy()
    if before["state"] != READY:
        return False
    contents = bench.contents(slot)
    if headers[slot] != before:
        return False
    expert = int(before["expert"])
    assert (int(before["layer"]), int(before["generation"]) % 2) == (1, 0), before
    assert np.array_equal(contents, packed[expert]), f"slot {slot} says that it holds expert {expert}"
    return True


def main(seconds: float) -> None:
    """Kill loaders for `seconds`; fails on the first slot whose bytes are not those of its header."""
    bench = Bench(Path(embedded_model()), slots=SLOTS)
    packed = [bench.packed(bench.page(1, expert, 0)) for expert in range(EXPERTS)]
    choice = random.Random(1)
    kills = looked = halves = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        child = os.fork()
        if child == 0:
            try:
                load_for_ever(bench, kills)
            finally:
                os._exit(3)
        moment = time.monotonic() + choice.uniform(0.001, 0.08)
        try:
            while time.monotonic() < moment:
                looked += look(bench, packed, choice.randrange(SLOTS))
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the loader ended by itself: {status}"
        kills += 1
        halves += int((bench.slots.headers["state"] == FILLING).sum())
        looked += sum(look(bench, packed, slot) for slot in range(SLOTS))
    assert kills >= 10, kills
    assert looked > kills, looked
    assert halves > 0, "no loader died while it loaded"
    print(f"{kills} kills, {halves} slots left half full, {looked} complete ones compared")
