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

from ..kernel import inner, kernel, merged, named
from ..scratch import K_SIDE, kquants_nbytes
from ..simd.codes import store_dword
from ..simd.groups import GROUPS, SPREAD, TOKENS, load_codes, load_scales
from ..simd.ops import splat_f32, store_f32, zero_f32, zero_i32
from ..simd.planes import (
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
from ..simd.subs import PAIRS, load_tile, tile_add_scaled, tile_dot_scales, tile_dot_sub
from ..simd.tile import start_tile, store_tile, tile_dot, tile_finish, tile_shift, zero_tile
from .areas import AREAS_AT, aligned, clear, fill_area, totals_at, write
from .planes import BLOCK, CHUNK_NBYTES, CHUNK_SCALES_NBYTES, OFFSETS, QUADS, SCALE_NBYTES, SUBS

_zeros = zero_tile(TOKENS)
_times4, _times32, _times64 = tile_shift(2), tile_shift(5), tile_shift(6)
_store = store_tile(TOKENS * GROUPS)
# How many quartets of columns `tile_dot_sub` may add up: those with one scale, and with PAIRS no more than
# fit int16, 2 * 127 times the largest code each.
_QUADS_OF_SUM = (4, 4, 8, 4, 2) if PAIRS else (4, 4, 8, 8, 4)

# What the kernels need of the activations besides themselves, dwords per token and block ("side"): 16
# of -offset * sum of 16 columns each; then, for formats with minima, the negated sums of the subs as
# 64 * high + low, which fits two signed bytes: dwords of four highs (two or four), then of lows; or with
# PAIRS for those with an offset, the negated sums of 16 columns, two int16 in a dword.
_SIDE = K_SIDE
_LOWEST = 16

# Scratch, from `aligned`: a block's codes of GROUPS groups, one byte each, SPREAD apart; their scales as
# int32 and their minima; a tile's sums, [token][group][16 rows]; the area of the tiled tokens (see
# `areas`); then the sides of all tokens.
_SCALES_AT = AREAS_AT
_SCALES = 16 * 64
_MINIMA_AT = _SCALES_AT + GROUPS * _SCALES
_MINIMA = 4 * 64
_SUMS_AT = _MINIMA_AT + GROUPS * _MINIMA
_AREA_AT = _SUMS_AT + TOKENS * GROUPS * 64


def scratch_nbytes(columns: int, tokens: int) -> int:
    """Return the size of the scratch that `gemm` needs for up to `tokens` tokens."""
    return kquants_nbytes(columns, tokens, GROUPS, TOKENS)


@kernel
def _sides(form, q, row, columns, scratch, at, step):
    """Write a token's sides: dword i of block b at `at` + (_SIDE b + i) * step."""
    offset = OFFSETS[form - Q2_K]
    subs, quads = SUBS[form - Q2_K], QUADS[form - Q2_K]
    for b in range(columns // BLOCK):
        side_at = at + b * _SIDE * step
        rest = 0
        for s in range(16):
            total = 0
            for i in range(16):
                total += q[row, b * BLOCK + s * 16 + i]
            store_dword(scratch, side_at + s * step, np.uint32(-offset * total))
            if PAIRS and offset:
                to = side_at + (_LOWEST + s // 2) * step + s % 2 * 2
                scratch[to] = np.uint8(-total & 255)
                scratch[to + 1] = np.uint8((-total >> 8) & 255)
            rest -= total
            if quads and (subs == 16 or s % 2 == 1):
                sub = s * subs // 16
                high = (rest + 32) >> 6
                to = side_at + (_LOWEST + sub // 4) * step + sub % 4
                scratch[to] = np.uint8(high & 255)
                scratch[to + quads * step] = np.uint8((rest - 64 * high) & 255)
                rest = 0


@kernel
def _one_token(
    form, w, codes_at, scales_at, columns, pair, pair_scales, q, x_scales, row, scratch, side, out, element
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
    store_f32(out, 4 * element, first)
    if pair:
        store_f32(out, 4 * (element + 16), second)


@inner
def _spread(form, w, codes_at, scales_at, scratch, base, group):
    """Write a block (16 rows) to scratch: codes one byte each, scales as int32, minima one byte each."""
    literally(form)
    for c in range(8):
        at = codes_at + c * CHUNK_NBYTES[form - Q2_K]
        scale = scales_at + c * CHUNK_SCALES_NBYTES[form - Q2_K]
        to = base + _SCALES_AT + group * _SCALES + c * 128
        spread_chunk(form, w, at, scale, scratch, base + group * SPREAD + c * 512, to)
    if QUADS[form - Q2_K]:
        spread_minima(form, w, scales_at, scratch, base + _MINIMA_AT + group * _MINIMA)


@merged
def _first_sums(form, scratch, base, side):
    """Return what the sums of a block begin with: with PAIRS, what the codes' offset takes off."""
    tile = _zeros()
    if PAIRS and OFFSETS[form - Q2_K]:
        for j in range(8):
            at = base + _SCALES_AT + j * 128
            tile = tile_dot_scales(tile, scratch, at, scratch, side + (_LOWEST + j) * 4 * TOKENS)
        return _times4(tile) if form == Q3_K else _times32(tile)
    return tile


@merged
def _scaled_sums(form, scratch, base, panel, side):
    """Return the scaled sums of one block of GROUPS groups for TOKENS tokens."""
    literally(form)
    subs, quads = SUBS[form - Q2_K], _QUADS_OF_SUM[form - Q2_K]
    sums = base + _SUMS_AT
    _store(scratch, sums, _first_sums(form, scratch, base, side))
    for part in range(64 // quads):
        sub = part * quads * subs // 64
        tile = _zeros() if PAIRS else start_tile(_zeros(), scratch, side + sub * 4 * TOKENS)
        for k in range(part * quads, part * quads + quads):
            codes = load_codes(scratch, base + k * 64, SPREAD)
            tile = tile_dot_sub(tile, codes, scratch, panel + k * 4 * TOKENS)
        tile_add_scaled(scratch, sums, tile, base + _SCALES_AT + sub * (_SCALES // subs), _SCALES)
    return load_tile(_zeros(), scratch, sums)


@merged
def _minima_sums(quads, scratch, base, lowest):
    """Return the sums of minimum * negated sum of activations, as _sides leaves these at `lowest`."""
    minima = base + _MINIMA_AT
    tile = _zeros()
    for n in range(quads):
        m = load_codes(scratch, minima + n * 64, _MINIMA)
        tile = tile_dot(tile, m, scratch, lowest + n * 4 * TOKENS)
    tile = _times64(tile)
    for n in range(quads):
        m = load_codes(scratch, minima + n * 64, _MINIMA)
        tile = tile_dot(tile, m, scratch, lowest + (quads + n) * 4 * TOKENS)
    return tile


@inner
def _tiles(form, w, codes_at, scales_at, pair, pair_scales, here, columns, count, scratch, base, sides_at,
           out, element, out_step):  # fmt: skip
    """Compute `here` of GROUPS groups for `count` tokens, a multiple of TOKENS, whose area is filled.

    The float sums take the two fma of simd.planes.add_block.
    """
    literally(form)
    blocks = columns // BLOCK
    quads = QUADS[form - Q2_K]
    area = base + _AREA_AT
    totals = totals_at(area, count, columns, BLOCK)
    clear(scratch, totals, count)
    for b in range(blocks):
        block = scales_at + b * SCALE_NBYTES[form - Q2_K]
        codes = codes_at + b * 8 * CHUNK_NBYTES[form - Q2_K]
        for g in range(GROUPS):
            _spread(form, w, codes + g * pair, block + g * pair_scales, scratch, base, g)
        for t in range(0, count, TOKENS):
            side = sides_at + 4 * _SIDE * (t * blocks + b * TOKENS)
            total = totals + t * 64 * GROUPS
            h = area + count * (columns + 4 * blocks) + 4 * (b * count + t)
            tile = _scaled_sums(form, scratch, base, area + b * BLOCK * count + t * BLOCK, side)
            tile_finish(tile, load_scales(w, block + D_AT, pair_scales), scratch, h, scratch, total)
            if quads:
                tile = _minima_sums(quads, scratch, base, side + _LOWEST * 4 * TOKENS)
                tile_finish(tile, load_scales(w, block + DMIN_AT, pair_scales), scratch, h, scratch, total)
    write(w, 0, False, scratch, totals, count, here, out, element, out_step)


@kernel
def _gemm(
    form, w, codes_at, scales_at, groups, columns, q, x_scales, x_sums, rows, count, scratch, out, out_at,
    out_step,
):  # fmt: skip
    literally(form)
    blocks = columns // BLOCK
    size = blocks * 8 * CHUNK_NBYTES[form - Q2_K]
    size_scales = blocks * SCALE_NBYTES[form - Q2_K]
    tiled = count // TOKENS * TOKENS
    base = aligned(scratch)
    sides_at = base + _AREA_AT
    if tiled:
        sides_at = fill_area(
            _zeros(), q, x_scales, x_sums, columns, BLOCK, rows, 0, tiled, 0, scratch, sides_at
        )
    for t in range(count):
        at, step = sides_at + t * blocks * 4 * _SIDE, 4
        if t < tiled:
            at, step = sides_at + t // TOKENS * TOKENS * blocks * 4 * _SIDE + t % TOKENS * 4, 4 * TOKENS
        _sides(form, q, rows[t], columns, scratch, at, step)
    for group in range(0, groups, 2):
        here = min(2, groups - group)
        pair, pair_scales = (size, size_scales) if here == 2 else (0, 0)
        for g in range(group, group + here if tiled else group, GROUPS):
            _tiles(
                form, w, codes_at + g * size, scales_at + g * size_scales, pair, pair_scales,
                min(GROUPS, here), columns, tiled, scratch, base, sides_at, out, out_at + g * 16, out_step,
            )  # fmt: skip
        c, s = codes_at + group * size, scales_at + group * size_scales
        for t in range(tiled, count):
            side, to = sides_at + t * blocks * 4 * _SIDE, out_at + group * 16 + t * out_step
            _one_token(
                form, w, c, s, columns, pair, pair_scales, q, x_scales, rows[t], scratch, side, out, to
            )


def _gemm_of(number):
    """Return the product of the format `number` alone: each is compiled only when a model holds it."""

    def gemm(
        form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out,
        out_at, out_step,
    ):  # fmt: skip
        """out[t, :] = W @ x[rows[t]] for t < count; arguments as ternary.gemm."""
        _gemm(
            number, w, codes_at, scales_at, groups, columns, q, x_scales, x_sums, rows, count, scratch, out,
            out_at, out_step,
        )  # fmt: skip

    return kernel(named(gemm, number))


GEMMS = {number: _gemm_of(number) for number in (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)}
