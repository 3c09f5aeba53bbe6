"""Q4_0, IQ4_NL and MXFP4: four-bit codes in blocks of 32 columns, sixteen rows interleaved.

Codes: [group][column / 32], 4 times [16 rows][4 bytes]; byte j of the n-th holds column 4 n + j in the
low nibble and 16 + 4 n + j in the high one, as the file does. What a code stands for is looked up in a
table of sixteen bytes (MXFP4's weights are doubled), so that the three share all else. Scales,
after all codes: [group][block][16 rows], float16, or for MXFP4 the file's byte e, 2^(e - 128). Both
areas are of the file's size. Sums are exact integers; scales are applied in block order by fma.
"""

from __future__ import annotations

import numpy as np

from ..kernel import inner, kernel, merged, piece
from ..simd.codes import load_dword, load_e8m0_half, load_half_powers, load_table, lookup, store_dword
from ..simd.dot import WEIGHT_OFFSET, dot_weights
from ..simd.groups import GROUPS, SPREAD, TOKENS, load_scales
from ..simd.ops import (
    and_bytes,
    broadcast_dword,
    fma_f32,
    load_bytes,
    load_f16,
    mul_f32,
    shift_right_bytes,
    splat_f32,
    splat_i32,
    store_bytes,
    store_f32,
    to_f32,
    zero_f32,
)
from .areas import AREAS_AT, aligned, clear, totals_at, write
from .panels import fill, scratch_nbytes, tile_weights

__all__ = ["BLOCK", "IQ4_NL", "MXFP4", "Q4_0", "gemm", "pack", "scratch_nbytes"]

Q4_0, IQ4_NL, MXFP4 = 24, 25, 26
BLOCK = 32

