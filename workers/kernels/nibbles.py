"""Q4_0, IQ4_NL and MXFP4: four-bit codes in blocks of 32 columns, sixteen rows interleaved.

Codes: [group][column / 32], 4 times [16 rows][4 bytes]; byte j of the n-th holds column 4 n + j in the
low nibble and 16 + 4 n + j in the high one, as the file does. What a code stands for is looked up in a
table of sixteen bytes, weight + 128 (MXFP4's are doubled), so that the three share all else. Scales,
after all codes: [group][block][16 rows], float16, or for MXFP4 the file's byte e, 2^(e - 128). Both
areas are of the file's size. Sums are exact integers; scales are applied in block order by fma.
"""

from __future__ import annotations

import numpy as np

from .kernel import kernel, piece
from .panels import TILE, copy_panels
from .q8 import OFFSET
from .simd.codes import load_dword, load_e8m0_half, load_table, lookup, store_dword, store_scalar
from .simd.dot import dot_offset
from .simd.ops import (
    and_bytes,
    broadcast_dword,
    broadcast_f32,
    fma_f32,
    load_bytes,
    load_f16,
    load_f32,
    load_i32,
    mul_f32,
    shift_right_bytes,
    splat_f32,
    splat_i32,
    store_bytes,
    store_f32,
    to_f32,
    zero_f32,
)
from .simd.tile import broadcast_tile, store_tile, tile_dot_offset

Q4_0, IQ4_NL, MXFP4 = 24, 25, 26
BLOCK = 32

