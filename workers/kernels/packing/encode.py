"""Encoders of formats with minima: float32 rows to Q2_K, Q4_K and Q5_K blocks, by least squares.

Sixteen blocks with a scale of their own ("subs", of 16 or 32 columns) are worked on side by side, one a
lane: their values are transposed first, and no sum crosses lanes. For Q4_K and Q5_K these are two blocks
of 256 columns, for the others one. With weights w (1, or how much a column matters) the steps are

    1. Every sub alone: from several ranges, codes q = clamp(rint((x - low) / scale)), then the scale and
       minimum that are best for these codes (normal equations of sum w (x - scale q - low)^2), the best
       of all kept and improved by repeating both (Lloyd's alternation; it never gets worse).
    2. The subs of a block share d and dmin: integers for scales and minima; then in turns codes for these,
       d and dmin by least squares for these codes and integers, and integers anew. The best round is kept.

The formats' layouts are in `planes`, decoding in `decode`, formats without minima in `encode_signed`. All
targets give the same bits: no step depends on the width of registers.
"""

from __future__ import annotations

import numpy as np

from ..kernel import inner, kernel, merged
from ..simd.fitting import most_lanes, pick_more, store_half, sum_lanes
from ..simd.ops import (
    add_f32,
    broadcast_f32,
    div_f32,
    fma_f32,
    load_f32,
    max_f32,
    min_f32,
    mul_f32,
    round_f16,
    round_f32,
    splat_f32,
    store_f32,
    store_i8,
    sub_f32,
    to_i32,
    zero_f32,
)
from ..simd.planes import Q2_K, Q4_K, Q5_K
from .code_blocks import BLOCK, gather, gather_subs, inverse, write_bits, write_nibbles, write_pairs

# Float32 scratch, in elements; [element of the sub][16 lanes] first, then vectors of one number a lane.
_X, _W = 0, 512
_S, _M = 1024, 1040  # scale and minimum of each sub, as if it were alone
_SW, _SX = 1056, 1072  # sums of w and w x
_SQ, _SQQ, _SQX = 1088, 1104, 1120  # sums of w q, w q q, w q x for the codes at hand
_UNIT, _UNIT_MIN = 1136, 1152  # d and dmin to try next
_LS, _LM, _D, _DMIN = 1168, 1184, 1200, 1216  # the best so far: integer scales and minima, d, dmin
WORK_FLOATS = 1232

_F0, _F1 = np.float32(0.0), np.float32(1.0)
_HUGE = np.float32(3.0e38)
_SINGULAR = np.float32(1e-5)  # share of its terms below which a determinant is rounding only

# Where the search starts: the range of a sub is divided into top + these steps (top: the largest code).
# Seven steps, two polishings and four rounds: 0.6 % less error (root mean square) in 1.4 times the time.
_AFFINE_STEPS = (-0.6, -0.2, 0.1, 0.5)
_POLISH = 1
_ROUNDS = 3


@merged
def _affine_sums(work, width, per_step, bias, top):
    """Sum over codes clamp(rint(x * per_step + bias), 0, top)."""
    sq, sqq, sqx = zero_f32(), zero_f32(), zero_f32()
    for i in range(width):
        x = load_f32(work, 4 * (_X + 16 * i))
        q = min_f32(max_f32(fma_f32(x, per_step, bias), zero_f32()), top)
        q = round_f32(q)
        wq = mul_f32(load_f32(work, 4 * (_W + 16 * i)), q)
        sq = add_f32(sq, wq)
        sqq = fma_f32(wq, q, sqq)
        sqx = fma_f32(wq, x, sqx)
    store_f32(work, 4 * _SQ, sq)
    store_f32(work, 4 * _SQQ, sqq)
    store_f32(work, 4 * _SQX, sqx)


