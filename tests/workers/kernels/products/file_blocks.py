"""Random matrices of the file formats, packed and multiplied; no test in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from sterna.workers.checkpoint.held.formats import Format, MatrixShape, activation_kind
from sterna.workers.checkpoint.held.packing import pack_matrix
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME
from sterna.workers.kernels.layers.activations import quantize_rows
from sterna.workers.kernels.products import table as products
from sterna.workers.kernels.scratch import product_nbytes

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

FORMATS = ("Q4_0", "IQ4_NL", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Where a block's float16 scales lie.
SCALES_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ2_XXS": (0,),
    "IQ3_S": (0,),
}  # fmt: skip
POISON = np.uint8(0xA5)


def random_blocks(name: str, rows: int, columns: int, seed: int, size: float = 0.01) -> U8:
    """Return the bytes of a matrix, (rows, row bytes): any codes, scales up to `size` of either sign."""
    rng = np.random.default_rng(seed)
    file_type = TYPES_BY_NAME[name]
    count = rows * columns // file_type.block_elements
    blocks = rng.integers(0, 256, (count, file_type.block_bytes), np.uint8)
    for at in SCALES_AT.get(name, ()):
        scales = rng.uniform(-size, size, (count, 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(112, 122, count)
    return blocks.reshape(rows, -1)


def ternary_blocks(name: str, values: F32) -> U8:
    """Return values -s, 0, s (s float16, one for each 256 columns) as bytes of another type, exactly.

    Every scale is 1 and every minimum 1 or 0; for IQ4_NL, which has no three such values, -127, 1, 113.
    """
    file_type = TYPES_BY_NAME[name]
    scales = np.abs(values.reshape(-1, 256)).max(axis=1, keepdims=True).astype(np.float16)
    trits = np.sign(values).astype(np.int8).reshape(len(scales), 256)
    if name in ("Q4_0", "IQ4_NL"):
        codes = np.array([7, 8, 9] if name == "Q4_0" else [0, 8, 15], np.uint8)[trits + 1].reshape(-1, 2, 16)
        repeated = (scales / (1 if name == "Q4_0" else 113)).astype(np.float16).repeat(8, axis=0)
        return np.concatenate((repeated.view(np.uint8), codes[:, 0] | (codes[:, 1] << 4)), axis=1)
    if name == "Q5_0":
        codes = (trits + 16).astype(np.uint8).reshape(-1, 2, 16)
        fifths = np.packbits(codes.reshape(-1, 32) >> 4, axis=1, bitorder="little")
        nibbles = (codes[:, 0] & 15) | (codes[:, 1] << 4)
        return np.concatenate((scales.repeat(8, axis=0).view(np.uint8), fifths, nibbles), axis=1)
    blocks = np.zeros((len(scales), file_type.block_bytes), np.uint8)
    for at in SCALES_AT[name]:
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if name in ("Q4_K", "Q5_K"):
        blocks[:, 4:12], blocks[:, 12:16] = 1, 0x11
        codes = (trits + 1).astype(np.uint8).reshape(-1, 4, 2, 32)
        blocks[:, -128:] = (codes[:, :, 0] | (codes[:, :, 1] << 4)).reshape(-1, 128)
    elif name == "Q6_K":
        codes = (trits + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
        low, high = codes & 15, codes >> 4
        blocks[:, :128] = (low[:, :, :2] | (low[:, :, 2:] << 4)).reshape(-1, 128)
        blocks[:, 128:192] = np.bitwise_or.reduce(
            high << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2
        ).reshape(-1, 64)
        blocks[:, 192:208] = 1
    else:
        offset = 1 if name == "Q2_K" else 4
        codes = (trits + offset).astype(np.uint8).reshape(-1, 2, 4, 32)
        shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
        low = np.bitwise_or.reduce((codes & 3) << shifts, axis=2).reshape(-1, 64)
        if name == "Q2_K":
            blocks[:, :16], blocks[:, 16:80] = 0x11, low
        else:
            bits = (codes >> 2).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
            blocks[:, :32], blocks[:, 32:96] = np.bitwise_or.reduce(bits, axis=1), low
            blocks[:, 96:104], blocks[:, 104:108] = 0x11, 0xAA  # 33 - 32, in four and two bits
    return blocks


@dataclass(frozen=True, slots=True)
class Tokens:
    """Quantised activations, and what they stand for in float64."""

    q: npt.NDArray[np.int8]
    scales: F32
    sums: npt.NDArray[np.int32]
    values: npt.NDArray[np.float64]


def quantized(form: Format, count: int, columns: int, seed: int) -> Tokens:
    """Return random activations as `form` reads them, with extreme rows among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, columns)).astype(np.float32)
    x[0] = np.where(rng.integers(0, 2, columns), 1.0, -1.0)
    x[count // 2] = 3.0
    block = int(activation_kind(form))
    q = np.zeros(x.shape, np.int8)
    scales = np.zeros((count, columns // block), np.float32)
    sums = np.zeros(scales.shape, np.int32)
    quantize_rows(x, 0, count, columns, block, q, scales, sums)
    values = (q.reshape(count, -1, block) * scales[:, :, None].astype(np.float64)).reshape(count, -1)
    return Tokens(q, scales, sums, values)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix in an arena at an odd offset, and its values as the gguf package reads them."""

    shape: MatrixShape
    arena: U8
    at: int
    values: F32

    @classmethod
    def pack(cls, name: str, raw: U8, rows: int, columns: int, at: int = 64) -> Matrix:
        """Pack the file's bytes; checks that nothing outside the matrix is written."""
        shape = MatrixShape(form=Format[name], rows=rows, columns=columns)
        arena = np.full(at + shape.nbytes + 64, POISON)
        contents = np.frombuffer(raw.tobytes(), np.uint8)
        pack_matrix(contents, TYPES_BY_NAME[name], shape, arena, at)
        assert (arena[:at] == POISON).all()
        assert (arena[at + shape.nbytes :] == POISON).all()
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, GGMLQuantizationType[name])
        return cls(shape, arena, at, values.reshape(rows, columns))

    @classmethod
    def random(
        cls, name: str, rows: int, columns: int, seed: int, at: int = 64, size: float = 0.01
    ) -> Matrix:
        """Pack random blocks."""
        return cls.pack(name, random_blocks(name, rows, columns, seed, size), rows, columns, at)

    def multiply(self, tokens: Tokens, rows: Sequence[int]) -> F32:
        """Return W @ x[rows[t]] as (len(rows), N); checks padding rows and the surroundings."""
        wide, gap, start = self.shape.groups * 16, 5, 3
        out = np.full((1, start + len(rows) * (wide + gap) + 16), np.float32(7.0))
        scratch = np.full(product_nbytes(self.shape.columns, len(rows)) + 64, POISON)
        codes_at, scales_at = self.shape.offsets(self.at)
        products.kernel_of(self.shape.form)(
            int(self.shape.form), self.arena, codes_at, scales_at, self.shape.groups, self.shape.columns,
            np.zeros((1, 1), np.float32), tokens.q, tokens.scales, tokens.sums, np.array(rows, np.int32),
            len(rows), scratch, out, start, wide + gap,
        )  # fmt: skip
        assert (scratch[-64:] == POISON).all()
        table = out[0, start : start + len(rows) * (wide + gap)].reshape(len(rows), wide + gap)
        assert (out[0, :start] == 7.0).all()
        assert (out[0, start + table.size :] == 7.0).all()
        assert (table[:, wide:] == 7.0).all()
        sound = ~np.isnan(tokens.scales[list(rows)]).any(axis=1)
        assert (table[sound, self.shape.rows : wide] == 0.0).all()
        return table[:, : self.shape.rows].copy()