# The weights of the sixteen codes of Q4_0, IQ4_NL and (times two) MXFP4, plus 128.
_TABLES = (
    np.array(
        [
            list(range(-8, 8)),
            [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
            [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12],
        ]
    )
    + 128
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
            place = codes_at + (group * blocks + b) * 256
            scale = scales_at + (group * blocks + b) * 16 * width
            for lane in range(16):
                row = group * 16 + lane
                source = (row * blocks + b) * (16 + width)
                for i in range(width):
                    out[scale + lane * width + i] = raw[source + i] if row < rows else np.uint8(0)
                for n in range(4):
                    word = load_dword(raw, source + width + 4 * n) if row < rows else np.uint32(0)
                    store_dword(out, place + n * 64 + lane * 4, word)


@piece
def _scales(form, w, at):
    if form == MXFP4:
        return load_e8m0_half(w, at)
    return load_f16(w, at)


@piece
def _pair(acc, table, v, low, high):
    """Return acc + the dot products of a vector's low codes with `low` and of its high ones with `high`."""
    acc = dot_offset(acc, lookup(table, _low(v)), low)
    return dot_offset(acc, lookup(table, _low(_right4(v))), high)


@kernel
def _one_token(form, w, codes, scales, columns, pair, pair_scales, q, x_scales, x_sums, row, out, place):
    """Compute one group of 16 rows, or two if `pair` is the bytes from one to the next, for one token."""
    table = load_table(_TABLES, 16 * (form - Q4_0))
    a = zero_f32()
    d = zero_f32()
    for b in range(columns // BLOCK):
        first = splat_i32(OFFSET * x_sums[row, b])
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
    store_f32(out, 4 * place, a)
    if pair:
        store_f32(out, 4 * (place + 16), d)


_TILE = TILE
_first_tile = broadcast_tile(_TILE)
_tile_dot = tile_dot_offset(_TILE)
_store_tile = store_tile(2 * _TILE)
# Scratch: two groups' block of weights, one byte each; a tile's sums; then for tiled tokens panels of
# activations, then [block][token] starts, then [block][token] scales, then float sums of both groups.
_SUMS_AT = 2 * 8 * 64
_PANELS_AT = _SUMS_AT + 2 * _TILE * 64


def scratch_nbytes(columns: int, tokens: int) -> int:
    """Return the size of the scratch that `gemm` needs for up to `tokens` tokens."""
    return _PANELS_AT + tokens * (columns + 8 * (columns // BLOCK) + 128)


@kernel
def _pack_panels(q, x_scales, x_sums, columns, rows, count, scratch):
    """Copy tokens in eights, with their starts and scales behind."""
    blocks = columns // BLOCK
    copy_panels(q, columns, rows, count, scratch, _PANELS_AT)
    starts_at = _PANELS_AT + count * columns
    scales_at = starts_at + 4 * count * blocks
    for t in range(count):
        for b in range(blocks):
            place = 4 * (t // _TILE * _TILE * blocks + b * _TILE + t % _TILE)
            store_dword(scratch, starts_at + place, np.uint32(OFFSET * x_sums[rows[t], b]))
            store_scalar(scratch, scales_at + place, x_scales[rows[t], b])


@piece
def _spread(table, w, at, scratch, place):
    for n in range(4):
        v = load_bytes(w, at + 64 * n)
        store_bytes(scratch, place + 64 * n, lookup(table, _low(v)))
        store_bytes(scratch, place + 256 + 64 * n, lookup(table, _low(_right4(v))))


@kernel
def _tiles(form, w, codes, scales, pair, pair_scales, columns, count, scratch, out, place, out_step):
    """Compute two groups for `count` tokens, a multiple of eight, whose panels lie in scratch."""
    table = load_table(_TABLES, 16 * (form - Q4_0))
    blocks = columns // BLOCK
    starts_at = _PANELS_AT + count * columns
    scales_at = starts_at + 4 * count * blocks
    acc_at = scales_at + 4 * count * blocks
    for t in range(count):
        store_f32(scratch, acc_at + t * 128, zero_f32())
        store_f32(scratch, acc_at + t * 128 + 64, zero_f32())
    for b in range(blocks):
        _spread(table, w, codes + b * 256, scratch, 0)
        _spread(table, w, codes + b * 256 + pair, scratch, 512)
        at = scales + b * _SCALE_NBYTES[form - Q4_0]
        first = _scales(form, w, at)
        second = _scales(form, w, at + pair_scales)
        for t in range(0, count, _TILE):
            side = 4 * (t * blocks + b * _TILE)
            panel = _PANELS_AT + t * columns + b * BLOCK * _TILE
            tile = _first_tile(scratch, starts_at + side)
            for k in range(8):
                u, v = load_bytes(scratch, k * 64), load_bytes(scratch, 512 + k * 64)
                tile = _tile_dot(tile, u, v, scratch, panel + k * 4 * _TILE)
            _store_tile(scratch, _SUMS_AT, tile)
            for i in range(_TILE):
                h = broadcast_f32(scratch, scales_at + side + 4 * i)
                acc = acc_at + (t + i) * 128
                a = to_f32(load_i32(scratch, _SUMS_AT + i * 64))
                d = to_f32(load_i32(scratch, _SUMS_AT + (_TILE + i) * 64))
                store_f32(scratch, acc, fma_f32(a, mul_f32(first, h), load_f32(scratch, acc)))
                acc += 64
                store_f32(scratch, acc, fma_f32(d, mul_f32(second, h), load_f32(scratch, acc)))
    for t in range(count):
        store_f32(out, 4 * (place + t * out_step), load_f32(scratch, acc_at + t * 128))
        if pair:
            store_f32(out, 4 * (place + t * out_step + 16), load_f32(scratch, acc_at + t * 128 + 64))


@kernel
def gemm(
    form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out, out_at,
    out_step,
):  # fmt: skip
    """out[t, :] = W @ x[rows[t]] for t < count; arguments as q8.gemm, `form` one of this module's."""
    pair = columns * 8
    pair_scales = columns // BLOCK * _SCALE_NBYTES[form - Q4_0]
    tiled = count // _TILE * _TILE
    if tiled:
        _pack_panels(q, x_scales, x_sums, columns, rows, tiled, scratch)
    for group in range(0, groups, 2):
        c, s = codes_at + group * pair, scales_at + group * pair_scales
        p, r = (pair, pair_scales) if group + 1 < groups else (0, 0)
        to = out_at + group * 16
        if tiled:
            _tiles(form, w, c, s, p, r, columns, tiled, scratch, out, to, out_step)
        for t in range(tiled, count):
            _one_token(form, w, c, s, columns, p, r, q, x_scales, x_sums, rows[t], out, to + t * out_step)
