"""Tiles of formats in blocks of 32 columns: their scratch, and the products of spread weights in it.

Scratch is that of `areas` with a span of 32 columns: one block of GROUPS groups, one byte a weight plus
`dot.WEIGHT_OFFSET`, then one area.
"""

from __future__ import annotations

import numpy as np

from ..kernel import inner, merged
from ..scratch import panels_nbytes
from ..simd.dot import WEIGHT_OFFSET
from ..simd.groups import GROUPS, TOKENS, load_codes
from ..simd.tile import copy_column, copy_half_panel, start_tile, tile_dot_weights, tile_finish, zero_tile

SPAN = 32
_START = np.int32(-WEIGHT_OFFSET)
_zeros = zero_tile(TOKENS)


def scratch_nbytes(columns: int, tokens: int) -> int:
    """Return the size of the scratch for up to `tokens` tokens, in bytes."""
    return panels_nbytes(columns, tokens, GROUPS)


@inner
def fill(q, x_scales, x_sums, columns, rows, count, scratch, area):
    """Fill an area with the tokens rows[:count], a multiple of TOKENS."""
    blocks = columns // SPAN
    starts, scales = area + count * columns, area + count * (columns + 4 * blocks)
    for t in range(0, count, TOKENS):
        for b in range(blocks):
            panel, side = area + b * SPAN * count + t * SPAN, 4 * (b * count + t)
            copy_half_panel(_zeros(), q, columns, rows, t, b * SPAN, scratch, panel)
            copy_column(_zeros(), x_sums, blocks, rows, t, b, _START, scratch, starts + side)
            copy_column(_zeros(), x_scales, blocks, rows, t, b, np.float32(1.0), scratch, scales + side)


@merged
def tile_weights(weights, source, at, step, scratch, panel, start, scale, totals):
    """Add one block of GROUPS groups, from byte `at` of `source` and `step` apart, to TOKENS totals.

    weights: the groups' scales of this block; the other arguments are offsets in scratch.
    """
    c = start_tile(_zeros(), scratch, start)
    for k in range(SPAN // 4):
        c = tile_dot_weights(c, load_codes(source, at + k * 64, step), scratch, panel + k * 4 * TOKENS)
    tile_finish(c, weights, scratch, scale, scratch, totals)
