"""Encoding float32 rows as F32, F16, BF16, Q8_0 and Q4_0, with numpy: types whose scales need no search.

The bytes are those of the gguf package, and so of ggml's reference quantisers. Block types with a search for
their scales are in `encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from .table import Bytes, Floats

_F16_MAX: Final = np.float32(65504.0)


def _f32(values: Floats) -> Bytes:
    return values.view(np.uint8)


def _f16(values: Floats) -> Bytes:
    return values.astype("<f2").view(np.uint8)


def _bf16(values: Floats) -> Bytes:
    bits = values.view(np.uint32)
    rounded = bits + (
        np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    )  # to the nearest, ties to even
    return (rounded >> np.uint32(16)).astype("<u2").view(np.uint8)


def _inverse(scales: Floats) -> Floats:
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


def _q8_0(values: Floats) -> Bytes:
    blocks = values.reshape(-1, 32)
    scales: Floats = np.abs(blocks).max(axis=1, keepdims=True)
    scales /= np.float32(127)
    codes = blocks * _inverse(scales)
    codes += np.copysign(np.float32(0.5), codes)  # halves away from zero
    out = np.empty((len(blocks), 34), np.uint8)
    out[:, :2] = scales.astype("<f2").view(np.uint8)
    out[:, 2:] = codes.astype(np.int8).view(np.uint8)
    return out


def _q4_0(values: Floats) -> Bytes:
    blocks = values.reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scales = largest / np.float32(-8)
    codes = np.minimum((blocks * _inverse(scales) + np.float32(8.5)).astype(np.uint8), np.uint8(15))
    out = np.empty((len(blocks), 18), np.uint8)
    out[:, :2] = scales.astype("<f2").view(np.uint8)
    out[:, 2:] = codes[:, :16] | (codes[:, 16:] << np.uint8(4))
    return out


_ENCODERS: Final[Mapping[str, Callable[[Floats], Bytes]]] = MappingProxyType(
    {"F32": _f32, "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0, "Q4_0": _q4_0}
)

PLAIN: Final = tuple(_ENCODERS)
"""Names of the types that `encode_plain` writes."""

_LARGEST: Final = {
    "F32": np.float32(np.inf), "F16": _F16_MAX, "BF16": np.float32(3.38e38),
    "Q8_0": _F16_MAX * np.float32(127), "Q4_0": _F16_MAX * np.float32(8),
}  # fmt: skip


def encode_plain(values: Floats, name: str, out: Bytes) -> int:
    """Write `values` (float32 (rows, columns), C-contiguous) as type `name` to `out` (uint8, 1-D).

    Returns -1, or the first row with a value that is not finite or too large, and then writes nothing.
    As F32 everything is written. Raises KeyError for a name that is not in PLAIN.
    """
    encoder = _ENCODERS[name]
    if name != "F32":
        with np.errstate(invalid="ignore"):
            bad = ~(np.abs(values) <= _LARGEST[name])
        if bad.any():
            return int(np.argmax(bad.any(axis=1)))
    out[:] = encoder(values).reshape(-1)
    return -1
