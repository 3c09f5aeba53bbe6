"""Q8_0 matrices, sixteen rows interleaved: [group][column / 4][16 rows][4 int8], then float16 scales.

Scales lie as [group][block of 32 columns][16 rows], after all weights.
"""

from __future__ import annotations

import numpy as np

from .kernel import kernel
from .simd.dot import dot_signed, dot_unsigned
from .simd.ops import (
    broadcast_dword,
    fma_f32,
    load_bytes,
    load_f16,
    mul_f32,
    splat_f32,
    splat_i32,
    store_f32,
    sub_i32,
    to_f32,
    xor_bytes,
    zero_f32,
    zero_i32,
)
from .target import TARGET

BLOCK = 32
# vpdpbusd takes unsigned weights: w + 128, and 128 times the activations' sum is taken off.
FLIP = TARGET == "avx512vnni"

_flip = xor_bytes(-128)


def codes_nbytes(rows: int, columns: int) -> int:
    """Return the size of the weight area; `rows` is padded to 16, `columns` a multiple of 32."""
    return -(-rows // 16) * 16 * columns


def scales_nbytes(rows: int, columns: int) -> int:
    """Return the size of the scale area."""
    return -(-rows // 16) * 16 * (columns // BLOCK) * 2


@kernel
def pack(raw, rows, columns, out, codes_at, scales_at):
    """Pack raw Q8_0 blocks (uint8: float16 scale, then 32 int8) of a (rows, columns) matrix.

    -128 becomes -127 (no encoder writes it): NEON and AVX2 need the symmetric range.
    """
    blocks = columns // BLOCK
    for group in range((rows + 15) // 16):
        for lane in range(16):
            row = group * 16 + lane
            for block in range(blocks):
                source = (row * blocks + block) * 34
                at = scales_at + ((group * blocks + block) * 16 + lane) * 2
                for i in range(2):
                    out[at + i] = raw[source + i] if row < rows else 0
                for i in range(BLOCK):
                    column = block * BLOCK + i
                    at = codes_at + (group * (columns // 4) + column // 4) * 64 + lane * 4 + column % 4
                    byte = raw[source + 2 + i] if row < rows else np.uint8(0)
                    out[at] = np.uint8(0x81) if byte == 0x80 else byte


@kernel
def _block(acc, w, at, scale_at, q, q_at, x_sum, x_scale):
    """Add one block of 32 columns for 16 rows to `acc`."""
    c0 = zero_i32()
    c1 = zero_i32()
    if FLIP:
        for i in range(0, 8, 2):
            c0 = dot_unsigned(c0, _flip(load_bytes(w, at + i * 64)), broadcast_dword(q, q_at + i * 4))
            c1 = dot_unsigned(
                c1, _flip(load_bytes(w, at + i * 64 + 64)), broadcast_dword(q, q_at + i * 4 + 4)
            )
        c0 = sub_i32(c0, splat_i32(np.int32(128) * x_sum))
    else:
        for i in range(0, 8, 2):
            c0 = dot_signed(c0, load_bytes(w, at + i * 64), broadcast_dword(q, q_at + i * 4))
            c1 = dot_signed(c1, load_bytes(w, at + i * 64 + 64), broadcast_dword(q, q_at + i * 4 + 4))
    exact = to_f32(sub_i32(c0, sub_i32(zero_i32(), c1)))
    return fma_f32(exact, mul_f32(load_f16(w, scale_at), splat_f32(x_scale)), acc)


@kernel
def gemm(w, codes_at, scales_at, groups, columns, q, x_scales, x_sums, rows, count, out, out_at, out_step):
    """out[t, :] = W @ x[rows[t]] for t < count; arguments as ternary.gemm, blocks of 32 columns."""
    blocks = columns // BLOCK
    for group in range(groups):
        codes = codes_at + group * columns * 16
        scales = scales_at + group * blocks * 32
        for t in range(count):
            row = rows[t]
            acc = zero_f32()
            for b in range(blocks):
                acc = _block(
                    acc, w, codes + b * 512, scales + b * 32, q, row * columns + b * BLOCK,
                    x_sums[row, b], x_scales[row, b],
                )  # fmt: skip
            store_f32(out, 4 * (out_at + group * 16 + t * out_step), acc)
