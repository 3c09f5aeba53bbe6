"""Values of the cache of keys and values: uint8 arrays hold float16, float32 arrays what they say.

The functions choose by the array's type when a kernel is compiled, so that a kernel is written once.
"""

from __future__ import annotations

from numba import types
from numba.extending import overload

from ..simd.ops import load_f16, load_f32, round_f16, store_f16, store_f32


def load_cached(cache, byte_offset):
    """Return sixteen values as float32."""
    raise NotImplementedError("kernels only")


def store_cached(cache, byte_offset, vector):
    """Store sixteen float32 values, rounded to what the cache holds."""
    raise NotImplementedError("kernels only")


def as_cached(cache, vector):
    """Return sixteen float32 values rounded to what the cache holds."""
    raise NotImplementedError("kernels only")


def value_nbytes(cache):
    """Return the bytes of a value: 2 or 4."""
    raise NotImplementedError("kernels only")


def _halves(cache):
    return cache.dtype == types.uint8


@overload(load_cached, inline="always")
def _load(cache, byte_offset):
    if _halves(cache):
        return lambda cache, byte_offset: load_f16(cache, byte_offset)
    return lambda cache, byte_offset: load_f32(cache, byte_offset)


@overload(store_cached, inline="always")
def _store(cache, byte_offset, vector):
    if _halves(cache):
        return lambda cache, byte_offset, vector: store_f16(cache, byte_offset, vector)
    return lambda cache, byte_offset, vector: store_f32(cache, byte_offset, vector)


@overload(as_cached, inline="always")
def _round(cache, vector):
    if _halves(cache):
        return lambda cache, vector: round_f16(vector)
    return lambda cache, vector: vector


@overload(value_nbytes, inline="always")
def _nbytes(cache):
    return (lambda cache: 2) if _halves(cache) else (lambda cache: 4)
