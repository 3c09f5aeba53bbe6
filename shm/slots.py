"""Slots: the fixed parts of the weights arena that hold one expert each, and their headers.

    arena = [ header 0 | header 1 | ... ][ slot 0 | slot 1 | ... ]     slots start at a whole page

Experts of one size share a class of slots; slots are numbered through all classes, smallest first.

States of a header:  EMPTY -> FILLING (generation odd) -> READY (generation even) -> FILLING ...
Only the worker that owns the expert writes a slot and its header; everybody reads. A header that is
not READY, or names another expert, means: the weights are not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from .layout import align

EMPTY, FILLING, READY = 0, 1, 2

HEADER = np.dtype(
    [
        ("state", np.int32),
        ("layer", np.int32),
        ("expert", np.int32),
        ("format", np.int32),
        ("generation", np.int64),
        ("nbytes", np.int64),
        ("checksum", np.uint64),  # of the file's bytes, see `workers.paging.checksums`
        ("precision", np.int32),  # which of the layer's formats, see `workers.messages.LayerShape`
        ("reserved", np.uint8, 20),
    ]
)
assert HEADER.itemsize == 64  # noqa: S101 - one cache line each, checked once at import


SlotClasses = Sequence[tuple[int, int]]
"""(slots, bytes of each) of every class; the bytes are multiples of a page."""


class SlotTable:
    """The slots of one arena, seen from any process that maps it."""

    def __init__(self, memory: npt.NDArray[np.uint8], classes: SlotClasses) -> None:
        self.memory = memory
        self.num_slots = sum(count for count, _ in classes)
        self.headers = memory[: self.num_slots * HEADER.itemsize].view(HEADER)
        sizes = [nbytes for count, nbytes in classes for _ in range(count)]
        first = slots_at(self.num_slots)
        self._at = [first, *(first + end for end in accumulate(sizes))]
        # Plain views: reading a field of a structured element costs ten times as much.
        self._states, self._layers, self._experts = (
            self.headers[name] for name in ("state", "layer", "expert")
        )

    def at(self, slot: int) -> int:
        """Return the first byte of `slot` in the arena."""
        return self._at[slot]

    def nbytes(self, slot: int) -> int:
        """Return the size of `slot`."""
        return self._at[slot + 1] - self._at[slot]

    def begin(self, slot: int) -> None:
        """Mark `slot` as being filled; readers see it as absent from now on."""
        header = self.headers[slot]
        header["state"] = FILLING
        header["generation"] |= 1

    def publish(
        self, slot: int, *, layer: int, expert: int, precision: int, form: int, nbytes: int, checksum: int
    ) -> None:
        """Make a filled slot visible; its state is written last."""
        header = self.headers[slot]
        header["layer"], header["expert"] = layer, expert
        header["precision"], header["format"] = precision, form
        header["nbytes"], header["checksum"] = nbytes, checksum
        header["generation"] = (header["generation"] | 1) + 1
        header["state"] = READY

    def clear(self, slot: int) -> None:
        """Make `slot` empty: its expert is given up."""
        header = self.headers[slot]
        header["state"] = EMPTY
        header["generation"] = (header["generation"] | 1) + 1

    def holds(self, slot: int, layer: int, expert: int) -> bool:
        """Return whether `slot` holds that expert, complete."""
        return bool(
            self._states[slot] == READY and self._layers[slot] == layer and self._experts[slot] == expert
        )

    def num_ready(self) -> int:
        """Return how many slots hold a complete expert."""
        return int(np.count_nonzero(self.headers["state"] == READY))


def slots_at(num_slots: int) -> int:
    """Return where the first slot begins."""
    return align(num_slots * HEADER.itemsize, 4096)


def arena_nbytes(classes: SlotClasses) -> int:
    """Return the size of an arena with slots of these classes."""
    return slots_at(sum(count for count, _ in classes)) + sum(count * nbytes for count, nbytes in classes)
