"""Decoders of the types whose codes index a code book: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

A code names an entry of four or eight magnitudes (for IQ1 trits); signs are stored apart. The rest is
as in `block_types`; the books themselves are in `grids`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from .blocks import Bytes, Floats, half, spread
from .code_books import book

# Seven signs are stored, the eighth makes their number even.
_PARITY: Final = np.array([i | (i.bit_count() % 2) << 7 for i in range(128)], np.uint8)


@cache
def _book(name: str) -> Floats:
    return book(name)


def _signs(packed: Bytes) -> Floats:
    """Return -1 for each set bit, 1 for each other: (blocks, n) -> (blocks, 8 n)."""
    return np.float32(1) - np.float32(2) * spread(packed, 1, 1)


def _words(blocks: Bytes, start: int, end: int, dtype: str) -> npt.NDArray[np.uint32]:
    """Return bytes start..end of each block as little-endian integers of type `dtype`, widened."""
    return np.ascontiguousarray(blocks[:, start:end]).view(dtype).astype(np.uint32)


def _values(scales: Floats, magnitudes: Floats, signs: Floats) -> Floats:
    """Return scale * magnitude * sign; one scale for each run of equally many values of a block."""
    values = scales[..., np.newaxis] * magnitudes.reshape(*scales.shape, -1)
    return (values * signs.reshape(values.shape)).reshape(len(scales), -1)


def _seven_bit_signs(words: npt.NDArray[np.uint32]) -> Floats:
    """Return the signs of four groups of eight in the low 28 bits of each word."""
    shifts = np.array([0, 7, 14, 21], np.uint32)
    index = (words[..., np.newaxis] >> shifts) & np.uint32(127)
    return _signs(_PARITY[index].reshape(len(words), -1))


def _iq2_xxs(blocks: Bytes) -> Floats:
    words = _words(blocks, 2, 66, "<u4").reshape(len(blocks), 8, 2)
    codes = blocks[:, 2:].reshape(len(blocks), 8, 8)[:, :, :4]
    scales = half(blocks, 0) * (np.float32(0.5) + (words[..., 1] >> 28).astype(np.float32)) * np.float32(0.25)
    return _values(scales, _book("IQ2_XXS")[codes], _seven_bit_signs(words[..., 1]))


def _quarters(blocks: Bytes, at: int, end: int) -> Floats:
    """Return the scales of 16 columns each: d * (0.5 + nibble) / 4."""
    return half(blocks, 0) * (np.float32(0.5) + spread(blocks[:, at:end], 4, 1)) * np.float32(0.25)


def _iq2_xs(blocks: Bytes) -> Floats:
    codes = _words(blocks, 2, 66, "<u2")
    signs = _signs(_PARITY[codes >> 9])
    return _values(_quarters(blocks, 66, 74), _book("IQ2_XS")[codes & 511], signs)


def _iq2_s(blocks: Bytes) -> Floats:
    high = spread(blocks[:, 66:74], 2, 1).astype(np.uint16)
    codes = blocks[:, 2:34] | (high << np.uint16(8))
    return _values(_quarters(blocks, 74, 82), _book("IQ2_S")[codes], _signs(blocks[:, 34:66]))


def _iq3_xxs(blocks: Bytes) -> Floats:
    words = _words(blocks, 66, 98, "<u4")
    scales = half(blocks, 0) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    return _values(scales, _book("IQ3_XXS")[blocks[:, 2:66]], _seven_bit_signs(words))


def _iq3_s(blocks: Bytes) -> Floats:
    codes = blocks[:, 2:66] | (spread(blocks[:, 66:74], 1, 1).astype(np.uint16) << np.uint16(8))
    scales = half(blocks, 0) * (1 + 2 * spread(blocks[:, 106:110], 4, 1))
    return _values(scales, _book("IQ3_S")[codes], _signs(blocks[:, 74:106]))


def _shifted(scales: Floats, trits: Floats, negative: npt.NDArray[np.bool_]) -> Floats:
    """Return scale * (trit + 1/8), or - 1/8 where negative; a flag for each run of eight columns or more."""
    deltas = np.where(negative, np.float32(-0.125), np.float32(0.125))
    values = trits.reshape(*deltas.shape, -1) + deltas[..., np.newaxis]
    whole = values.reshape(*scales.shape, -1) * scales[..., np.newaxis]
    return whole.reshape(len(scales), -1)


def _iq1_s(blocks: Bytes) -> Floats:
    high = _words(blocks, 34, 50, "<u2")
    scales = half(blocks, 0) * (2 * ((high >> 12) & 7) + 1).astype(np.float32)
    bits = (high[..., np.newaxis] >> np.array([0, 3, 6, 9], np.uint32)) & 7
    codes = blocks[:, 2:34] | (bits << 8).reshape(len(blocks), -1)
    return _shifted(scales, _book("IQ1_S")[codes], (high & 0x8000) != 0)


def _iq1_m(blocks: Bytes) -> Floats:
    packed = _words(blocks, 48, 56, "<u2")
    # The float16 that scales the block is the top nibbles of the four words.
    bits = (packed & 0xF000) >> np.array([12, 8, 4, 0], np.uint32)
    d = bits.sum(axis=1, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)[:, np.newaxis]
    scales = (packed[..., np.newaxis] >> np.array([0, 3, 6, 9], np.uint32)) & 7
    high = spread(blocks[:, 32:48], 4, 1).astype(np.uint16)
    codes = blocks[:, :32] | ((high & 7) << np.uint16(8))
    whole = d * (2 * scales + 1).astype(np.float32).reshape(len(blocks), -1)
    return _shifted(whole, _book("IQ1_S")[codes], (high & 8) != 0)


DECODERS: Final[dict[str, Callable[[Bytes], Floats]]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