@merged
def _affine_solve(work, best):
    """Take the line that fits the codes best where it is better than `best`; return what it explains."""
    sw, sx = load_f32(work, 4 * _SW), load_f32(work, 4 * _SX)
    sq, sqq, sqx = load_f32(work, 4 * _SQ), load_f32(work, 4 * _SQQ), load_f32(work, 4 * _SQX)
    det = sub_f32(mul_f32(sw, sqq), mul_f32(sq, sq))
    scale = div_f32(sub_f32(mul_f32(sw, sqx), mul_f32(sx, sq)), det)
    low = div_f32(sub_f32(mul_f32(sqq, sx), mul_f32(sq, sqx)), det)
    # Minima are subtracted and not negative: a line that starts above 0 goes through 0 instead.
    scale = pick_more(low, zero_f32(), div_f32(sqx, sqq), scale)
    low = pick_more(low, zero_f32(), zero_f32(), low)
    gain = fma_f32(scale, sqx, mul_f32(low, sx))
    store_f32(work, 4 * _S, pick_more(gain, best, scale, load_f32(work, 4 * _S)))
    least = sub_f32(zero_f32(), low)
    store_f32(work, 4 * _M, pick_more(gain, best, least, load_f32(work, 4 * _M)))
    return pick_more(gain, best, gain, best)


@inner
def _fit_affine(work, width, most):
    """Find scale and minimum (not negative) of sixteen subs; returns the sum of all squares."""
    low, high = zero_f32(), splat_f32(-_HUGE)
    sw, sx, sxx = zero_f32(), zero_f32(), zero_f32()
    for i in range(width):
        x, w = load_f32(work, 4 * (_X + 16 * i)), load_f32(work, 4 * (_W + 16 * i))
        low, high = min_f32(low, x), max_f32(high, x)
        wx = mul_f32(w, x)
        sw, sx, sxx = add_f32(sw, w), add_f32(sx, wx), fma_f32(wx, x, sxx)
    store_f32(work, 4 * _SW, sw)
    store_f32(work, 4 * _SX, sx)
    top = splat_f32(np.float32(most))
    per_range = inverse(sub_f32(high, low))
    store_f32(work, 4 * _S, div_f32(sub_f32(high, low), top))
    store_f32(work, 4 * _M, sub_f32(zero_f32(), low))
    best = splat_f32(-_HUGE)
    for step in _AFFINE_STEPS:
        per_step = mul_f32(splat_f32(np.float32(most + step)), per_range)
        _affine_sums(work, width, per_step, sub_f32(zero_f32(), mul_f32(low, per_step)), top)
        best = _affine_solve(work, best)
    for _ in range(_POLISH):
        per_step = inverse(load_f32(work, 4 * _S))
        _affine_sums(work, width, per_step, mul_f32(load_f32(work, 4 * _M), per_step), top)
        best = _affine_solve(work, best)
    store_f32(work, 4 * _SQ, sxx)
    total = _F0
    for lane in range(16):
        total += work[_SQ + lane]
    return total


@merged
def _integers(value, unit, limit):
    """The nearest multiples of `unit`, as integers in 0..limit."""
    return round_f32(min_f32(max_f32(mul_f32(value, inverse(unit)), zero_f32()), limit))


@merged
def _affine_judge(work, count, best, ls, lm, d, dmin):
    """Where the error of a block's codes is less than `best`, remember what they were made with."""
    sq, sqq, sqx = load_f32(work, 4 * _SQ), load_f32(work, 4 * _SQQ), load_f32(work, 4 * _SQX)
    sw, sx = load_f32(work, 4 * _SW), load_f32(work, 4 * _SX)
    scale, least = mul_f32(ls, d), mul_f32(lm, dmin)
    two = splat_f32(np.float32(2.0))
    # Of sum w (x - scale q + least)^2 all but the squares of x.
    error = mul_f32(scale, sub_f32(mul_f32(scale, sqq), mul_f32(two, sqx)))
    cross = sub_f32(sx, mul_f32(scale, sq))
    error = fma_f32(least, fma_f32(two, cross, mul_f32(least, sw)), error)
    error = sum_lanes(error, count)
    store_f32(work, 4 * _LS, pick_more(best, error, ls, load_f32(work, 4 * _LS)))
    store_f32(work, 4 * _LM, pick_more(best, error, lm, load_f32(work, 4 * _LM)))
    store_f32(work, 4 * _D, pick_more(best, error, d, load_f32(work, 4 * _D)))
    store_f32(work, 4 * _DMIN, pick_more(best, error, dmin, load_f32(work, 4 * _DMIN)))
    return min_f32(error, best)


