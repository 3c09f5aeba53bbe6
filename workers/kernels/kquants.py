"""Products with K-quants (Q2_K to Q6_K): blocks of 256 columns with integer scales per 16 or 32.

See `planes` for the layout. A block's sum of scale * (sum of code * activation) is an exact integer;
then, in the order of the blocks and with the activations' scale h,

    acc = fma(float(sum), d * h, acc);  acc = fma(float(-sum of minimum * sum of activations), dmin * h, acc)

the second only where the format has minima. Activations are those of the ternary kernels, int8 in
blocks of 256; sums over 16 or 32 of them are made here once per call, not carried along.
"""

from __future__ import annotations

import numpy as np
from numba import literally

from .kernel import kernel
from .panels import TILE, copy_panels
from .planes import BLOCK, CHUNK_NBYTES, CHUNK_SCALES_NBYTES, OFFSETS, QUADS, SCALE_NBYTES, SUBS
from .simd.codes import store_dword, store_scalar, tile_add_scaled
from .simd.dot import dot_unsigned
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
    shift_left_i32,
    splat_f32,
    store_f32,
    store_i32,
    to_f32,
    zero_f32,
    zero_i32,
)
from .simd.planes import (
    D_AT,
    DMIN_AT,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    add_block,
    add_chunk,
    spread_chunk,
    spread_minima,
)
from .simd.tile import broadcast_tile, tile_dot_unsigned

_TILE = TILE
_first_tile = broadcast_tile(_TILE)
_tile_dot = tile_dot_unsigned(_TILE)
_add_scaled = tile_add_scaled(_TILE)
_times64 = shift_left_i32(6)

# What the kernels need of the activations besides themselves, dwords per token and block ("side"): 16
# of -offset * sum of 16 columns each; then, for formats with minima, the negated sums of the subs as
# 64 * high + low, which fits two signed bytes: dwords of four highs (two or four), then of lows.
_SIDE = 24
_LOWEST = 16

# Scratch: two groups' block of codes, one byte each; their scales as int32; their minima; a tile's sums;
# from _PANELS_AT on, for tiled tokens, panels of activations; then the sides of all tokens; then for
# tiled tokens their scales and the float sums of both groups.
_SCALES_AT = 2 * 64 * 64
_MINIMA_AT = _SCALES_AT + 2 * 16 * 64
_SUMS_AT = _MINIMA_AT + 2 * 4 * 64
_PANELS_AT = _SUMS_AT + 2 * _TILE * 64


