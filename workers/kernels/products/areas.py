"""The scratch of products over packed codes, and the tile that multiplies spread codes in it.

Scratch, from its first byte at a multiple of 64: the codes of one block of GROUPS groups, one byte each,
[group][column / 4][16 rows][4 codes]; then one area for each size of tile in use. An area holds for its
`count` tokens

    panels   int8     [span][tile][column / 4][token of the tile][4]
    starts   int32    [span][token]    the negated sum of the span's activations, perhaps scaled up
    scales   float32  [span][token]
    totals   float32  [token][group][16 rows], from a multiple of 64

A span is what has one scale: a block of 256 columns, or the whole row.
"""

from __future__ import annotations

import numpy as np

from ..kernel import inner, merged
from ..scratch import areas_nbytes
from ..simd.groups import GROUPS, SPREAD, TOKENS, load_codes
from ..simd.ops import address, load_f32, mul_f32, splat_f32, store_f32, zero_f32
from ..simd.tile import copy_column, copy_panel, start_tile, tile_dot, tile_finish, tokens_of, zero_tile

BLOCK = 256
AREAS_AT = GROUPS * SPREAD
"""Where the first area begins, counted from `aligned`."""

_zeros = zero_tile(TOKENS)


def scratch_nbytes(columns: int, tokens: int) -> int:
    """Return the size of the scratch for up to `tokens` tokens in up to four areas, of blocks of 256."""
    return areas_nbytes(columns, tokens, GROUPS)


@merged
def aligned(scratch):
    """Return the first element of `scratch` whose address is a multiple of 64."""
    return -address(scratch) & 63


@merged
def totals_at(area, count, columns, span):
    """Return where the totals of an area of `count` tokens begin."""
    return (area + count * (columns + 8 * (columns // span)) + 63) & ~63


@inner
def fill_area(
    like, q, x_scales, x_sums, columns, span, rows, first, count, start, scratch, area
):  # fmt: skip
    """Fill an area with the tokens rows[first : first + count]; return its end.

    count: a multiple of the tokens that the tile `like` has. start: how many times too large the first
    sums of the tile are that will read them.
    """
    tokens, spans = tokens_of(like), columns // span
    starts, scales = area + count * columns, area + count * (columns + 4 * spans)
    for t in range(0, count, tokens):
        for b in range(spans):
            panel, side = area + b * span * count + t * span, 4 * (b * count + t)
            for k in range(0, span, 64):
                copy_panel(like, q, columns, rows, first + t, b * span + k, scratch, panel + k * tokens)
            copy_column(like, x_sums, spans, rows, first + t, b, np.int32(-start), scratch, starts + side)
            copy_column(like, x_scales, spans, rows, first + t, b, np.float32(1.0), scratch, scales + side)
    return totals_at(area, count, columns, span) + count * 64 * GROUPS


@merged
def clear(scratch, totals, count):
    """Set the totals of `count` tokens to 0."""
    for i in range(count * GROUPS):
        store_f32(scratch, totals + 64 * i, zero_f32())


@merged
def write(w, scales, by_row, scratch, totals, count, groups, out, element, out_step):
    """Write the totals of `count` tokens for the first `groups` of GROUPS groups to `out`.

    by_row: multiply them with the float32 [group][16 rows] at byte `scales` of `w`.
    """
    for g in range(groups):
        last = load_f32(w, scales + 64 * g) if by_row else splat_f32(np.float32(1.0))
        for t in range(count):
            total = load_f32(scratch, totals + 64 * (t * GROUPS + g))
            store_f32(out, 4 * (element + t * out_step + 16 * g), mul_f32(total, last))


@merged
def tile_spread(weights, scratch, base, panel, start, scale, totals):
    """Add one block of GROUPS groups, spread at `base`, to the totals of TOKENS tokens.

    weights: the groups' scales of this block; the other arguments are offsets in scratch.
    """
    c = start_tile(_zeros(), scratch, start)
    for k in range(64):
        c = tile_dot(c, load_codes(scratch, base + k * 64, SPREAD), scratch, panel + k * 4 * TOKENS)
    tile_finish(c, weights, scratch, scale, scratch, totals)
