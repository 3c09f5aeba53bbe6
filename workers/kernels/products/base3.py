"""B3: ternary matrices of 1.6 bits a weight, five codes in a byte, sixteen rows interleaved.

For each group of 16 rows and each block of 256 columns 832 bytes of codes: 13 packets of 64 bytes, each
[16 rows][4 bytes]. Byte j of a row in packet p holds the codes (weight + 1) of the columns
20 p + 4 n + j for n = 0..4 as base-3 digits, n = 0 first; the last packet ends with column 255 and its
fifth digits are 0. With v = sum code(n) 3^(4 - n) the byte is v + (55 v + 1023) // 1024, xored with
`simd.trits.FLIP`, which differs by target: an arena is never read by another target than wrote it.
All codes come first, then all scales as in `ternary`: float16, [group][block][16 rows].

The results are those of `ternary` for the same codes and scales, bit for bit. One token is computed from
the packed bytes; where there are enough for a tile a block is unpacked once and multiplied as in `areas`.
"""

from __future__ import annotations

import numpy as np

from ..kernel import kernel, piece
from ..scratch import base3_nbytes
from ..simd.groups import GROUPS, SPREAD, TOKENS, load_scales
from ..simd.ops import (
    fma_f32,
    load_f16,
    mul_f32,
    splat_f32,
    splat_i32,
    store_bytes,
    store_f32,
    sub_i32,
    to_f32,
    zero_f32,
)
from ..simd.tile import zero_tile
from ..simd.trits import (
    DIGITS,
    SIGNED,
    add_packet,
    append_digit,
    encode,
    encode_block,
    gather_codes,
    spread_packet,
    whole_sums,
    zero_codes,
    zero_sums,
)
from . import ternary
from .areas import AREAS_AT, BLOCK, aligned, clear, fill_area, tile_spread, totals_at, write

B3 = 5
"""The format's number."""

PACKETS = 13
BLOCK_NBYTES = PACKETS * 64  # of 16 rows
_TWO_BIT_NBYTES = 16 * 64
_SCALES_NBYTES = 32
_LEFT = BLOCK - (PACKETS - 1) * 4 * DIGITS  # columns in the last packet
# From this number of tokens on a tile, filled up with copies, is faster than one token at a time.
_WORTH_A_TILE = TOKENS // 2 + 1

