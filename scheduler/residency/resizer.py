"""Fewer or more slots while the engine runs: who goes, which pages are given back, when it is done.

No clock and no socket: `ask` takes the message, `advance` is called between steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from ...shm.arena import Arena
from ...shm.errors import OutOfResources
from ...shm.slots import SlotClasses, SlotTable
from .. import messages as wire
from .expert_memory import ExpertMemory
from .policies import new_policy


class Resizer:
    """Changes how many slots of each class an `ExpertMemory` uses, one request at a time.

    The arena keeps its size: the pages of slots beyond the limits are given back to the system, and taken
    from it again before a slot is used.
    """

    def __init__(
        self,
        memory: ExpertMemory,
        slots: SlotTable,
        arena: Arena,
        classes: SlotClasses,
        limits: Sequence[int],
    ) -> None:
        """limits: what a predecessor was told last; it may have been killed before it gave all pages back."""
        self._memory = memory
        self._slots = slots
        self._arena = arena
        self._first = [0, *accumulate(count for count, _ in classes)]
        self._backed = [count for count, _ in classes]
        self._asked: wire.Resize | None = None
        self._freed = 0
        memory.resize(limits)
        self._give_back(limits)

    def ask(self, message: wire.Resize) -> None:
        """Take a request; one that is not answered yet is forgotten for it."""
        self._asked = message

    def advance(self) -> wire.Resized | None:
        """Go on with what was asked, between two steps; return the answer once it is done."""
        asked, memory = self._asked, self._memory
        if asked is None:
            return None
        try:
            self._freed -= self._take(asked.limits)
        except OutOfResources as error:
            self._asked = None
            return self._answer(asked, str(error))
        if memory.policy is None and sum(asked.limits) < memory.num_experts:
            memory.use_policy(new_policy(memory.num_experts, memory.num_layers))
        memory.resize(asked.limits)
        if memory.num_loading:
            return None  # something may still be written beyond the limits: again after the next answers
        self._freed += self._give_back(asked.limits)
        self._asked = None
        return self._answer(asked, None)

    def _answer(self, asked: wire.Resize, error: str | None) -> wire.Resized:
        freed, self._freed = self._freed, 0
        return wire.Resized(
            nonce=asked.nonce, resident_experts=self._memory.num_resident, freed_bytes=freed, error=error
        )

    def _ranges(self, low: Sequence[int], high: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield (first byte, bytes) of the slots from `low` up to `high` of each class."""
        for first, start, end in zip(self._first, low, high, strict=False):
            if start < end:
                at = self._slots.at(first + start)
                yield at, self._slots.at(first + end - 1) + self._slots.nbytes(first + end - 1) - at

    def _take(self, limits: Sequence[int]) -> int:
        """Back the slots that are new with memory; raises OutOfResources and has then taken nothing."""
        taken: list[tuple[int, int]] = []
        try:
            for at, nbytes in self._ranges(self._backed, limits):
                self._arena.restore(at, nbytes)
                taken.append((at, nbytes))
        except OutOfResources:
            for at, nbytes in taken:
                self._arena.punch(at, nbytes)
            raise
        self._backed = [max(pair) for pair in zip(self._backed, limits, strict=True)]
        return sum(nbytes for _, nbytes in taken)

    def _give_back(self, limits: Sequence[int]) -> int:
        freed = sum(self._arena.punch(at, nbytes) for at, nbytes in self._ranges(limits, self._backed))
        self._backed = list(limits)
        return freed