@merged
def _affine_units(work, count, ls, lm, d, dmin):
    """Leave d and dmin that are best for the codes and integers at _UNIT and _UNIT_MIN."""
    sq, sqq, sqx = load_f32(work, 4 * _SQ), load_f32(work, 4 * _SQQ), load_f32(work, 4 * _SQX)
    a = sum_lanes(mul_f32(mul_f32(ls, ls), sqq), count)
    b = sum_lanes(mul_f32(mul_f32(ls, lm), sq), count)
    c = sum_lanes(mul_f32(mul_f32(lm, lm), load_f32(work, 4 * _SW)), count)
    e = sum_lanes(mul_f32(ls, sqx), count)
    f = sum_lanes(mul_f32(lm, load_f32(work, 4 * _SX)), count)
    det = sub_f32(mul_f32(a, c), mul_f32(b, b))
    enough = mul_f32(splat_f32(_SINGULAR), mul_f32(a, c))
    new = div_f32(sub_f32(mul_f32(c, e), mul_f32(b, f)), det)
    new_min = div_f32(sub_f32(mul_f32(b, e), mul_f32(a, f)), det)
    alone = pick_more(a, zero_f32(), div_f32(fma_f32(b, dmin, e), a), d)
    new, new_min = pick_more(det, enough, new, alone), pick_more(det, enough, new_min, dmin)
    store_f32(work, 4 * _UNIT, round_f16(max_f32(new, zero_f32())))
    store_f32(work, 4 * _UNIT_MIN, round_f16(max_f32(new_min, zero_f32())))


@inner
def _share_affine(work, width, most, limit):
    """Find d, dmin and the integers of all blocks in the lanes (see the module, 2)."""
    count = BLOCK // width
    top, limit = splat_f32(np.float32(most)), splat_f32(np.float32(limit))
    s, m = load_f32(work, 4 * _S), load_f32(work, 4 * _M)
    store_f32(work, 4 * _UNIT, round_f16(div_f32(most_lanes(s, count), limit)))
    store_f32(work, 4 * _UNIT_MIN, round_f16(div_f32(most_lanes(m, count), limit)))
    best = splat_f32(_HUGE)
    for _ in range(_ROUNDS):
        d, dmin = load_f32(work, 4 * _UNIT), load_f32(work, 4 * _UNIT_MIN)
        ls, lm = _integers(s, d, limit), _integers(m, dmin, limit)
        per_step = inverse(mul_f32(ls, d))
        _affine_sums(work, width, per_step, mul_f32(mul_f32(lm, dmin), per_step), top)
        best = _affine_judge(work, count, best, ls, lm, d, dmin)
        _affine_units(work, count, ls, lm, d, dmin)
        sw, sx = load_f32(work, 4 * _SW), load_f32(work, 4 * _SX)
        sq, sqq, sqx = load_f32(work, 4 * _SQ), load_f32(work, 4 * _SQQ), load_f32(work, 4 * _SQX)
        det = sub_f32(mul_f32(sw, sqq), mul_f32(sq, sq))
        alone = div_f32(sub_f32(mul_f32(sw, sqx), mul_f32(sx, sq)), det)
        s = pick_more(det, mul_f32(splat_f32(_SINGULAR), mul_f32(sq, sq)), alone, s)
        # The minimum that is best for the scale as it will be.
        d = load_f32(work, 4 * _UNIT)
        rounded = mul_f32(_integers(s, d, limit), d)
        m = div_f32(sub_f32(mul_f32(rounded, sq), sx), sw)


