"""Decoders of the block types Q4_0 to Q6_K, IQ4_NL, IQ4_XS, MXFP4 and NVFP4: raw blocks to float32.

Each takes uint8 (blocks, block_bytes) and returns float32 (blocks, block_elements), with the values and
the rounding of the gguf package. Layouts are ggml's, little endian. Not here: types whose codes index
large code books (`grids`), and the table of all types (`table`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

IQ4_VALUES: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
FP4_VALUES: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def half(blocks: Bytes, at: int) -> Floats:
    """Return the float16 at byte `at` of each block as float32 (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def spread(packed: Bytes, bits: int, run: int) -> Bytes:
    """Return the fields of `bits` bits of `packed` (blocks, n): of each run of `run` bytes the lowest first.

    (blocks, n) -> (blocks, n * 8 / bits)
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = packed.reshape(len(packed), -1, 1, run) >> shifts
    result: Bytes = (fields & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)
    return result


def _scaled(scales: Floats, codes: npt.NDArray[np.generic], minima: Floats | None = None) -> Floats:
    """Return scale * code - minimum; one scale for each run of equally many codes of a block."""
    values = codes.astype(np.float32).reshape(*scales.shape, -1)
    values *= scales[..., np.newaxis]
    if minima is not None:
        values -= minima[..., np.newaxis]
    return values.reshape(len(codes), -1)


def _q4_0(blocks: Bytes) -> Floats:
    return _scaled(half(blocks, 0), spread(blocks[:, 2:], 4, 16).astype(np.int8) - np.int8(8))


def _q4_1(blocks: Bytes) -> Floats:
    return _scaled(half(blocks, 0), spread(blocks[:, 4:], 4, 16)) + half(blocks, 2)


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    return spread(low, 4, 16) | (spread(high, 1, 1) << np.uint8(4))


def _q5_0(blocks: Bytes) -> Floats:
    codes = _five_bits(blocks[:, 2:6], blocks[:, 6:])
    return _scaled(half(blocks, 0), codes.astype(np.int8) - np.int8(16))


def _q5_1(blocks: Bytes) -> Floats:
    return _scaled(half(blocks, 0), _five_bits(blocks[:, 4:8], blocks[:, 8:])) + half(blocks, 2)


def _q2_k(blocks: Bytes) -> Floats:
    scales = half(blocks, 80) * (blocks[:, :16] & 15)
    minima = half(blocks, 82) * (blocks[:, :16] >> 4)
    return _scaled(scales, spread(blocks[:, 16:80], 2, 32), minima)


def _q3_k(blocks: Bytes) -> Floats:
    low = spread(blocks[:, 96:104], 4, 8)
    high = spread(blocks[:, 104:108], 2, 4)
    scales = half(blocks, 108) * ((low | (high << np.uint8(4))).astype(np.int8) - np.int8(32))
    codes = spread(blocks[:, 32:96], 2, 32) | (spread(blocks[:, :32], 1, 32) << np.uint8(2))
    return _scaled(scales, codes.astype(np.int8) - np.int8(4))


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Return the eight scales and the eight minima in 12 bytes."""
    first, second, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = (first & 63, (mixed & 15) | ((first >> 6) << np.uint8(4)))
    minima = (second & 63, (mixed >> 4) | ((second >> 6) << np.uint8(4)))
    return np.concatenate(scales, axis=1), np.concatenate(minima, axis=1)


def _q4_k(blocks: Bytes) -> Floats:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = spread(blocks[:, 16:], 4, 32)
    return _scaled(half(blocks, 0) * scales, codes, half(blocks, 2) * minima)


def _q5_k(blocks: Bytes) -> Floats:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = spread(blocks[:, 48:], 4, 32) | (spread(blocks[:, 16:48], 1, 32) << np.uint8(4))
    return _scaled(half(blocks, 0) * scales, codes, half(blocks, 2) * minima)


def _q6_k(blocks: Bytes) -> Floats:
    codes = spread(blocks[:, :128], 4, 64) | (spread(blocks[:, 128:192], 2, 32) << np.uint8(4))
    scales = half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return _scaled(scales, codes.astype(np.int8) - np.int8(32))


def _iq4_nl(blocks: Bytes) -> Floats:
    return _scaled(half(blocks, 0), IQ4_VALUES[spread(blocks[:, 2:], 4, 16)])


def _iq4_xs(blocks: Bytes) -> Floats:
    low = spread(blocks[:, 4:8], 4, 1)
    high = spread(blocks[:, 2:4], 2, 1)
    scales = half(blocks, 0) * ((low | (high << np.uint8(4))).astype(np.int8) - np.int8(32))
    return _scaled(scales, IQ4_VALUES[spread(blocks[:, 8:], 4, 16)])


def _mxfp4(blocks: Bytes) -> Floats:
    # 2^(e - 128), of which the two smallest are subnormal.
    exponents = blocks[:, :1].astype(np.uint32)
    bits = np.where(
        exponents < 2, np.uint32(0x00200000) << exponents, (exponents - np.uint32(1)) << np.uint32(23)
    )
    return _scaled(bits.view(np.float32), FP4_VALUES[spread(blocks[:, 1:], 4, 16)])


def _nvfp4(blocks: Bytes) -> Floats:
    # Four scales without sign, four bits of exponent, three of mantissa; halved, as values are doubled.
    exponents, mantissas = (blocks[:, :4] >> 3) & 15, (blocks[:, :4] & 7).astype(np.float32)
    normal = (1 + mantissas / 8) * np.exp2(exponents.astype(np.float32) - 7)
    scales = np.where(exponents == 0, mantissas * np.float32(2**-9), normal) * np.float32(0.5)
    scales[(blocks[:, :4] == 0) | (blocks[:, :4] == 0x7F)] = 0
    return _scaled(scales.astype(np.float32), FP4_VALUES[spread(blocks[:, 4:], 4, 8)])


DECODERS: Final[dict[str, Callable[[Bytes], Floats]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
