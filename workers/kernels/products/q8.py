"""Q8_0 matrices, sixteen rows interleaved: [group][column / 4][16 rows][4 weights], then scales.

A weight is stored as int8 + 128, an unsigned byte: vpdpbusd takes it as it is. Scales are float16,
[group][block of 32 columns][16 rows], after all weights.
"""

from __future__ import annotations

import numpy as np

from ..kernel import inner, kernel, piece
from ..simd.codes import signed_codes
from ..simd.dot import OFFSET_IN_DOT, dot_offset
from ..simd.groups import GROUPS, SPREAD, TOKENS, load_codes, load_scales, spread_codes
from ..simd.ops import (
    add_i32,
    broadcast_dword,
    fma_f32,
    load_bytes,
    load_f16,
    mul_f32,
    splat_f32,
    splat_i32,
    store_f32,
    to_f32,
    zero_f32,
    zero_i32,
)
from .areas import AREAS_AT, aligned, clear, totals_at, write
from .panels import fill, scratch_nbytes, tile_weights

__all__ = ["BLOCK", "codes_nbytes", "gemm", "scales_nbytes", "scratch_nbytes"]

BLOCK = 32
# Where the dot product takes the bytes as they are, 128 times the activations' sum is taken off.
OFFSET = np.int32(0 if OFFSET_IN_DOT else -128)


def codes_nbytes(rows: int, columns: int) -> int:
    """Return the size of the weight area; `rows` is padded to 16, `columns` a multiple of 32."""
    return -(-rows // 16) * 16 * columns


def scales_nbytes(rows: int, columns: int) -> int:
    """Return the size of the scale area."""
    return -(-rows // 16) * 16 * (columns // BLOCK) * 2


@piece
def _one_token(w, codes, scales, columns, pair, q, x_scales, x_sums, row, out, element):
    """Compute two groups of 16 rows (one if `pair` is 0), `pair` bytes apart, for one token."""
    a = zero_f32()
    d = zero_f32()
    for b in range(columns // BLOCK):
        c0 = splat_i32(OFFSET * x_sums[row, b])
        e0 = c0
        c1, e1 = zero_i32(), zero_i32()
        at = codes + b * 512
        x = row * columns + b * BLOCK
        for i in range(0, 8, 2):
            x0 = broadcast_dword(q, x + i * 4)
            x1 = broadcast_dword(q, x + i * 4 + 4)
            c0 = dot_offset(c0, load_bytes(w, at + i * 64), x0)
            e0 = dot_offset(e0, load_bytes(w, at + pair + i * 64), x0)
            c1 = dot_offset(c1, load_bytes(w, at + i * 64 + 64), x1)
            e1 = dot_offset(e1, load_bytes(w, at + pair + i * 64 + 64), x1)
        h = splat_f32(x_scales[row, b])
        a = fma_f32(to_f32(add_i32(c0, c1)), mul_f32(load_f16(w, scales + b * 32), h), a)
        d = fma_f32(to_f32(add_i32(e0, e1)), mul_f32(load_f16(w, scales + pair // 16 + b * 32), h), d)
    store_f32(out, 4 * element, a)
    if pair:
        store_f32(out, 4 * (element + 16), d)


@inner
def _tiles(w, codes, scales, pair, here, columns, count, scratch, base, out, element, out_step):
    """Compute `here` of GROUPS groups, `pair` bytes apart, for `count` tokens, a multiple of TOKENS."""
    blocks = columns // BLOCK
    area = base + AREAS_AT
    totals = totals_at(area, count, columns, BLOCK)
    clear(scratch, totals, count)
    for b in range(blocks):
        weights = load_scales(w, scales + b * 32, pair // 16)
        at = codes + b * 512
        if OFFSET_IN_DOT:
            for k in range(8):
                spread_codes(scratch, base + k * 64, signed_codes(load_codes(w, at + k * 64, pair)))
        for t in range(0, count, TOKENS):
            panel = area + b * BLOCK * count + t * BLOCK
            start = area + count * columns + 4 * (b * count + t)
            scale, total = start + 4 * blocks * count, totals + t * 64 * GROUPS
            if OFFSET_IN_DOT:
                tile_weights(weights, scratch, base, SPREAD, scratch, panel, start, scale, total)
            else:
                tile_weights(weights, w, at, pair, scratch, panel, start, scale, total)
    write(w, 0, False, scratch, totals, count, here, out, element, out_step)


@kernel
def gemm(
    form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out, out_at,
    out_step,
):  # fmt: skip
    """out[t, :] = W @ x[rows[t]] for t < count; arguments as ternary.gemm, blocks of 32 columns."""
    tiled = count // TOKENS * TOKENS
    base = aligned(scratch)
    if tiled:
        fill(q, x_scales, x_sums, columns, rows, tiled, scratch, base + AREAS_AT)
    for group in range(0, groups, 2):
        codes = codes_at + group * columns * 16
        scales = scales_at + group * columns
        here = min(2, groups - group)
        pair = columns * 16 if here == 2 else 0
        element = out_at + group * 16
        if tiled:
            for g in range(0, here, GROUPS):
                c, s, to = codes + g * pair, scales + g * columns, element + g * 16
                _tiles(w, c, s, pair, min(GROUPS, here), columns, tiled, scratch, base, out, to, out_step)
        for t in range(tiled, count):
            _one_token(
                w, codes, scales, columns, pair, q, x_scales, x_sums, rows[t], out, element + t * out_step
            )
