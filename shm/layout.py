"""Layout: which array lies where in an arena. Pure arithmetic; both sides compute the same one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64  # a cache line, and the widest vector load


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One array of a layout: `shape` elements of `dtype` (any numpy dtype, structured too)."""

    name: str
    dtype: npt.DTypeLike
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes without padding."""
        size = np.dtype(self.dtype).itemsize
        for extent in self.shape:
            size *= extent
        return size


class Layout:
    """Fields one after the other, each at a multiple of 64 bytes."""

    def __init__(self, fields: Iterable[Field]) -> None:
        self.fields = {field.name: field for field in fields}
        self.offsets: dict[str, int] = {}
        offset = 0
        for field in self.fields.values():
            self.offsets[field.name] = offset
            offset += align(field.nbytes)
        self.nbytes = offset

    def view(self, memory: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.generic]:
        """Return the array `name` over `memory` (uint8, at least `nbytes` long), without a copy."""
        field = self.fields[name]
        start = self.offsets[name]
        flat = memory[start : start + field.nbytes].view(field.dtype)
        return flat.reshape(field.shape)


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """Round `nbytes` up to a multiple of `to` (a power of two)."""
    return (nbytes + to - 1) & ~(to - 1)
