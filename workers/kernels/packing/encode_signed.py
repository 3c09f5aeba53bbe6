"""Encoders of formats without minima: float32 rows to Q3_K and Q6_K blocks, by least squares.

As in `encode`: each sub of 16 columns alone, from both signs of its scale (codes reach from -4 to 3, or
from -32 to 31) and several ranges; then the integers and d of the block in turns. Ternary blocks are in
`encode_ternary`.
"""

from __future__ import annotations

import numpy as np

from ..kernel import inner, kernel, merged
from ..simd.fitting import most_lanes, pick_more, store_half, sum_lanes
from ..simd.ops import (
    abs_f32,
    add_f32,
    add_i32,
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
    splat_i32,
    store_f32,
    store_i8,
    sub_f32,
    sum_f32,
    to_i32,
    zero_f32,
)
from ..simd.planes import Q3_K
from .code_blocks import BLOCK, gather, gather_subs, inverse, write_bits, write_pairs, write_sixes

# Float32 scratch, in elements: values and weights, then one number a lane.
_X, _W = 0, 256
_S, _LS, _SQQ, _SQX = 512, 528, 544, 560
WORK_FLOATS = 576

_F1 = np.float32(1.0)
_HUGE = np.float32(3.0e38)

_SIGNED_STEPS = (-0.7, -0.3, 0.1)  # of the divisor 4 + step (or 32 + step) of the largest value
_POLISH = 1
_ROUNDS = 3


@merged
def _signed_code(x, per_step, half):
    """The nearest of -half..half - 1 to x * per_step."""
    low, high = splat_f32(-half), splat_f32(half - _F1)
    return round_f32(min_f32(max_f32(mul_f32(x, per_step), low), high))


@merged
def _signed_sums(work, per_step, half):
    """Sum w q q and w q x over the codes of a scale."""
    sqq, sqx = zero_f32(), zero_f32()
    for i in range(16):
        x = load_f32(work, 4 * (_X + 16 * i))
        q = _signed_code(x, per_step, half)
        wq = mul_f32(load_f32(work, 4 * (_W + 16 * i)), q)
        sqq = fma_f32(wq, q, sqq)
        sqx = fma_f32(wq, x, sqx)
    store_f32(work, 4 * _SQQ, sqq)
    store_f32(work, 4 * _SQX, sqx)


@merged
def _signed_solve(work, best):
    """Take the scale that fits the codes best where it is better than `best`; return what it explains."""
    scale = div_f32(load_f32(work, 4 * _SQX), load_f32(work, 4 * _SQQ))
    gain = mul_f32(scale, load_f32(work, 4 * _SQX))
    store_f32(work, 4 * _S, pick_more(gain, best, scale, load_f32(work, 4 * _S)))
    return pick_more(gain, best, gain, best)


@inner
def _fit_signed(work, half):
    """Find the scale (of either sign) of sixteen subs; returns a sum that is finite if all values are."""
    largest, total = zero_f32(), zero_f32()
    for i in range(16):
        x = load_f32(work, 4 * (_X + 16 * i))
        largest = max_f32(abs_f32(x), largest)
        total = fma_f32(x, x, total)
    store_f32(work, 4 * _S, zero_f32())
    per_largest = inverse(largest)
    best = zero_f32()
    for step in _SIGNED_STEPS:
        for sign in (-1.0, 1.0):
            per_step = mul_f32(splat_f32(np.float32(sign) * (half + np.float32(step))), per_largest)
            _signed_sums(work, per_step, half)
            best = _signed_solve(work, best)
    for _ in range(_POLISH):
        _signed_sums(work, inverse(load_f32(work, 4 * _S)), half)
        best = _signed_solve(work, best)
    return sum_f32(total)


@inner
def _share_signed(work, half, most):
    """Find d and the integers (-most..most - 1) of a block, the latter left at _LS; returns d."""
    s = load_f32(work, 4 * _S)
    largest = most_lanes(abs_f32(s), 16)
    # The largest scale becomes -most, one more than there is on the other side.
    positive = most_lanes(s, 16)
    d = pick_more(largest, positive, largest, sub_f32(zero_f32(), largest))
    d = round_f16(mul_f32(d, splat_f32(_F1 / most)))
    low, high = splat_f32(-most), splat_f32(most - _F1)
    best, best_d = splat_f32(_HUGE), d
    for _ in range(_ROUNDS):
        ls = round_f32(min_f32(max_f32(mul_f32(s, inverse(d)), low), high))
        scale = mul_f32(ls, d)
        _signed_sums(work, inverse(scale), half)
        sqq, sqx = load_f32(work, 4 * _SQQ), load_f32(work, 4 * _SQX)
        error = mul_f32(scale, sub_f32(mul_f32(scale, sqq), add_f32(sqx, sqx)))
        error = sum_lanes(error, 16)
        store_f32(work, 4 * _LS, pick_more(best, error, ls, load_f32(work, 4 * _LS)))
        best_d, best = pick_more(best, error, d, best_d), min_f32(error, best)
        a, e = sum_lanes(mul_f32(mul_f32(ls, ls), sqq), 16), sum_lanes(mul_f32(ls, sqx), 16)
        d = pick_more(a, zero_f32(), round_f16(div_f32(e, a)), d)
        s = pick_more(sqq, zero_f32(), div_f32(sqx, sqq), s)
    store_f32(work, 4 * _S, best_d)
    return work[_S]


@inner
def _write_q3_k(work, codes, d, out, at):
    """Write a block: the codes' third bits, their low two, the scales, d."""
    write_bits(codes, 2, out, at)
    write_pairs(codes, out, at + 32)
    for i in range(12):
        out[at + 96 + i] = 0
    for s in range(16):
        scale = int(work[_LS + s]) + 32
        out[at + 96 + s % 8] |= np.uint8((scale & 15) << (4 * (s // 8)))
        out[at + 104 + s % 4] |= np.uint8((scale >> 4) << (2 * (s // 4)))
    store_half(out, at + 108, d)


@inner
def _write_q6_k(work, codes, d, out, at):
    """Write a block: the codes' low four bits, their high two, the scales, d."""
    write_sixes(codes, out, at)
    for s in range(16):
        out[at + 192 + s] = np.uint8(int(work[_LS + s]) & 255)
    store_half(out, at + 208, d)


@kernel
def signed(form, values, columns, blocks, weights, weighted, work, codes, out):
    """Encode `values` as Q3_K or Q6_K; arguments and answer as those of `encode.affine`."""
    third = form == Q3_K
    half, most = np.float32(4.0 if third else 32.0), np.float32(32.0 if third else 128.0)
    offset = splat_i32(np.int32(4 if third else 32))
    work[_W : _W + BLOCK] = _F1
    for block in range(blocks):
        gather_subs(values, block * BLOCK, 16, 15, work, _X)
        if weighted:
            gather(weights, block * BLOCK % columns, 16, 0, work, _W)
        total = _fit_signed(work, half)
        d = _share_signed(work, half, most)
        if not np.isfinite(total + d):
            return block
        store_f32(work, 4 * _S, inverse(mul_f32(load_f32(work, 4 * _LS), splat_f32(d))))
        for s in range(16):
            x = load_f32(values, 4 * (block * BLOCK + 16 * s))
            q = to_i32(_signed_code(x, broadcast_f32(work, 4 * (_S + s)), half))
            store_i8(codes, 16 * s, add_i32(q, offset))
        if third:
            _write_q3_k(work, codes, d, out, block * 110)
        else:
            _write_q6_k(work, codes, d, out, block * 210)
    return -1
