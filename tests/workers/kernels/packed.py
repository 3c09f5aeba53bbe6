"""Packs matrices into an arena and multiplies with them through the kernels; no test in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sterna.workers.checkpoint.held.formats import Format, activation_kind
from sterna.workers.kernels.layers.activations import quantize_rows
from sterna.workers.kernels.packing import repack
from sterna.workers.kernels.products import floating, q8, ternary
from sterna.workers.kernels.products import table as products
from sterna.workers.kernels.scratch import product_nbytes

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

POISON = np.uint8(0xA5)  # what the arena holds around the matrix


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A matrix in an arena; `form` is one of `products`' formats."""

    form: int
    arena: U8
    codes_at: int
    scales_at: int
    rows: int
    columns: int

    @property
    def entry(self) -> tuple[int, int, int, int, int]:
        """How the kernels of `ffn` name it."""
        block = int(activation_kind(Format(self.form)))
        return products.product(self.form), self.form, self.codes_at, self.scales_at, block

    @property
    def groups(self) -> int:
        return -(-self.rows // 16)


def pack_ternary(codes: U8, scales: F32, at: int = 0) -> Packed:
    """Pack codes 0..2 (N, K) with scales (N, K/256), scales lying right behind the codes."""
    rows, columns = codes.shape
    scales_at = at + ternary.codes_nbytes(rows, columns)
    end = scales_at + ternary.scales_nbytes(rows, columns)
    arena = np.full(end + 64, POISON)
    bits = np.ascontiguousarray(scales.astype(np.float16)).view(np.uint16)
    ternary.pack(np.ascontiguousarray(codes), bits, arena, at, scales_at)
    assert (arena[:at] == POISON).all()
    assert (arena[end:] == POISON).all()
    return Packed(
        form=products.TL1, arena=arena, codes_at=at, scales_at=scales_at, rows=rows, columns=columns
    )


def q8_blocks(values: I8, scales: F32) -> U8:
    """Return the file's bytes of a Q8_0 matrix: per block of 32 a float16 scale, then 32 int8."""
    rows, columns = values.shape
    blocks = np.zeros((rows, columns // 32, 34), np.uint8)
    blocks[:, :, :2] = scales.astype(np.float16)[:, :, None].view(np.uint8)
    blocks[:, :, 2:] = values.reshape(rows, -1, 32).view(np.uint8)
    return blocks.reshape(-1)


def read_only(array: npt.NDArray[np.generic]) -> U8:
    """Return the bytes of `array` as a file gives them; numba compiles no further variant for these."""
    return np.frombuffer(array.tobytes(), np.uint8)


def pack_q8(values: I8, scales: F32, at: int = 0) -> Packed:
    """Pack int8 weights (N, K) with scales (N, K/32)."""
    rows, columns = values.shape
    scales_at = at + q8.codes_nbytes(rows, columns)
    end = scales_at + q8.scales_nbytes(rows, columns)
    arena = np.full(end + 64, POISON)
    repack.q8_0(read_only(q8_blocks(values, scales)), rows, columns, arena, at, scales_at)
    assert (arena[:at] == POISON).all()
    assert (arena[end:] == POISON).all()
    return Packed(form=products.Q8, arena=arena, codes_at=at, scales_at=scales_at, rows=rows, columns=columns)


def pack_floating(form: int, weights: F32, at: int = 0) -> tuple[Packed, F32]:
    """Pack (N, K) weights as F32, F16 or BF16; also return the values they have there."""
    rows, columns = weights.shape
    if form == products.F16:
        stored: npt.NDArray[np.generic] = weights.astype(np.float16)
        values = stored.astype(np.float32)
    elif form == products.BF16:
        stored = (np.ascontiguousarray(weights).view(np.uint32) >> 16).astype(np.uint16)
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored, values = weights, weights
    width = 4 if form == products.F32 else 2
    end = at + floating.nbytes(rows, columns, width)
    arena = np.full(end + 64, POISON)
    repack.floats(read_only(stored), rows, columns, width, arena, at)
    assert (arena[:at] == POISON).all()
    assert (arena[end:] == POISON).all()
    return Packed(form=form, arena=arena, codes_at=at, scales_at=0, rows=rows, columns=columns), values


@dataclass(frozen=True)
class Tokens:
    """Activations as a kernel reads them."""

    x: F32
    q: I8
    scales: F32
    sums: I32

    @classmethod
    def exact(cls, q: I8, scales: F32, block: int) -> Tokens:
        """Take int8 rows and scales as they are."""
        sums = q.astype(np.int32).reshape(len(q), -1, block).sum(axis=2, dtype=np.int32)
        return cls(np.zeros((1, 1), np.float32), q, scales, sums)

    @classmethod
    def quantized(cls, x: F32, block: int) -> Tokens:
        """Quantise float rows with the kernel."""
        q = np.zeros(x.shape, np.int8)
        scales = np.zeros((len(x), x.shape[1] // block), np.float32)
        sums = np.zeros(scales.shape, np.int32)
        quantize_rows(x, 0, len(x), x.shape[1], block, q, scales, sums)
        return cls(x, q, scales, sums)

    @classmethod
    def floats(cls, x: F32) -> Tokens:
        """Take float32 rows."""
        one = np.zeros((1, 1), np.float32)
        return cls(x, one.astype(np.int8), one, one.astype(np.int32))


class Scratch:
    """Scratch of exactly the size that is asked for, poisoned within and behind."""

    def __init__(self, columns: int, tokens: int) -> None:
        size = product_nbytes(columns, tokens)
        self._all = np.full(size + 64, POISON)
        self.array = self._all[:size]

    def check(self) -> None:
        """Assert that nothing was written behind it."""
        assert (self._all[len(self.array) :] == POISON).all()


def multiply(matrix: Packed, tokens: Tokens, rows: Sequence[int]) -> F32:
    """Return W @ x[rows[t]] as (len(rows), N) through the format's product.

    Checks that nothing outside the output and the scratch was written.
    """
    wide, gap, start = matrix.groups * 16, 5, 3
    out = np.full(start + len(rows) * (wide + gap) + 16, np.float32(7.0))
    scratch = Scratch(matrix.columns, len(rows))
    products.kernel_of(matrix.form)(
        matrix.form, matrix.arena, matrix.codes_at, matrix.scales_at, matrix.groups, matrix.columns,
        tokens.x, tokens.q, tokens.scales, tokens.sums, np.array(rows, np.int32), len(rows),
        scratch.array, out.reshape(1, -1), start, wide + gap,
    )  # fmt: skip
    scratch.check()
    table = out[start : start + len(rows) * (wide + gap)].reshape(len(rows), wide + gap)
    assert (out[:start] == 7.0).all()
    assert (out[start + table.size :] == 7.0).all()
    assert (table[:, wide:] == 7.0).all()
    return table[:, : matrix.rows].copy()


def padding_of(matrix: Packed, tokens: Tokens) -> F32:
    """Return what the rows beyond N give for every token."""
    wide, count = matrix.groups * 16, max(len(tokens.q), len(tokens.x))
    out = np.full((count, wide), np.float32(7.0))
    scratch = Scratch(matrix.columns, count)
    products.kernel_of(matrix.form)(
        matrix.form, matrix.arena, matrix.codes_at, matrix.scales_at, matrix.groups, matrix.columns,
        tokens.x, tokens.q, tokens.scales, tokens.sums, np.arange(count, dtype=np.int32), count,
        scratch.array, out, 0, wide,
    )  # fmt: skip
    scratch.check()
    return out[:, matrix.rows :]


def same_bits(a: F32, b: F32) -> bool:
    """Return whether two float32 arrays agree bit for bit (NaN equals the same NaN)."""
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())
