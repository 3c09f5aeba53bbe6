"""A self-test at every start: each kernel against plain integer arithmetic, on this CPU.

A miscompiled kernel, a CPU that lies about its features or a stale cache then ends the start with an
error instead of answering nonsense. Worst inputs included: all codes 2, activations of -127 and 127.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...shm.errors import InternalError
from . import floating, q8, ternary
from .activations import QuantizedRows, quantize_rows
from .ffn import BF16, F16, F32, Q8, TL1, multiply, scratch_nbytes
from .target import TARGET

ROWS, COLUMNS, TOKENS = 40, 512, 11  # an odd number of groups, one tile and three single tokens


def run() -> None:
    """Run all checks; raises InternalError naming the kernel and the target that gave a wrong answer."""
    random = np.random.default_rng(20240806)
    for worst in (False, True):
        q = random.integers(-127, 128, (TOKENS, COLUMNS)).astype(np.int8)
        if worst:
            q[:] = np.where(random.integers(0, 2, COLUMNS), 127, -127)
        _check_ternary(random, q, worst)
        _check_q8(random, q, worst)
    _check_floats(random)
    _check_quantize(random)


def _check_ternary(random: np.random.Generator, q: npt.NDArray[np.int8], worst: bool) -> None:
    codes = random.integers(0, 3, (ROWS, COLUMNS)).astype(np.uint8)
    if worst:
        codes[:] = 2
    ones = np.full((ROWS, COLUMNS // 256), np.float16(1.0))
    w = np.zeros(64 * 1024, np.uint8)
    ternary.pack(codes, ones.view(np.uint16), w, 0, 32 * 1024)
    expected = q.astype(np.int64) @ (codes.astype(np.int64) - 1).T
    _compare("ternary", TL1, w, 32 * 1024, q, 256, expected)


def _check_q8(random: np.random.Generator, q: npt.NDArray[np.int8], worst: bool) -> None:
    weights = random.integers(-127, 128, (ROWS, COLUMNS)).astype(np.int8)
    if worst:
        weights[:] = 127
    blocks = np.zeros((ROWS, COLUMNS // 32, 34), np.uint8)
    # A scale of 2^-10 keeps every partial sum an exact float32.
    blocks[:, :, :2] = np.array([2.0**-10], np.float16).view(np.uint8)
    blocks[:, :, 2:] = weights.view(np.uint8).reshape(ROWS, COLUMNS // 32, 32)
    w = np.zeros(64 * 1024, np.uint8)
    q8.pack(blocks.reshape(-1), ROWS, COLUMNS, w, 0, 32 * 1024)
    exact = (q.astype(np.int64) @ weights.astype(np.int64).T) * 2.0**-10
    _compare("8-bit", Q8, w, 32 * 1024, q, 32, exact)


def _compare(
    name: str,
    form: int,
    w: npt.NDArray[np.uint8],
    scales_at: int,
    q: npt.NDArray[np.int8],
    block: int,
    expected: npt.NDArray[np.generic],
) -> None:
    """Multiply with scales of 1 and require the exact result."""
    scales = np.ones((TOKENS, COLUMNS // block), np.float32)
    sums = q.reshape(TOKENS, -1, block).sum(axis=2, dtype=np.int32)
    x = np.zeros((1, 1), np.float32)
    _require(name, form, w, scales_at, x, q, scales, sums, expected)


def _require(
    name: str,
    form: int,
    w: npt.NDArray[np.uint8],
    scales_at: int,
    x: npt.NDArray[np.float32],
    q: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    sums: npt.NDArray[np.int32],
    expected: npt.NDArray[np.generic],
) -> None:
    groups = -(-ROWS // 16)
    out = np.zeros((TOKENS, groups * 16), np.float32)
    scratch = np.zeros(scratch_nbytes(COLUMNS, TOKENS), np.uint8)
    rows = np.arange(TOKENS, dtype=np.int32)
    multiply(
        form, w, 0, scales_at, groups, COLUMNS, x, q, scales, sums, rows, TOKENS, scratch, out, 0, groups * 16
    )
    wrong = np.argwhere(out[:, :ROWS] != expected)
    if len(wrong):
        token, row = wrong[0].tolist()
        raise InternalError(
            f"self-test: the {name} kernel for {TARGET} gives {out[token, row]!r} instead of "
            f"{expected[token, row]!r} (row {row}, token {token}); set STERNA_KERNEL_TARGET=generic"
        )


def _check_floats(random: np.random.Generator) -> None:
    """Small integers are exact in every float type, and so is their sum."""
    weights = random.integers(-8, 9, (ROWS, COLUMNS)).astype(np.float32)
    x = random.integers(-8, 9, (TOKENS, COLUMNS)).astype(np.float32)
    expected = x.astype(np.int64) @ weights.astype(np.int64).T
    forms: dict[int, npt.NDArray[np.generic]] = {
        F32: weights,
        F16: weights.astype(np.float16),
        BF16: (weights.view(np.uint32) >> 16).astype(np.uint16),
    }
    q, ones, sums = np.zeros((1, 1), np.int8), np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32)
    for form, stored in forms.items():
        width = stored.itemsize
        w = np.zeros(48 * COLUMNS * width, np.uint8)
        raw = np.frombuffer(stored.tobytes(), np.uint8)
        floating.pack(raw, ROWS, COLUMNS, width, w, 0)
        _require(f"float (format {form})", form, w, 0, x, q, ones, sums, expected)


def _check_quantize(random: np.random.Generator) -> None:
    x = random.integers(-127, 128, (TOKENS, COLUMNS)).astype(np.float32)
    x[:, ::32] = 127.0
    for block in (32, 256):
        rows = QuantizedRows.allocate(TOKENS, COLUMNS, block)
        quantize_rows(x, TOKENS, COLUMNS, block, rows.q, rows.scales, rows.sums)
        exact = x.astype(np.int32)
        sums = exact.reshape(TOKENS, -1, block).sum(axis=2)
        if not (
            np.array_equal(rows.q, exact) and np.array_equal(rows.sums, sums) and (rows.scales == 1.0).all()
        ):
            raise InternalError(f"self-test: quantising activations by {block} is wrong on {TARGET}")