# The weights of the sixteen codes of Q4_0, IQ4_NL and (times two) MXFP4, as dot_weights takes them.
_TABLES = (
    np.array(
        [
            list(range(-8, 8)),
            [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
            [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12],
        ]
    )
    + WEIGHT_OFFSET
).astype(np.uint8)
_SCALE_NBYTES = (32, 32, 16)  # of 16 rows, by format

_low = and_bytes(0x0F)
_right4 = shift_right_bytes(4)


@kernel
def pack(form, raw, rows, columns, out, codes_at, scales_at):
    """Pack the file's blocks (raw: uint8: scale, then 16 bytes of codes) of a (rows, columns) matrix.

    Rows beyond N up to the next multiple of 16 become zero weights: scale 0, for MXFP4 codes 0.
    """
    blocks = columns // BLOCK
    width = 1 if form == MXFP4 else 2
    for group in range((rows + 15) // 16):
        for b in range(blocks):
            block_at = codes_at + (group * blocks + b) * 256
            scale = scales_at + (group * blocks + b) * 16 * width
            for lane in range(16):
                row = group * 16 + lane
                source = (row * blocks + b) * (16 + width)
                for i in range(width):
                    out[scale + lane * width + i] = raw[source + i] if row < rows else np.uint8(0)
                for n in range(4):
                    word = load_dword(raw, source + width + 4 * n) if row < rows else np.uint32(0)
                    store_dword(out, block_at + n * 64 + lane * 4, word)


@piece
def _scales(form, w, at):
    if form == MXFP4:
        return load_e8m0_half(w, at)
    return load_f16(w, at)


@piece
def _pair(acc, table, v, low, high):
    """Return acc + the dot products of a vector's low codes with `low` and of its high ones with `high`."""
    acc = dot_weights(acc, lookup(table, _low(v)), low)
    return dot_weights(acc, lookup(table, _low(_right4(v))), high)


@kernel
def _one_token(form, w, codes, scales, columns, pair, pair_scales, q, x_scales, x_sums, row, out, element):
    """Compute one group of 16 rows, or two if `pair` is the bytes from one to the next, for one token."""
    table = load_table(_TABLES, 16 * (form - Q4_0))
    a = zero_f32()
    d = zero_f32()
    for b in range(columns // BLOCK):
        first = splat_i32(-WEIGHT_OFFSET * x_sums[row, b])
        second = first
        x = row * columns + b * BLOCK
        for n in range(4):
            at = codes + b * 256 + n * 64
            low = broadcast_dword(q, x + 4 * n)
            high = broadcast_dword(q, x + 16 + 4 * n)
            first = _pair(first, table, load_bytes(w, at), low, high)
            second = _pair(second, table, load_bytes(w, at + pair), low, high)
        h = splat_f32(x_scales[row, b])
        at = scales + b * _SCALE_NBYTES[form - Q4_0]
        a = fma_f32(to_f32(first), mul_f32(_scales(form, w, at), h), a)
        d = fma_f32(to_f32(second), mul_f32(_scales(form, w, at + pair_scales), h), d)
    store_f32(out, 4 * element, a)
    if pair:
        store_f32(out, 4 * (element + 16), d)


@merged
def _spread(table, w, at, scratch, tile_at):
    for n in range(4):
        v = load_bytes(w, at + 64 * n)
        store_bytes(scratch, tile_at + 64 * n, lookup(table, _low(v)))
        store_bytes(scratch, tile_at + 256 + 64 * n, lookup(table, _low(_right4(v))))


@merged
def _tile_scales(form, w, at, step):
    if form == MXFP4:
        return load_half_powers(w, at, step)
    return load_scales(w, at, step)


@inner
def _tiles(form, w, codes, scales, pair, pair_scales, here, columns, count, scratch, base, out, element,
           out_step):  # fmt: skip
    """Compute `here` of GROUPS groups for `count` tokens, a multiple of TOKENS, whose area is filled."""
    table = load_table(_TABLES, 16 * (form - Q4_0))
    width = 16 if form == MXFP4 else 32
    blocks = columns // BLOCK
    area = base + AREAS_AT
    totals = totals_at(area, count, columns, BLOCK)
    clear(scratch, totals, count)
    for b in range(blocks):
        for g in range(GROUPS):
            _spread(table, w, codes + b * 256 + g * pair, scratch, base + g * SPREAD)
        weights = _tile_scales(form, w, scales + b * width, pair_scales)
        for t in range(0, count, TOKENS):
            panel = area + b * BLOCK * count + t * BLOCK
            start = area + count * columns + 4 * (b * count + t)
            scale, total = start + 4 * blocks * count, totals + t * 64 * GROUPS
            tile_weights(weights, scratch, base, SPREAD, scratch, panel, start, scale, total)
    write(w, 0, False, scratch, totals, count, here, out, element, out_step)


@kernel
def gemm(
    form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out, out_at,
    out_step,
):  # fmt: skip
    """out[t, :] = W @ x[rows[t]] for t < count; arguments as q8.gemm, `form` one of this module's."""
    size, size_scales = columns * 8, columns // BLOCK * _SCALE_NBYTES[form - Q4_0]
    tiled = count // TOKENS * TOKENS
    base = aligned(scratch)
    if tiled:
        fill(q, x_scales, x_sums, columns, rows, tiled, scratch, base + AREAS_AT)
    for group in range(0, groups, 2):
        here = min(2, groups - group)
        pair, pair_scales = (size, size_scales) if here == 2 else (0, 0)
        for g in range(group, group + here if tiled else group, GROUPS):
            _tiles(
                form, w, codes_at + g * size, scales_at + g * size_scales, pair, pair_scales,
                min(GROUPS, here), columns, tiled, scratch, base, out, out_at + g * 16, out_step,
            )  # fmt: skip
        c, s = codes_at + group * size, scales_at + group * size_scales
        for t in range(tiled, count):
            to = out_at + group * 16 + t * out_step
            _one_token(form, w, c, s, columns, pair, pair_scales, q, x_scales, x_sums, rows[t], out, to)
