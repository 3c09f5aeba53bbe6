"""Reading experts into free slots when a worker comes: at the start, and for what its predecessor left.

No socket, no clock, and it never waits: `advance` sends what may be sent, `answered` takes what has come.
Between both the scheduler goes on with everything else. What cannot be read is left out: whoever needs it
later asks again, and is told why.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..shm.errors import WorkerLost
from .experts.runner import ExpertRunner

READING = 16  # experts that each worker is asked for at a time


class SlotFiller:
    """Fills the slots of an `ExpertRunner`'s memory in a given order of keys."""

    def __init__(self, runner: ExpertRunner, order: Sequence[int]) -> None:
        self._runner = runner
        self._order = order
        self._peers: dict[int, int] = {}  # worker: the incarnation whose slots are to be filled
        self._waiting: set[int] = set()  # workers that were not yet said to be filled
        self._left: list[int] = []
        self._reading: dict[int, int] = {}  # request: worker
        self.total = 0
        """Experts to be read since the filler was last idle."""

    @property
    def requests(self) -> tuple[int, ...]:
        """Reads that have no answer yet."""
        return tuple(self._reading)

    @property
    def done(self) -> int:
        """How many of `total` have come to their end."""
        return self.total - len(self._left) - len(self._reading)

    def begin(self, worker: int, peer: int) -> None:
        """Fill for a new worker, while others may be filled too."""
        done = self.done if self._waiting else 0
        self._peers[worker] = peer
        self._waiting.add(worker)
        memory = self._runner.memory
        self._left = [key for key in memory.missing(self._order) if memory.owner(key) in self._peers]
        self.total = done + len(self._left) + len(self._reading)

    def left(self, worker: int) -> None:
        """Note that a worker is gone: nothing comes any more of what it was asked for."""
        self._peers.pop(worker, None)
        self._waiting.discard(worker)
        self._reading = {request: by for request, by in self._reading.items() if by != worker}
        self._left = [key for key in self._left if self._runner.memory.owner(key) != worker]

    def advance(self) -> bool:
        """Ask for the next experts, as many as workers may be asked for at a time; return whether it did."""
        memory, asked = self._runner.memory, False
        while self._left and len(self._reading) < READING * len(self._peers):
            key = self._left.pop(0)
            if memory.slot_of[key] >= 0 or (slot := memory.free_slot(key)) is None:
                continue  # a step has read it meanwhile, or there are fewer slots than there were
            asked = True
            try:
                self._reading[self._runner.read(key, slot, urgent=True)] = memory.owner(key)
            except WorkerLost:
                break  # the lane will say that it left, and `left` drop its keys
        return asked

    def answered(self, request: int) -> bool:
        """Note that a read has ended, well or not; return whether it was one of these."""
        return self._reading.pop(request, None) is not None

    def filled(self) -> tuple[int, ...]:
        """Return, once, the peers for which all is read that can be."""
        if self._left or self._reading:
            return ()
        peers = tuple(self._peers[worker] for worker in sorted(self._waiting))
        self._waiting.clear()
        return peers
