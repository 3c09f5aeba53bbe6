"""TL1: ternary matrices of two bits a weight, sixteen rows interleaved.

For each group of 16 rows and each block of 256 columns 1,024 bytes of codes: 16 times
[16 rows][4 bytes]; bits 2s..2s+1 of byte j hold the code (weight + 1) of column 16 kb + 4 s + j.
A 32-bit lane is one row, so that one broadcast dword of activations serves sixteen rows and no
sum runs across lanes. Scales lie apart from the codes. TL1: float16, [group][block][16 rows].
TL1_ROW, for models with a scale per row or matrix: float32, [group][16 rows].

A field is masked where it lies in its byte: its sums are then 1, 4, 16 or 64 times too large, exactly,
and shifted down once in a block. int32 holds them up to 131,072 columns (see `_fields`). A column more or
fewer tokens, or another kernel in here, changes no bit of a result: the sums are exact, and every kernel
adds fma(float(sum), row's scale * token's scale, total) in the order of the activations' blocks, then
multiplies with TL1_ROW's scale.
"""

from __future__ import annotations

import numpy as np

from ..kernel import inner, kernel, merged
from ..simd.dot import SMALL_CODES
from ..simd.dwords import load_quads
from ..simd.groups import GROUPS, TOKENS, field, load_codes, load_scales, no_scales, spread_codes
from ..simd.tile import (
    start_tile,
    tile_add,
    tile_dot,
    tile_dot_quad,
    tile_finish,
    tile_shift,
    tokens_of,
    zero_tile,
)
from ..target import TARGET
from .areas import AREAS_AT, BLOCK, aligned, clear, fill_area, scratch_nbytes, tile_spread, totals_at, write

__all__ = ["BLOCK", "TL1", "TL1_ROW", "gemm", "pack", "pack_row", "scratch_nbytes"]

TL1, TL1_ROW = 4, 6


