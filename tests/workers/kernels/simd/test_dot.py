"""The dot products of this target against integers, at the ends of what their operands may be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from sterna.workers.kernels.simd.dot import OFFSET_IN_DOT, SMALL_CODES, dot_offset, dot_unsigned
from sterna.workers.kernels.simd.ops import broadcast_dword, load_bytes, load_i32, store_i32

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]


@njit
def _unsigned(acc: I32, w: U8, a: U8, out: I32) -> None:
    store_i32(out, 0, dot_unsigned(load_i32(acc, 0), load_bytes(w, 0), broadcast_dword(a, 0)))


@njit
def _offset(acc: I32, w: U8, a: U8, out: I32) -> None:
    store_i32(out, 0, dot_offset(load_i32(acc, 0), load_bytes(w, 0), broadcast_dword(a, 0)))


def through(kernel: object, w: npt.NDArray[np.int64], a: npt.NDArray[np.int64], acc: I32) -> I32:
    out = np.zeros(16, np.int32)
    kernel(acc, w.astype(np.uint8).ravel(), a.astype(np.int8).view(np.uint8), out)  # type: ignore[operator]
    return out


def operands(low: int, high: int, least: int) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Return weights (16, 4) from low..high and activations (4,) from least..127, random and all ends."""
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(low, high + 1, (16, 4)), rng.integers(least, 128, 4)) for _ in range(50)]
    ends = [(np.full((16, 4), w), np.full(4, a)) for w in (low, high) for a in (least, 0, 127)]
    return pairs + ends


def test_unsigned_dots_are_exact() -> None:
    acc = np.arange(-8, 8, dtype=np.int32) * 1_000_003
    for w, a in operands(0, 63 if SMALL_CODES else 255, -128):
        assert (through(_unsigned, w, a, acc) == acc + w @ a).all()


def test_offset_dots_are_exact_but_for_the_offset_where_it_is_said() -> None:
    acc = np.arange(-8, 8, dtype=np.int32) * 1_000_003
    for w, a in operands(-127, 127, -127):
        extra = 0 if OFFSET_IN_DOT else 128 * a.sum()
        assert (through(_offset, w + 128, a, acc) == acc + w @ a + extra).all()