def scratch_nbytes(columns: int, tokens: int) -> int:
    """Return the size of the scratch that `gemm` needs for up to `tokens` tokens."""
    blocks = -(-columns // BLOCK)
    return _PANELS_AT + tokens * (BLOCK * blocks + 4 * _SIDE * blocks + 4 * blocks + 128)


@kernel
def _sides(form, q, row, columns, scratch, at, step):
    """Write a token's sides: dword i of block b at `at` + (_SIDE b + i) * step."""
    offset = OFFSETS[form - Q2_K]
    subs, quads = SUBS[form - Q2_K], QUADS[form - Q2_K]
    for b in range(columns // BLOCK):
        place = at + b * _SIDE * step
        rest = 0
        for s in range(16):
            total = 0
            for i in range(16):
                total += q[row, b * BLOCK + s * 16 + i]
            store_dword(scratch, place + s * step, np.uint32(-offset * total))
            rest -= total
            if quads and (subs == 16 or s % 2 == 1):
                sub = s * subs // 16
                high = (rest + 32) >> 6
                to = place + (_LOWEST + sub // 4) * step + sub % 4
                scratch[to] = np.uint8(high & 255)
                scratch[to + quads * step] = np.uint8((rest - 64 * high) & 255)
                rest = 0


@kernel
def _one_token(
    form, w, codes_at, scales_at, columns, pair, pair_scales, q, x_scales, row, scratch, side, out, place
):
    """Compute one group of 16 rows, or two if `pair` is the bytes from one to the next, for one token."""
    literally(form)
    first = zero_f32()
    second = zero_f32()
    for b in range(columns // BLOCK):
        block = scales_at + b * SCALE_NBYTES[form - Q2_K]
        start = side + b * _SIDE * 4
        total = zero_i32()
        other = zero_i32()
        for c in range(8):
            at = codes_at + (b * 8 + c) * CHUNK_NBYTES[form - Q2_K]
            scale = block + c * CHUNK_SCALES_NBYTES[form - Q2_K]
            x = row * columns + b * BLOCK + c * 32
            total = add_chunk(form, total, w, at, scale, q, x, scratch, start + c * 8)
            other = add_chunk(form, other, w, at + pair, scale + pair_scales, q, x, scratch, start + c * 8)
        h = splat_f32(x_scales[row, b])
        lowest = start + _LOWEST * 4
        first = add_block(form, first, total, h, w, block, scratch, lowest)
        second = add_block(form, second, other, h, w, block + pair_scales, scratch, lowest)
    store_f32(out, 4 * place, first)
    if pair:
        store_f32(out, 4 * (place + 16), second)


@kernel
def _pack_panels(form, q, x_scales, columns, rows, count, scratch, sides_at, hs_at):
    """Copy tokens in eights to panels, and their sides and scales likewise."""
    blocks = columns // BLOCK
    copy_panels(q, columns, rows, count, scratch, _PANELS_AT)
    for t in range(count):
        tile, i = t // _TILE * _TILE, t % _TILE
        _sides(form, q, rows[t], columns, scratch, sides_at + tile * blocks * 4 * _SIDE + 4 * i, 4 * _TILE)
        for b in range(blocks):
            store_scalar(scratch, hs_at + 4 * (tile * blocks + b * _TILE + i), x_scales[rows[t], b])


@kernel
def _spread(form, w, codes_at, scales_at, scratch, place):
    """Write a block (16 rows) to scratch: codes one byte each, scales as int32, minima one byte each."""
    literally(form)
    for c in range(8):
        at = codes_at + c * CHUNK_NBYTES[form - Q2_K]
        scale = scales_at + c * CHUNK_SCALES_NBYTES[form - Q2_K]
        spread_chunk(form, w, at, scale, scratch, place * 4096 + c * 512, _SCALES_AT + place * 1024 + c * 128)
    if QUADS[form - Q2_K]:
        spread_minima(form, w, scales_at, scratch, _MINIMA_AT + place * 256)


@kernel
def _tile(subs, scratch, panel, side):
    """Leave the scaled sums of one block of two groups and eight tokens at _SUMS_AT."""
    for i in range(2 * _TILE):
        store_i32(scratch, _SUMS_AT + i * 64, zero_i32())
    for s in range(subs):
        tile = _first_tile(scratch, side + s * 4 * _TILE)
        at = s * (4096 // subs)
        for _ in range(16 // subs):
            for k in range(4):
                u = load_bytes(scratch, at + k * 64)
                v = load_bytes(scratch, at + 4096 + k * 64)
                tile = _tile_dot(tile, u, v, scratch, panel + k * 4 * _TILE)
            at += 256
            panel += 16 * _TILE
        scale = _SCALES_AT + s * (1024 // subs)
        _add_scaled(scratch, _SUMS_AT, tile, load_i32(scratch, scale), load_i32(scratch, scale + 1024))


@kernel
def _finish(quads, w, block, pair_scales, scratch, hs, lowest, acc_at):
    """Add the scaled sums of a block and tile to the float sums at acc_at, as simd.planes.add_block does.

    No piece: inlined, its branch would cost a count of references for every array.
    """
    for i in range(2 * _TILE):
        token, group = i % _TILE, i // _TILE
        at = block + group * pair_scales
        h = broadcast_f32(scratch, hs + 4 * token)
        to = acc_at + token * 128 + group * 64
        acc = load_f32(scratch, to)
        total = to_f32(load_i32(scratch, _SUMS_AT + i * 64))
        acc = fma_f32(total, mul_f32(load_f16(w, at + D_AT), h), acc)
        if quads:
            high, low = zero_i32(), zero_i32()
            side = lowest + 4 * token
            for n in range(quads):
                m = load_bytes(scratch, _MINIMA_AT + group * 256 + n * 64)
                high = dot_unsigned(high, m, broadcast_dword(scratch, side + n * 4 * _TILE))
                low = dot_unsigned(low, m, broadcast_dword(scratch, side + (quads + n) * 4 * _TILE))
            whole = to_f32(add_i32(_times64(high), low))
            acc = fma_f32(whole, mul_f32(load_f16(w, at + DMIN_AT), h), acc)
        store_f32(scratch, to, acc)


@kernel
def _tiles(form, w, codes_at, scales_at, pair, pair_scales, columns, count, scratch, sides_at, hs_at, out,
           place, out_step):  # fmt: skip
    """Compute two groups for `count` tokens, a multiple of eight, whose panels lie in scratch."""
    literally(form)
    blocks = columns // BLOCK
    subs, quads = SUBS[form - Q2_K], QUADS[form - Q2_K]
    acc_at = hs_at + 4 * count * blocks
    for t in range(count):
        store_f32(scratch, acc_at + t * 128, zero_f32())
        store_f32(scratch, acc_at + t * 128 + 64, zero_f32())
    for b in range(blocks):
        block = scales_at + b * SCALE_NBYTES[form - Q2_K]
        codes = codes_at + b * 8 * CHUNK_NBYTES[form - Q2_K]
        _spread(form, w, codes, block, scratch, 0)
        _spread(form, w, codes + pair, block + pair_scales, scratch, 1)
        for t in range(0, count, _TILE):
            side = sides_at + 4 * _SIDE * (t * blocks + b * _TILE)
            _tile(subs, scratch, _PANELS_AT + t * columns + b * BLOCK * _TILE, side)
            hs = hs_at + 4 * (t * blocks + b * _TILE)
            lowest = side + _LOWEST * 4 * _TILE
            _finish(quads, w, block, pair_scales, scratch, hs, lowest, acc_at + t * 128)
    for t in range(count):
        store_f32(out, 4 * (place + t * out_step), load_f32(scratch, acc_at + t * 128))
        if pair:
            store_f32(out, 4 * (place + t * out_step + 16), load_f32(scratch, acc_at + t * 128 + 64))


@kernel
def _gemm(
    form, w, codes_at, scales_at, groups, columns, q, x_scales, rows, count, scratch, out, out_at, out_step
):
    literally(form)
    blocks = columns // BLOCK
    pair = blocks * 8 * CHUNK_NBYTES[form - Q2_K]
    pair_scales = blocks * SCALE_NBYTES[form - Q2_K]
    tiled = count // _TILE * _TILE
    sides_at = _PANELS_AT + tiled * columns
    hs_at = sides_at + count * blocks * 4 * _SIDE
    if tiled:
        _pack_panels(form, q, x_scales, columns, rows, tiled, scratch, sides_at, hs_at)
    for t in range(tiled, count):
        _sides(form, q, rows[t], columns, scratch, sides_at + t * blocks * 4 * _SIDE, 4)
    for group in range(0, groups, 2):
        c, s = codes_at + group * pair, scales_at + group * pair_scales
        p, r = (pair, pair_scales) if group + 1 < groups else (0, 0)
        to = out_at + group * 16
        if tiled:
            _tiles(form, w, c, s, p, r, columns, tiled, scratch, sides_at, hs_at, out, to, out_step)
        for t in range(tiled, count):
            side, place = sides_at + t * blocks * 4 * _SIDE, to + t * out_step
            _one_token(form, w, c, s, columns, p, r, q, x_scales, rows[t], scratch, side, out, place)


def _gemm_of(number):
    """Return the product of the format `number` alone: each is compiled only when a model holds it."""

    @kernel
    def gemm(
        form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out,
        out_at, out_step,
    ):  # fmt: skip
        """out[t, :] = W @ x[rows[t]] for t < count; arguments as ternary.gemm."""
        _gemm(
            number, w, codes_at, scales_at, groups, columns, q, x_scales, rows, count, scratch, out, out_at,
            out_step,
        )  # fmt: skip

    return gemm


GEMMS = {number: _gemm_of(number) for number in (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)}