_add = add_packet(DIGITS)
_add_last = add_packet(_LEFT // 4)
_spread = spread_packet(DIGITS)
_spread_last = spread_packet(_LEFT // 4)
_whole_first = whole_sums(0)
_whole_second = whole_sums(1)
_zeros = zero_tile(TOKENS)


def codes_nbytes(rows: int, columns: int) -> int:
    """Return the size of the code area; `rows` is padded to 16, `columns` a multiple of 256."""
    return -(-rows // 16) * (columns // BLOCK) * BLOCK_NBYTES


def scales_nbytes(rows: int, columns: int) -> int:
    """Return the size of the scale area."""
    return ternary.scales_nbytes(rows, columns)


def scratch_nbytes(columns: int, tokens: int) -> int:
    """Return the size of the scratch that `gemm` needs for up to `tokens` tokens."""
    return base3_nbytes(columns, tokens, GROUPS, TOKENS)


@kernel
def pack(codes, scale_bits, out, codes_at, scales_at):
    """Pack `codes` (uint8 0..2, (N, K), C-contiguous) and scales (float16 as uint16, (N, K/256)) into `out`.

    Rows beyond N up to the next multiple of 16 become zero weights with scale 0.
    """
    rows, columns = codes.shape
    blocks = columns // BLOCK
    for group in range((rows + 15) // 16):
        left = min(rows - group * 16, 16)
        for block in range(blocks):
            source = group * 16 * columns + block * BLOCK
            at = codes_at + (group * blocks + block) * BLOCK_NBYTES
            for p in range(PACKETS):
                v = gather_codes(codes, source + p * 4 * DIGITS, columns, left)
                for n in range(1, DIGITS if p < PACKETS - 1 else _LEFT // 4):
                    v = append_digit(v, gather_codes(codes, source + p * 4 * DIGITS + 4 * n, columns, left))
                if p == PACKETS - 1:
                    v = append_digit(v, zero_codes())
                store_bytes(out, at + p * 64, encode(v))
            for lane in range(16):
                at = scales_at + ((group * blocks + block) * 16 + lane) * 2
                bits = scale_bits[group * 16 + lane, block] if lane < left else np.uint16(0)
                out[at] = bits & np.uint16(0xFF)
                out[at + 1] = bits >> np.uint16(8)


@kernel
def repack(source, source_codes_at, source_scales_at, groups, columns, out, codes_at, scales_at):
    """Copy a matrix packed by `ternary.pack` in `source` (uint8) to `out` in this module's layout.

    groups: padded rows / 16. The result is what `pack` gives for the same codes and scales. The areas
    must not overlap.
    """
    for b in range(groups * (columns // BLOCK)):
        encode_block(source, source_codes_at + b * _TWO_BIT_NBYTES, out, codes_at + b * BLOCK_NBYTES)
    for i in range(groups * (columns // BLOCK) * _SCALES_NBYTES):
        out[scales_at + i] = source[source_scales_at + i]


if SIGNED:

    @piece
    def _exact(sums, x_sum):
        return to_f32(sums)

else:

    @piece
    def _exact(sums, x_sum):
        return to_f32(sub_i32(sums, splat_i32(x_sum)))


@piece
def _finish(acc, sums, weight_scales, x_sum, x_scale):
    """Take the code offset off and add the scaled block to `acc`."""
    return fma_f32(_exact(sums, x_sum), mul_f32(weight_scales, splat_f32(x_scale)), acc)


@kernel
def _one_token(w, codes, scales, columns, pair, q, x_scales, x_sums, row, out, element):
    """Compute a group of 16 rows for one token, if GROUPS is 2 and `pair` not 0 that `pair` bytes on too."""
    second = pair // BLOCK_NBYTES * _SCALES_NBYTES
    a = zero_f32()
    d = zero_f32()
    for b in range(columns // BLOCK):
        at = codes + b * BLOCK_NBYTES
        x = row * columns + b * BLOCK
        sums = zero_sums()
        for p in range(PACKETS - 1):
            sums = _add(sums, w, at + p * 64, pair, q, x + p * 4 * DIGITS)
        sums = _add_last(sums, w, at + 64 * (PACKETS - 1), pair, q, x + BLOCK - _LEFT)
        h, s = x_scales[row, b], x_sums[row, b]
        at = scales + b * _SCALES_NBYTES
        a = _finish(a, _whole_first(sums), load_f16(w, at), s, h)
        d = _finish(d, _whole_second(sums), load_f16(w, at + second), s, h)
    store_f32(out, 4 * element, a)
    if GROUPS == 2 and pair:
        store_f32(out, 4 * (element + 16), d)


@kernel
def _unpack(w, at, out, out_at):
    """Spread one block of codes (16 rows, 256 columns) to one byte per code, four columns per 64 bytes."""
    for p in range(PACKETS - 1):
        _spread(w, at + p * 64, out, out_at + p * 64 * DIGITS)
    _spread_last(w, at + 64 * (PACKETS - 1), out, out_at + 64 * DIGITS * (PACKETS - 1))


@kernel
def _tiles(w, codes, scales, pair, here, columns, tiled, count, scratch, base, out, element, out_step):
    """Compute `here` of GROUPS groups for `count` tokens, whose area is filled up to `tiled` tokens."""
    blocks = columns // BLOCK
    area = base + AREAS_AT
    starts = area + tiled * columns
    totals = totals_at(area, tiled, columns, BLOCK)
    clear(scratch, totals, tiled)
    for b in range(blocks):
        for g in range(GROUPS):
            _unpack(w, codes + g * pair + b * BLOCK_NBYTES, scratch, base + g * SPREAD)
        weights = load_scales(w, scales + b * _SCALES_NBYTES, pair // BLOCK_NBYTES * _SCALES_NBYTES)
        for t in range(0, tiled, TOKENS):
            panel = area + b * BLOCK * tiled + t * BLOCK
            start = starts + 4 * (b * tiled + t)
            total = totals + t * 64 * GROUPS
            tile_spread(weights, scratch, base, panel, start, start + 4 * blocks * tiled, total)
    write(w, 0, False, scratch, totals, count, here, out, element, out_step)


@kernel
def _fill_rows(rows, count, tiled, scratch):
    """Return rows[:count] (int32), filled up to `tiled` with copies of the last, at the end of scratch."""
    end = len(scratch) // 4 * 4
    filled = scratch[end - 4 * tiled : end].view(np.int32)
    for t in range(tiled):
        filled[t] = rows[min(t, count - 1)]
    return filled


@kernel
def gemm(
    form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out, out_at,
    out_step,
):  # fmt: skip
    """out[t, :] = W @ x[rows[t]] for t < count; the arguments and the bits are those of `ternary.gemm`."""
    blocks = columns // BLOCK
    together = count // TOKENS * TOKENS
    if count - together >= _WORTH_A_TILE:
        together = count
    tiled = (together + TOKENS - 1) // TOKENS * TOKENS
    base = aligned(scratch)
    if tiled:
        filled = _fill_rows(rows, together, tiled, scratch)
        fill_area(
            _zeros(), q, x_scales, x_sums, columns, BLOCK, filled, 0, tiled, 1, scratch,
            base + AREAS_AT,
        )  # fmt: skip
    for group in range(0, groups, GROUPS):
        codes = codes_at + group * blocks * BLOCK_NBYTES
        scales = scales_at + group * blocks * _SCALES_NBYTES
        here = min(GROUPS, groups - group)
        pair = blocks * BLOCK_NBYTES if here > 1 else 0
        element = out_at + group * 16
        if tiled:
            _tiles(
                w, codes, scales, pair, here, columns, tiled, together, scratch, base, out, element, out_step
            )
        for t in range(together, count):
            _one_token(
                w, codes, scales, columns, pair, q, x_scales, x_sums, rows[t], out, element + t * out_step
            )