@merged
def _affine_codes(values, at, work, width, lane, most, codes):
    """Write the codes of a block, one byte each, in the order of columns."""
    top = splat_f32(np.float32(most))
    per_step = inverse(mul_f32(load_f32(work, 4 * _LS), load_f32(work, 4 * _D)))
    store_f32(work, 4 * _S, per_step)
    store_f32(work, 4 * _M, mul_f32(mul_f32(load_f32(work, 4 * _LM), load_f32(work, 4 * _DMIN)), per_step))
    for i in range(0, BLOCK, 16):
        s = lane + i // width
        q = fma_f32(
            load_f32(values, 4 * (at + i)),
            broadcast_f32(work, 4 * (_S + s)),
            broadcast_f32(work, 4 * (_M + s)),
        )
        store_i8(codes, i, to_i32(round_f32(min_f32(max_f32(q, zero_f32()), top))))


@inner
def _write_affine(form, work, codes, lane, out, at):
    """Write a block: integers, d and dmin from `work`, and the codes."""
    if form == Q2_K:
        for s in range(16):
            out[at + s] = np.uint8(int(work[_LS + s]) | (int(work[_LM + s]) << 4))
        write_pairs(codes, out, at + 16)
    else:
        for j in range(4):
            s, s4 = int(work[_LS + lane + j]), int(work[_LS + lane + 4 + j])
            m, m4 = int(work[_LM + lane + j]), int(work[_LM + lane + 4 + j])
            out[at + 4 + j] = np.uint8(s | (s4 >> 4) << 6)
            out[at + 8 + j] = np.uint8(m | (m4 >> 4) << 6)
            out[at + 12 + j] = np.uint8((s4 & 15) | (m4 & 15) << 4)
        if form == Q5_K:
            write_bits(codes, 4, out, at + 16)
        write_nibbles(codes, out, at + (48 if form == Q5_K else 16))
    d_at = at + 80 if form == Q2_K else at
    store_half(out, d_at, work[_D + lane])
    store_half(out, d_at + 2, work[_DMIN + lane])


@kernel
def affine(form, values, columns, blocks, weights, weighted, work, codes, out):
    """Encode `values` (float32, 1-D, blocks * 256) as Q2_K, Q4_K or Q5_K blocks in `out` (uint8).

    columns: of a row; weights: float32 (columns,), above 0, read if `weighted`; work: float32
    (WORK_FLOATS,), codes: uint8 (BLOCK,). Returns -1, or the first of the blocks encoded together (one as
    Q2_K, two as others) of which one has a value that is not finite (or that no float16 scale can hold);
    what is in `out` is unusable then.
    """
    width = 16 if form == Q2_K else 32
    most = 3 if form == Q2_K else (15 if form == Q4_K else 31)
    limit = 15 if form == Q2_K else 63
    nbytes = 84 if form == Q2_K else (144 if form == Q4_K else 176)
    together = 16 * width // BLOCK
    work[_W : _W + 512] = _F1
    for first in range(0, blocks, together):
        # Of an odd number of blocks the last leaves half of the lanes to copies of its last sub.
        last = min(together, blocks - first) * (BLOCK // width) - 1
        gather_subs(values, first * BLOCK, width, last, work, _X)
        if weighted:
            for b in range(together):
                gather(weights, (first + b) * BLOCK % columns, width, b * 8, work, _W)
        total = _fit_affine(work, width, most)
        _share_affine(work, width, most, limit)
        for b in range(min(together, blocks - first)):
            _affine_codes(values, (first + b) * BLOCK, work, width, b * 8, most, codes)
            _write_affine(form, work, codes, b * 8, out, (first + b) * nbytes)
        if not np.isfinite(total + work[_D] + work[_DMIN]):
            return first
    return -1
