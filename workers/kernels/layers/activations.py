"""Quantising activations to int8: once per token, shared by every matrix that reads them.

Per block of `block` values: scale = max|x| / 127, q = round-half-even(x / scale), and the sum of q,
which the kernels need to take the offset of unsigned weight codes off again. The scales are rounded
as in llama.cpp (float16 for 32-blocks, as its Q8_0; the inverse of 127 / max for 256-blocks, as its
Q8_K): the same file then gives the same logits there, often to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernel import kernel
from ..simd.ops import (
    abs_f32,
    add_i32,
    fma_f32,
    largest_f32,
    load_f32,
    max_f32,
    mul_f32,
    round_f32,
    scalar_f16,
    splat_f32,
    store_i8,
    sum_f32,
    sum_i32,
    to_i32,
    zero_f32,
    zero_i32,
)

Q8_BLOCK = 32  # activations for Q8_0 weights
TERNARY_BLOCK = 256  # activations for ternary weights

_F127 = np.float32(127.0)
_F0 = np.float32(0.0)


@kernel
def quantize_rows(x, first, last, width, block, q, scales, sums):
    """Quantise rows first..last - 1 of `x` (float32, C-contiguous, `width` wide), `width % block == 0`.

    Writes q (int8, same shape), scales (float32) and sums (int32), both (count, width // block).
    A NaN or infinity in a block makes its scale NaN, so that it surfaces in every result.
    """
    blocks = width // block
    flat_scales = scales.ravel()
    flat_sums = sums.ravel()
    for row in range(first, last):
        for b in range(blocks):
            at = row * width + b * block
            largest = zero_f32()
            poison = zero_f32()
            for i in range(0, block, 16):
                v = load_f32(x, 4 * (at + i))
                largest = max_f32(abs_f32(v), largest)
                poison = fma_f32(v, zero_f32(), poison)
            peak = largest_f32(largest)
            inverse = _F127 / peak if peak > _F0 else _F0
            total = zero_i32()
            for i in range(0, block, 16):
                rounded = to_i32(round_f32(mul_f32(load_f32(x, 4 * (at + i)), splat_f32(inverse))))
                total = add_i32(total, rounded)
                store_i8(q, at + i, rounded)
            if block == Q8_BLOCK:
                scale = scalar_f16(peak / _F127)
            else:
                scale = np.float32(1.0) / inverse if peak > _F0 else _F0
            flat_scales[row * blocks + b] = scale + sum_f32(poison)
            flat_sums[row * blocks + b] = sum_i32(total)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Buffers for `capacity` rows of `width` values in blocks of `block`: q int8, scales, sums."""

    q: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    sums: npt.NDArray[np.int32]
    block: int

    @classmethod
    def allocate(cls, capacity: int, width: int, block: int) -> QuantizedRows:
        """Return zeroed buffers; `width` must be a multiple of `block`."""
        blocks = width // block
        return cls(
            np.zeros((capacity, width), np.int8),
            np.zeros((capacity, blocks), np.float32),
            np.zeros((capacity, blocks), np.int32),
            block,
        )

    def fill(self, x: npt.NDArray[np.float32], count: int) -> None:
        """Quantise the first `count` rows of `x` (float32, C-contiguous, rows as wide as q)."""
        quantize_rows(x, 0, count, self.q.shape[-1], self.block, self.q, self.scales, self.sums)