def codes_nbytes(rows: int, columns: int) -> int:
    """Return the size of the code area; `rows` is padded to 16, `columns` a multiple of 256."""
    return -(-rows // 16) * 16 * columns // 4


def scales_nbytes(rows: int, columns: int) -> int:
    """Return the size of the scale area of TL1."""
    return -(-rows // 16) * 16 * (columns // BLOCK) * 2


def row_scales_nbytes(rows: int) -> int:
    """Return the size of the scale area of TL1_ROW."""
    return -(-rows // 16) * 16 * 4


@kernel
def _pack_codes(codes, out, codes_at):
    rows, columns = codes.shape
    for group in range((rows + 15) // 16):
        for lane in range(16):
            row = group * 16 + lane
            for kb in range(columns // 16):
                at = codes_at + (group * (columns // 16) + kb) * 64 + lane * 4
                for j in range(4):
                    byte = 0x55
                    if row < rows:
                        byte = 0
                        for s in range(4):
                            byte |= np.int64(codes[row, kb * 16 + 4 * s + j]) << (2 * s)
                    out[at + j] = byte


@kernel
def pack(codes, scale_bits, out, codes_at, scales_at):
    """Pack `codes` (uint8 0..2, (N, K)) and float16 scales (as uint16 bits, (N, K/256)) into `out`.

    Rows beyond N up to the next multiple of 16 become zero weights with scale 0.
    """
    _pack_codes(codes, out, codes_at)
    rows, columns = codes.shape
    blocks = columns // BLOCK
    for row in range((rows + 15) // 16 * 16):
        for block in range(blocks):
            at = scales_at + ((row // 16 * blocks + block) * 16 + row % 16) * 2
            bits = scale_bits[row, block] if row < rows else np.uint16(0)
            out[at] = bits & np.uint16(0xFF)
            out[at + 1] = bits >> np.uint16(8)


@kernel
def pack_row(codes, row_scales, out, codes_at, scales_at):
    """Pack `codes` (uint8 0..2, (N, K)) and float32 scales (N,) into `out` as TL1_ROW.

    Rows beyond N up to the next multiple of 16 become zero weights with scale 0.
    """
    _pack_codes(codes, out, codes_at)
    rows = codes.shape[0]
    words = row_scales.view(np.uint32)
    for row in range((rows + 15) // 16 * 16):
        bits = np.int64(words[row]) if row < rows else 0
        for i in range(4):
            out[scales_at + 4 * row + i] = (bits >> (8 * i)) & 0xFF


_first = field(0x03)
_second = field(0x0C)
# `_fields` takes the fourth field, _upper, _lower, the first; the quads are the fields' columns in 16.
if TARGET == "neon":
    # Codes must stay small: the top field is shifted down, which takes no mask there.
    _third, _fourth = field(0x30), field(0x03, 6)
    _upper, _UPPER_QUAD, _lower, _LOWER_QUAD = _third, 8, _second, 4
    _to_upper, _to_first, _up = tile_shift(4), tile_shift(-2), tile_shift(0)
    _add_upper = tile_add(4, 0)
    PAIR_START, TILE_START = 16, 1  # how many times too large the first sums of `_few` and `_fields` are
elif SMALL_CODES:
    # Codes must stay small: the upper two fields are shifted down to where the lower two lie.
    _third, _fourth = field(0x03, 4), field(0x0C, 4)
    _upper, _UPPER_QUAD, _lower, _LOWER_QUAD = _second, 4, _third, 8
    _to_upper, _to_first, _up = tile_shift(0), tile_shift(0), tile_shift(2)
    _add_upper = tile_add(0, 2)
    PAIR_START, TILE_START = 1, 4
else:
    _third, _fourth = field(0x30), field(0xC0 - 256)
    _upper, _UPPER_QUAD, _lower, _LOWER_QUAD = _third, 8, _second, 4
    _to_upper, _to_first, _up = tile_shift(-2), tile_shift(-2), tile_shift(6)
    _add_upper = tile_add(0, 2, 4)
    PAIR_START, TILE_START = 16, 64
_down2 = tile_shift(-2)
_add, _add_quarter = tile_add(), tile_add(0, 2)
_dot_first, _dot_second, _dot_third, _dot_fourth = (tile_dot_quad(quad) for quad in range(4))
_low2, _low3, _low4 = field(0x03, 2), field(0x03, 4), field(0x03, 6)
_zero1, _zero2, _zero4, _zeros = zero_tile(1), zero_tile(2), zero_tile(4), zero_tile(TOKENS)
_CHUNK = 1024  # columns at most whose fields `_fields` takes one after the other: all stays in L1


@merged
def _offsets(group, last, columns, by_row, codes_at, scales_at):
    """Return where the groups from `group` lie: codes, scales, bytes to the second, how many of GROUPS."""
    scales = scales_at + group * (64 if by_row else columns // BLOCK * 32)
    here = min(GROUPS, last - group)
    return codes_at + group * columns * 4, scales, columns * 4 if here > 1 else 0, here


# The kernels below compute the groups first..last - 1 for the tokens of one area of scratch, and write them
# from element `element` of out, a token's row `out_step` after the other's.


@inner
def _one(
    w, codes_at, scales_at, first, last, columns, span, by_row, scratch, area, out, element, out_step
):  # fmt: skip
    """Compute one token: the four fields at once."""
    spans = columns // span
    totals = totals_at(area, 1, columns, span)
    for group in range(first, last, GROUPS):
        codes, scales, pair, here = _offsets(group, last, columns, by_row, codes_at, scales_at)
        clear(scratch, totals, 1)
        for b in range(spans):
            c0 = start_tile(_zero1(), scratch, area + columns + 4 * b)
            c1, c2, c3 = _zero1(), _zero1(), _zero1()
            at, x = codes + b * span * 4, area + b * span
            for kb in range(span // 16):
                v = load_codes(w, at + kb * 64, pair)
                quads = load_quads(scratch, x + kb * 16)
                c0 = _dot_first(c0, _first(v), scratch, quads)
                c1 = _dot_second(c1, _second(v), scratch, quads)
                c2 = _dot_third(c2, _third(v), scratch, quads)
                c3 = _dot_fourth(c3, _fourth(v), scratch, quads)
            c0 = _add(_add_quarter(c0, c1), _add_upper(c2, c3))
            weights = no_scales() if by_row else load_scales(w, scales + b * 32, pair // 32)
            tile_finish(c0, weights, scratch, area + columns + 4 * (spans + b), scratch, totals)
        write(w, scales, by_row, scratch, totals, 1, here, out, element + group * 16, out_step)


if TARGET == "avx2":
    from .ternary_pairs import one_token as _one


@inner
def _few(
    like, w, codes_at, scales_at, first, last, columns, span, by_row, scratch, area, out, element, out_step
):  # fmt: skip
    """Compute one tile of two or four tokens, as `like` has: two fields at once, the upper ones first."""
    tokens, spans = tokens_of(like), columns // span
    totals = totals_at(area, tokens, columns, span)
    for group in range(first, last, GROUPS):
        codes, scales, pair, here = _offsets(group, last, columns, by_row, codes_at, scales_at)
        clear(scratch, totals, tokens)
        for b in range(spans):
            at, panel = codes + b * span * 4, area + b * span * tokens
            c = start_tile(like, scratch, area + tokens * (columns + 4 * b))
            d = like
            for kb in range(span // 16):
                v = load_codes(w, at + kb * 64, pair)
                c = tile_dot(c, _third(v), scratch, panel + (kb * 16 + 8) * tokens)
                d = tile_dot(d, _fourth(v), scratch, panel + (kb * 16 + 12) * tokens)
            c = _add_upper(c, d)
            d = like
            for kb in range(span // 16):
                v = load_codes(w, at + kb * 64, pair)
                c = tile_dot(c, _first(v), scratch, panel + kb * 16 * tokens)
                d = tile_dot(d, _second(v), scratch, panel + (kb * 16 + 4) * tokens)
            c = _add_quarter(c, d)
            weights = no_scales() if by_row else load_scales(w, scales + b * 32, pair // 32)
            tile_finish(c, weights, scratch, area + tokens * (columns + 4 * (spans + b)), scratch, totals)
        write(w, scales, by_row, scratch, totals, tokens, here, out, element + group * 16, out_step)


@inner
def _fields(
    w, codes_at, scales_at, first, last, columns, span, by_row, count, scratch, area, out, element, out_step
):  # fmt: skip
    """Compute `count` tokens, a multiple of TOKENS, one field after the other.

    Between two fields the sums shift to the next one's bits of its byte.
    The largest sum is that of a whole row, shifted up again for the next chunk: below
    64 * (128 * columns + 256 * _CHUNK).
    """
    spans = columns // span
    starts = area + count * columns
    totals = totals_at(area, count, columns, span)
    for group in range(first, last, GROUPS):
        codes, scales, pair, here = _offsets(group, last, columns, by_row, codes_at, scales_at)
        clear(scratch, totals, count)
        for b in range(spans):
            weights = no_scales() if by_row else load_scales(w, scales + b * 32, pair // 32)
            for t in range(0, count, TOKENS):
                c = start_tile(_zeros(), scratch, starts + 4 * (b * count + t))
                chunk = 0
                while chunk < span:
                    if chunk:
                        c = _up(c)
                    size = _CHUNK if span - chunk >= _CHUNK else BLOCK
                    at = codes + (b * span + chunk) * 4
                    panel = area + b * span * count + t * span + chunk * TOKENS
                    n = _fourth(load_codes(w, at, pair))
                    for kb in range(size // 16):
                        v, n = n, _fourth(load_codes(w, at + (kb * 64 + 64 & size * 4 - 1), pair))
                        c = tile_dot(c, v, scratch, panel + (kb * 16 + 12) * TOKENS)
                    c = _to_upper(c)
                    n = _upper(load_codes(w, at, pair))
                    for kb in range(size // 16):
                        v, n = n, _upper(load_codes(w, at + (kb * 64 + 64 & size * 4 - 1), pair))
                        c = tile_dot(c, v, scratch, panel + (kb * 16 + _UPPER_QUAD) * TOKENS)
                    c = _down2(c)
                    n = _lower(load_codes(w, at, pair))
                    for kb in range(size // 16):
                        v, n = n, _lower(load_codes(w, at + (kb * 64 + 64 & size * 4 - 1), pair))
                        c = tile_dot(c, v, scratch, panel + (kb * 16 + _LOWER_QUAD) * TOKENS)
                    c = _to_first(c)
                    n = _first(load_codes(w, at, pair))
                    for kb in range(size // 16):
                        v, n = n, _first(load_codes(w, at + (kb * 64 + 64 & size * 4 - 1), pair))
                        c = tile_dot(c, v, scratch, panel + kb * 16 * TOKENS)
                    chunk += size
                side = starts + 4 * (spans * count + b * count + t)
                tile_finish(c, weights, scratch, side, scratch, totals + t * 64 * GROUPS)
        write(w, scales, by_row, scratch, totals, count, here, out, element + group * 16, out_step)


@merged
def _spread_dot(tile, field, scratch, tile_at, panel):
    """Store the field of the codes, and add its products with the panel."""
    spread_codes(scratch, tile_at, field)
    return tile_dot(tile, field, scratch, panel)


@inner
def _tiles(
    w, codes_at, scales_at, first, last, columns, by_row, count, scratch, base, area, out, element, out_step
):  # fmt: skip
    """Compute `count` tokens, a multiple of TOKENS, with each block's codes spread once to a byte each."""
    blocks = columns // BLOCK
    starts = area + count * columns
    totals = totals_at(area, count, columns, BLOCK)
    for group in range(first, last, GROUPS):
        codes, scales, pair, here = _offsets(group, last, columns, by_row, codes_at, scales_at)
        clear(scratch, totals, count)
        for b in range(blocks):
            weights = no_scales() if by_row else load_scales(w, scales + b * 32, pair // 32)
            panel, start = area + b * BLOCK * count, starts + 4 * b * count
            c = start_tile(_zeros(), scratch, start)
            for kb in range(16):
                v = load_codes(w, codes + b * 1024 + kb * 64, pair)
                c = _spread_dot(c, _first(v), scratch, base + kb * 256, panel + kb * 16 * TOKENS)
                c = _spread_dot(c, _low2(v), scratch, base + kb * 256 + 64, panel + (kb * 16 + 4) * TOKENS)
                c = _spread_dot(c, _low3(v), scratch, base + kb * 256 + 128, panel + (kb * 16 + 8) * TOKENS)
                c = _spread_dot(c, _low4(v), scratch, base + kb * 256 + 192, panel + (kb * 16 + 12) * TOKENS)
            tile_finish(c, weights, scratch, start + 4 * blocks * count, scratch, totals)
            for t in range(TOKENS, count, TOKENS):
                here_scales = start + 4 * (blocks * count + t)
                tile_spread(
                    weights, scratch, base, panel + t * BLOCK, start + 4 * t, here_scales,
                    totals + t * 64 * GROUPS,
                )  # fmt: skip
        write(w, scales, by_row, scratch, totals, count, here, out, element + group * 16, out_step)


@kernel
def gemm(
    form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out, out_at,
    out_step,
):  # fmt: skip
    """out[t, :] = W @ x[rows[t]] for t < count; every token gets the same bits in any batch.

    The signature is that of all products. form: TL1 or TL1_ROW; w: uint8 arena; groups: padded rows / 16;
    x: not read; q: int8 (tokens, columns) with x_scales (float32) and x_sums (int32), both (tokens,
    columns/256), or with TL1_ROW (tokens, 1): one scale and sum for a token, which is faster; rows: int32;
    scratch: uint8, see scratch_nbytes; out: float32, row t starts at element out_at + t * out_step and is
    16 * groups long. Sums are exact integers; scales are applied in block order, TL1_ROW's at the end.
    """
    by_row = form != TL1
    span = columns // x_scales.shape[1] if by_row else BLOCK
    done = 0
    many = count // TOKENS * TOKENS
    four = (count - many) // 4 * 4
    two = (count - many - four) // 2 * 2
    one = count - many - four - two
    # One tile is done sooner than its codes are spread; and a row's sum is not finished block by block.
    spread = span == BLOCK and many > TOKENS
    base = aligned(scratch)
    area8 = base + AREAS_AT
    area4 = area2 = area1 = area8
    if many:
        start = 1 if spread else TILE_START
        area4 = area2 = area1 = fill_area(
            _zeros(), q, x_scales, x_sums, columns, span, rows, done, many, start, scratch, area8
        )
        done += many
    start = PAIR_START if four or two else 1
    if four:
        area2 = area1 = fill_area(
            _zero4(), q, x_scales, x_sums, columns, span, rows, done, four, start, scratch, area4
        )
        done += four
    if two:
        area1 = fill_area(
            _zero2(), q, x_scales, x_sums, columns, span, rows, done, two, start, scratch, area2
        )
        done += two
    if one:
        fill_area(_zero1(), q, x_scales, x_sums, columns, span, rows, done, one, one, scratch, area1)
    # All tokens meet a group's codes before the next ones are read; a single size of tile walks by itself.
    alone = (many > 0) + (four > 0) + (two > 0) + one == 1
    step = groups if alone else GROUPS
    for first in range(0, groups, step):
        last = min(first + step, groups)
        if spread:
            _tiles(
                w, codes_at, scales_at, first, last, columns, by_row, many, scratch, base, area8, out, out_at,
                out_step,
            )  # fmt: skip
        elif many:
            _fields(
                w, codes_at, scales_at, first, last, columns, span, by_row, many, scratch, area8, out, out_at,
                out_step,
            )  # fmt: skip
        if four:
            _few(
                _zero4(), w, codes_at, scales_at, first, last, columns, span, by_row, scratch, area4, out,
                out_at + many * out_step, out_step,
            )  # fmt: skip
        if two:
            _few(
                _zero2(), w, codes_at, scales_at, first, last, columns, span, by_row, scratch, area2, out,
                out_at + (many + four) * out_step, out_step,
            )  # fmt: skip
        if one:
            _one(
                w, codes_at, scales_at, first, last, columns, span, by_row, scratch, area1, out,
                out_at + (count - 1) * out_step, out_step,
            )  # fmt: skip
