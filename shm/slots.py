"""Slots: the fixed places of the weights arena that hold one expert each, and their headers.

    arena = [ header 0 | header 1 | ... ][ slot 0 | slot 1 | ... ]     slots start at a whole page

States of a header:  EMPTY -> FILLING (generation odd) -> READY (generation even) -> FILLING ...
Only the worker that owns the expert writes a slot and its header; everybody reads. A header that is
not READY, or names another expert, means: the weights are not there.
"""

from __future__ import annotations

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
        ("crc32", np.uint32),  # of the file's bytes, gate then up then down
        ("reserved", np.uint8, 28),
    ]
)
assert HEADER.itemsize == 64  # noqa: S101 - one cache line each, checked once at import


class SlotTable:
    """The slots of one arena, seen from any process that maps it."""

    def __init__(self, memory: npt.NDArray[np.uint8], num_slots: int, slot_nbytes: int) -> None:
        self.memory = memory
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self.headers = memory[: num_slots * HEADER.itemsize].view(HEADER)
        self._first = slots_at(num_slots)
        # Plain views: reading a field of a structured element costs ten times as much.
        self._states, self._layers, self._experts = (
            self.headers[name] for name in ("state", "layer", "expert")
        )

    def at(self, slot: int) -> int:
        """Return the first byte of `slot` in the arena."""
        return self._first + slot * self.slot_nbytes

    def begin(self, slot: int) -> None:
        """Mark `slot` as being filled; readers see it as absent from now on."""
        header = self.headers[slot]
        header["state"] = FILLING
        header["generation"] |= 1

    def publish(self, slot: int, *, layer: int, expert: int, form: int, nbytes: int, crc32: int) -> None:
        """Make a filled slot visible; its state is written last."""
        header = self.headers[slot]
        header["layer"], header["expert"], header["format"] = layer, expert, form
        header["nbytes"], header["crc32"] = nbytes, crc32
        header["generation"] = (header["generation"] | 1) + 1
        header["state"] = READY

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


def arena_nbytes(num_slots: int, slot_nbytes: int) -> int:
    """Return the size of an arena with `num_slots` slots of `slot_nbytes`."""
    return slots_at(num_slots) + num_slots * slot_nbytes
