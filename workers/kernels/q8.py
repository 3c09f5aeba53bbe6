"""Q8_0 matrices, sixteen rows interleaved: [group][column / 4][16 rows][4 weights], then scales.

A weight is stored as int8 + 128, an unsigned byte: vpdpbusd takes it as it is. Scales are float16,
[group][block of 32 columns][16 rows], after all weights.
"""

from __future__ import annotations

import numpy as np

from .kernel import kernel, piece
from .simd.dot import OFFSET_IN_DOT, dot_offset
from .simd.ops import (
    add_i32,
    broadcast_dword,
    broadcast_f32,
    fma_f32,
    load_bytes,
    load_f16,
    load_f32,
    load_i32,
    mul_f32,
    splat_f32,
    splat_i32,
    store_f32,
    to_f32,
    zero_f32,
    zero_i32,
)
from .simd.tile import broadcast_tile, store_tile, tile_dot_offset

BLOCK = 32
# Where the dot product takes the bytes as they are, 128 times the activations' sum is taken off.
OFFSET = np.int32(0 if OFFSET_IN_DOT else -128)


def codes_nbytes(rows: int, columns: int) -> int:
    """Return the size of the weight area; `rows` is padded to 16, `columns` a multiple of 32."""
    return -(-rows // 16) * 16 * columns


def scales_nbytes(rows: int, columns: int) -> int:
    """Return the size of the scale area."""
    return -(-rows // 16) * 16 * (columns // BLOCK) * 2


_TILE = 8
_first_tile = broadcast_tile(_TILE)
_tile_dot = tile_dot_offset(_TILE)
_store_tile = store_tile(2 * _TILE)
# Scratch: a tile's sums; then for eight tokens at a time the panels, [block][token] starting values,
# [block][token] scales.
_PANELS_AT = 2 * _TILE * 64


def scratch_nbytes(columns: int, tokens: int) -> int:
    """Return the size of the scratch that `gemm` needs for up to `tokens` tokens."""
    return _PANELS_AT + tokens * (columns + 8 * (columns // BLOCK) + 128)


@kernel
def _pack_panels(q, x_scales, x_sums, columns, rows, count, scratch):
    """Copy tokens in eights: [column / 4][token][4 int8] each, with their starts and scales behind."""
    blocks = columns // BLOCK
    quads = columns // 4
    words = q.view(np.int32)
    panels = scratch[_PANELS_AT:].view(np.int32)
    starts = panels[count * quads :]
    scales = scratch[_PANELS_AT + count * (columns + 4 * blocks) :].view(np.float32)
    for t in range(0, count, _TILE):
        for i in range(_TILE):
            row = rows[t + i]
            for k in range(quads):
                panels[t * quads + k * _TILE + i] = words[row, k]
            for b in range(blocks):
                starts[t * blocks + b * _TILE + i] = OFFSET * x_sums[row, b]
                scales[t * blocks + b * _TILE + i] = x_scales[row, b]


@piece
def _one_token(w, codes, scales, columns, pair, q, x_scales, x_sums, row, out, place):
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
    store_f32(out, 4 * place, a)
    if pair:
        store_f32(out, 4 * (place + 16), d)


@kernel
def _tiles(w, codes, scales, pair, columns, count, scratch, out, place, out_step):
    """Compute two groups for `count` tokens, a multiple of eight, whose panels lie in scratch."""
    blocks = columns // BLOCK
    starts_at = _PANELS_AT + count * columns
    scales_at = starts_at + 4 * count * blocks
    acc_at = scales_at + 4 * count * blocks
    for t in range(0, count, _TILE):
        for i in range(2 * _TILE):
            store_f32(scratch, acc_at + i * 64, zero_f32())
        for b in range(blocks):
            side = 4 * (t * blocks + b * _TILE)
            panel = _PANELS_AT + t * columns + b * BLOCK * _TILE
            tile = _first_tile(scratch, starts_at + side)
            for k in range(8):
                at = codes + b * 512 + k * 64
                u = load_bytes(w, at)
                v = load_bytes(w, at + pair)
                tile = _tile_dot(tile, u, v, scratch, panel + k * 4 * _TILE)
            _store_tile(scratch, 0, tile)
            first = load_f16(w, scales + b * 32)
            second = load_f16(w, scales + pair // 16 + b * 32)
            for i in range(_TILE):
                x_scale = broadcast_f32(scratch, scales_at + side + 4 * i)
                at = acc_at + i * 128
                a = to_f32(load_i32(scratch, i * 64))
                d = to_f32(load_i32(scratch, (_TILE + i) * 64))
                store_f32(scratch, at, fma_f32(a, mul_f32(first, x_scale), load_f32(scratch, at)))
                at += 64
                store_f32(scratch, at, fma_f32(d, mul_f32(second, x_scale), load_f32(scratch, at)))
        for i in range(_TILE):
            to = 4 * (place + (t + i) * out_step)
            store_f32(out, to, load_f32(scratch, acc_at + i * 128))
            if pair:
                store_f32(out, to + 64, load_f32(scratch, acc_at + i * 128 + 64))


@kernel
def gemm(
    form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out, out_at,
    out_step,
):  # fmt: skip
    """out[t, :] = W @ x[rows[t]] for t < count; arguments as ternary.gemm, blocks of 32 columns."""
    tiled = count // _TILE * _TILE
    if tiled:
        _pack_panels(q, x_scales, x_sums, columns, rows, tiled, scratch)
    for group in range(0, groups, 2):
        codes = codes_at + group * columns * 16
        scales = scales_at + group * columns
        pair = columns * 16 if group + 1 < groups else 0
        place = out_at + group * 16
        if tiled:
            _tiles(w, codes, scales, pair, columns, tiled, scratch, out, place, out_step)
        for t in range(tiled, count):
            _one_token(
                w, codes, scales, columns, pair, q, x_scales, x_sums, rows[t], out, place + t * out_step
            )
