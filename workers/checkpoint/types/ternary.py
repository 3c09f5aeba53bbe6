"""Ternary file types beyond ggml's TQ1_0 and TQ2_0: their sizes, and readers that give codes and scales.

A code is weight + 1. Types whose rows are whole blocks with a float16 scale are read block by block
(`CODE_READERS`); types that hold scales per row or per tensor, or mix rows, as whole matrices
(`MATRICES`). Two projects use some type ids for different things; `types` says which, and the file's
reader decides by the size. Not here: BitNet's tables-of-sums types (`bitnet_types`), ggml's own types
(`types`), packing into an arena (`kernels.repack`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from ....shm.errors import ModelFileError
from . import bitnet
from .bitnet import Tiling

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Scales: TypeAlias = npt.NDArray[np.float16] | npt.NDArray[np.float32]

PER_TENSOR: Final = 0
TL1_BLOCK: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TernaryMatrix:
    """A ternary matrix as its file holds it; a weight is (code - 1) * scale."""

    codes: Bytes
    """uint8 (rows, columns) of 0, 1, 2."""
    scales: Scales
    """As stored: float16 (rows, columns / group) where `group` columns share one; float32 (rows, 1) where
    group is the number of columns; float32 (1, 1) where group is PER_TENSOR."""
    group: int

    def block_scales(self) -> npt.NDArray[np.float16] | None:
        """Return float16 (rows, columns / 256) for the arena format TL1, bit for bit, if that is exact.

        Scales of 64 or 128 columns qualify only where all of a block of 256 are the same bits. Where
        None is returned, `row_scales` has the answer, or the matrix can only be held as float16 values.
        """
        rows, columns = self.codes.shape
        if self.scales.dtype != np.float16 or self.group > TL1_BLOCK or columns % TL1_BLOCK:
            return None
        bits = np.ascontiguousarray(self.scales).view(np.uint16)
        bits = bits.reshape(rows, columns // TL1_BLOCK, TL1_BLOCK // self.group)
        if (bits != bits[:, :, :1]).any():
            return None
        return np.ascontiguousarray(bits[:, :, 0]).view(np.float16)

    def row_scales(self) -> Floats | None:
        """Return float32 (rows,) for the arena format with one scale per row; None if there are several."""
        if self.scales.dtype != np.float32:
            return None
        return np.ascontiguousarray(np.broadcast_to(self.scales[:, 0], (len(self.codes),)), np.float32)

    def values(self) -> Floats:
        """Return the weights as float32 (rows, columns), each product rounded once."""
        rows, columns = self.codes.shape
        weights: Floats = self.codes.astype(np.float32)
        weights -= np.float32(1)
        wide = self.scales.astype(np.float32)
        shared = weights.reshape(rows if wide.size > 1 else 1, wide.shape[1], -1)
        shared *= wide[:, :, np.newaxis]
        return weights.reshape(rows, columns)


# uint8 (blocks, block_bytes) -> codes uint8 (blocks, block_elements), scales float32 (blocks,)
CodeReader: TypeAlias = Callable[[Bytes], tuple[Bytes, Floats]]
# (bytes, rows, columns, tiling) -> matrix; the size has been checked, codes of 3 have not
MatrixReader: TypeAlias = Callable[[Bytes, int, int, Tiling | None], TernaryMatrix]
# shape -> bytes; ModelFileError for a shape that the type cannot have
Measure: TypeAlias = Callable[[tuple[int, ...]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixType:
    """How a type that is no sequence of equal blocks is measured and read."""

    measure: Measure
    read: MatrixReader
    has_slices: bool = True  # whether a stack of matrices is their bytes one after the other


def digits(packed: Bytes, count: int) -> Bytes:
    """Return the first `count` base-3 digits of each byte: (blocks, n) -> (blocks, count * n).

    A byte is ceil(v * 256 / 243) for the 5-digit v: times 3^k mod 256 it starts with digit k.
    """
    powers = np.array([1, 3, 9, 27, 81][:count], np.uint8).reshape(1, count, 1)
    shifted = packed[:, np.newaxis, :] * powers  # wraps in 8 bits by design
    found = (shifted.astype(np.uint16) * np.uint16(3)) >> np.uint16(8)
    return found.astype(np.uint8).reshape(len(packed), -1)


def _fields(packed: Bytes, shifts: tuple[int, ...] = (0, 2, 4, 6)) -> Bytes:
    """Return the two-bit fields of each byte on a new last axis, in the order of `shifts`."""
    return (packed[..., np.newaxis] >> np.array(shifts, np.uint8)) & np.uint8(3)


def _halves(packed: Bytes) -> Floats:
    """Return float16 scales, (blocks, 2) bytes, as float32 (blocks,)."""
    return np.ascontiguousarray(packed).view("<f2").astype(np.float32)[:, 0]


def _read_scale_first(blocks: Bytes) -> tuple[Bytes, Floats]:
    # Q2_0, PQ2_0: float16, then bits 2i, 2i+1 of byte b hold element 4b + i.
    return _fields(blocks[:, 2:]).reshape(len(blocks), -1), _halves(blocks[:, :2])


def _read_t158(blocks: Bytes) -> tuple[Bytes, Floats]:
    # The same order, but 256 elements and the scale last.
    return _fields(blocks[:, :64]).reshape(len(blocks), -1), _halves(blocks[:, 64:])


def _read_ptq1_0(blocks: Bytes) -> tuple[Bytes, Floats]:
    # As TQ1_0 with 16, then 8, then 2 bytes: digit n of byte m of a part of c bytes is its element c n + m.
    parts = (digits(blocks[:, :16], 5), digits(blocks[:, 16:24], 5), digits(blocks[:, 24:26], 4))
    return np.concatenate(parts, axis=1), _halves(blocks[:, 26:])


CODE_READERS: Final[Mapping[str, CodeReader]] = MappingProxyType(
    {
        "Q2_0": _read_scale_first,
        "PQ2_0": _read_scale_first,
        "PTQ1_0": _read_ptq1_0,
        "BITNET_T158": _read_t158,
    }
)


def _read_i2_s(data: Bytes, rows: int, columns: int, tiling: Tiling | None) -> TernaryMatrix:
    # Flat over the tensor: byte j of 32 holds elements j, 32 + j, 64 + j, 96 + j from its highest bits down.
    count = rows * columns // 4
    packed = data[:count].reshape(-1, 32)
    codes = np.ascontiguousarray(_fields(packed, (6, 4, 2, 0)).transpose(0, 2, 1))
    scale = data[count : count + 4].copy().view("<f4").astype(np.float32)
    return TernaryMatrix(codes=codes.reshape(rows, columns), scales=scale.reshape(1, 1), group=PER_TENSOR)


def _row_matrix(codes: Bytes, scales: Bytes, dtype: str) -> TernaryMatrix:
    stored = np.ascontiguousarray(scales).view(dtype).astype(np.float32)
    return TernaryMatrix(codes=codes, scales=stored, group=codes.shape[1])


def _read_iq2_bn(data: Bytes, rows: int, columns: int, tiling: Tiling | None) -> TernaryMatrix:
    # A row: float32, then per 64 elements 16 bytes: bits 2l, 2l+1 of byte j hold element 16 l + j.
    lines = data.reshape(rows, -1)
    codes = _fields(lines[:, 4:].reshape(rows, -1, 16)).transpose(0, 1, 3, 2)
    return _row_matrix(np.ascontiguousarray(codes).reshape(rows, columns), lines[:, :4], "<f4")


def _read_iq2_bn_r4(data: Bytes, rows: int, columns: int, tiling: Tiling | None) -> TernaryMatrix:
    # Four rows: four float32, then per 64 columns bytes 16 l + 4 k + i: bits 2s, 2s+1 hold, for row k,
    # column 16 l + 4 s + i.
    lines = data.reshape(rows // 4, -1)
    packed = lines[:, 16:].reshape(rows // 4, -1, 4, 4)  # (quad of rows, 16 columns, k, i)
    codes = _fields(packed).transpose(0, 2, 1, 4, 3)  # (quad, k, 16 columns, s, i)
    return _row_matrix(
        np.ascontiguousarray(codes).reshape(rows, columns), lines[:, :16].reshape(rows, 4), "<f4"
    )


def _read_iq1_bn(data: Bytes, rows: int, columns: int, tiling: Tiling | None) -> TernaryMatrix:
    # A row: float16, then per 64 elements 12 bytes of five digits and one of four, the least significant
    # digit first: byte 3g + k holds elements 16g + 5k ..., digit g of the last byte is element 16g + 15.
    lines = data.reshape(rows, -1)
    blocks = lines[:, 2:].reshape(-1, 13)
    fives = digits(blocks[:, :12], 5).reshape(-1, 5, 4, 3)[:, ::-1]  # (blocks, j, g, k)
    codes = np.empty((len(blocks), 4, 16), np.uint8)
    codes[:, :, :15] = fives.transpose(0, 2, 3, 1).reshape(-1, 4, 15)
    codes[:, :, 15] = digits(blocks[:, 12:], 5)[:, :0:-1]
    return _row_matrix(codes.reshape(rows, columns), lines[:, :2], "<f2")


def _measure_i2_s(shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    if count % 128:
        raise ModelFileError(f"type I2_S: expected a multiple of 128 elements, found {count}")
    return count // 4 + 32


def _measure_rows(name: str, header: int, block_bytes: int, together: int = 1) -> Measure:
    def measure(shape: tuple[int, ...]) -> int:
        columns, rows = shape[-1], shape[-2] if len(shape) > 1 else 1
        if columns % 64:
            raise ModelFileError(f"type {name}: expected a row length divisible by 64, found {columns}")
        if rows % together:
            raise ModelFileError(f"type {name}: expected rows in groups of {together}, found {rows}")
        return math.prod(shape[:-1]) * (header + columns // 64 * block_bytes)

    return measure


def _per_tensor(
    read: Callable[[Bytes, int, int, Tiling | None], tuple[Bytes, np.float32]],
) -> MatrixReader:
    def read_matrix(data: Bytes, rows: int, columns: int, tiling: Tiling | None) -> TernaryMatrix:
        codes, scale = read(data, rows, columns, tiling)
        return TernaryMatrix(codes=codes, scales=np.full((1, 1), scale, np.float32), group=PER_TENSOR)

    return read_matrix


MATRICES: Final[Mapping[str, MatrixType]] = MappingProxyType(
    {
        "I2_S": MatrixType(measure=_measure_i2_s, read=_read_i2_s, has_slices=False),
        "IQ2_BN": MatrixType(measure=_measure_rows("IQ2_BN", 4, 16), read=_read_iq2_bn),
        "IQ2_BN_R4": MatrixType(measure=_measure_rows("IQ2_BN_R4", 4, 16, 4), read=_read_iq2_bn_r4),
        "IQ1_BN": MatrixType(measure=_measure_rows("IQ1_BN", 2, 13), read=_read_iq1_bn),
        **{
            name: MatrixType(measure=measure, read=_per_tensor(read), has_slices=False)
            for name, measure, read in (
                ("TL1", bitnet.tl1_nbytes, bitnet.read_tl1),
                ("TL2", bitnet.tl2_nbytes, bitnet.read_tl2),
            )
        },
    }
)

# Ids of types whose id in their files belongs to another type of ggml; no file has such an id.
PRIVATE_IDS: Final = 1 << 16
T158_ID: Final = PRIVATE_IDS + 30
TL2_ID: Final = PRIVATE_IDS + 39
# As the table in `types`: id, name, block elements, block bytes (of MATRICES: of codes, without scales).
SIZES: Final = (
    (36, "I2_S", 4, 1), (38, "TL1", 4, 1), (134, "IQ1_BN", 64, 13), (135, "IQ2_BN", 64, 16),
    (142, "PQ2_0", 128, 34), (143, "PTQ1_0", 128, 28), (335, "IQ2_BN_R4", 64, 16),
    (T158_ID, "BITNET_T158", 256, 66), (TL2_ID, "TL2", 32, 8),
)  # fmt: skip
# Id in the file -> the other types that may be meant, by id; an empty tuple: the id has had another
# meaning, of which nothing is left but the size.
CLAIMED: Final[Mapping[int, tuple[int, ...]]] = MappingProxyType(
    {30: (T158_ID,), 36: (), 38: (), 39: (TL2_ID,), 42: (142,)}
)
