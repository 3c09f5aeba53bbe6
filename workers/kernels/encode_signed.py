"""Encoders of formats without minima: float32 rows to Q3_K and TQ2_0 blocks, by least squares.

Q3_K as in `encode`: each sub of 16 columns alone, from both signs of its scale (codes reach from -4 to 3)
and several ranges; then the integers and d of the block in turns.

TQ2_0, a scale for each 256 columns (Lloyd 1982, Max 1960): codes are the signs of the values beyond a
threshold, the best scale for them the mean of |x| over those values, the best threshold for a scale half
of it. From the best of several thresholds both are repeated; the sum of squares never rises. Neither the
mean of all |x| nor the largest is a scale that ends up here.
"""

from __future__ import annotations

import numpy as np

from .code_blocks import BLOCK, gather, gather_subs, inverse, write_bits, write_pairs
from .kernel import inner, kernel, merged
from .simd.fitting import most_lanes, pick_more, sign_f32, store_half, sum_lanes
from .simd.ops import (
    abs_f32,
    add_f32,
    add_i32,
    broadcast_f32,
    div_f32,
    fma_f32,
    largest_f32,
    load_f32,
    max_f32,
    min_f32,
    mul_f32,
    round_f16,
    round_f32,
    scalar_f16,
    shift_left_i32,
    splat_f32,
    splat_i32,
    store_f32,
    store_i8,
    sub_f32,
    sum_f32,
    to_i32,
    zero_f32,
)

# Float32 scratch, in elements: values and weights, then one number a lane.
_X, _W = 0, 256
_S, _LS, _SQQ, _SQX = 512, 528, 544, 560
WORK_FLOATS = 576

_F0, _F1 = np.float32(0.0), np.float32(1.0)
_HALF = np.float32(0.5)
_HUGE = np.float32(3.0e38)

_SIGNED_STEPS = (-0.7, -0.3, 0.1)  # of the divisor 4 + step of the largest value
_THRESHOLDS = (0.35, 0.5, 0.65, 0.8, 1.0, 1.4)  # of the root of the mean square
_POLISH = 1
_ROUNDS = 3
_LLOYD = 6

_shift2, _shift4, _shift6 = shift_left_i32(2), shift_left_i32(4), shift_left_i32(6)


@merged
def _signed_code(x, per_step):
    """The nearest of -4..3 to x * per_step."""
    low, high = splat_f32(np.float32(-4.0)), splat_f32(np.float32(3.0))
    return round_f32(min_f32(max_f32(mul_f32(x, per_step), low), high))


@merged
def _signed_sums(work, per_step):
    """Sum w q q and w q x over the codes of a scale."""
    sqq, sqx = zero_f32(), zero_f32()
    for i in range(16):
        x = load_f32(work, 4 * (_X + 16 * i))
        q = _signed_code(x, per_step)
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
def _fit_signed(work):
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
            _signed_sums(work, mul_f32(splat_f32(np.float32(sign * (4.0 + step))), per_largest))
            best = _signed_solve(work, best)
    for _ in range(_POLISH):
        _signed_sums(work, inverse(load_f32(work, 4 * _S)))
        best = _signed_solve(work, best)
    return sum_f32(total)


@inner
def _share_signed(work):
    """Find d and the integers of a block, the latter left in the lanes at _LS; returns d."""
    s = load_f32(work, 4 * _S)
    largest = most_lanes(abs_f32(s), 16)
    # The largest scale becomes -32, one more than there is on the other side.
    positive = most_lanes(s, 16)
    d = pick_more(largest, positive, largest, sub_f32(zero_f32(), largest))
    d = round_f16(mul_f32(d, splat_f32(np.float32(1.0 / 32.0))))
    low, high = splat_f32(np.float32(-32.0)), splat_f32(np.float32(31.0))
    best, best_d = splat_f32(_HUGE), d
    for _ in range(_ROUNDS):
        ls = round_f32(min_f32(max_f32(mul_f32(s, inverse(d)), low), high))
        scale = mul_f32(ls, d)
        _signed_sums(work, inverse(scale))
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


@kernel
def q3_k(values, columns, blocks, weights, weighted, work, codes, out):
    """Encode `values` as Q3_K; arguments and answer as those of `encode.affine`."""
    work[_W : _W + BLOCK] = _F1
    for block in range(blocks):
        gather_subs(values, block * BLOCK, 16, 15, work, _X)
        if weighted:
            gather(weights, block * BLOCK % columns, 16, 0, work, _W)
        total = _fit_signed(work)
        d = _share_signed(work)
        if not np.isfinite(total + d):
            return block
        store_f32(work, 4 * _S, inverse(mul_f32(load_f32(work, 4 * _LS), splat_f32(d))))
        for s in range(16):
            x = load_f32(values, 4 * (block * BLOCK + 16 * s))
            q = to_i32(_signed_code(x, broadcast_f32(work, 4 * (_S + s))))
            store_i8(codes, 16 * s, add_i32(q, splat_i32(np.int32(4))))
        _write_q3_k(work, codes, d, out, block * 110)
    return -1


@merged
def _beyond(values, weights, at, weights_at, weighted, threshold):
    """Return (sum of w |x|)^2 / sum of w and the mean over the values beyond a threshold; 0 if none is."""
    bound, one = splat_f32(threshold), splat_f32(_F1)
    count, total = zero_f32(), zero_f32()
    for i in range(0, BLOCK, 16):
        size = abs_f32(load_f32(values, 4 * (at + i)))
        w = load_f32(weights, 4 * (weights_at + i)) if weighted else one
        w = pick_more(size, bound, w, zero_f32())
        count = add_f32(count, w)
        total = fma_f32(w, size, total)
    whole, mass = sum_f32(total), sum_f32(count)
    if mass > _F0:
        return whole * (whole / mass), whole / mass
    return _F0, _F0


@inner
def _ternary_scale(values, weights, at, weights_at, weighted):
    """Find the scale of a block of 256; not finite if a value is not."""
    squares, largest = zero_f32(), zero_f32()
    for i in range(0, BLOCK, 16):
        x = load_f32(values, 4 * (at + i))
        squares, largest = fma_f32(x, x, squares), max_f32(abs_f32(x), largest)
    root = np.sqrt(sum_f32(squares) / np.float32(BLOCK))
    if not np.isfinite(root):
        return np.float32(np.nan)
    gain, scale = _beyond(values, weights, at, weights_at, weighted, largest_f32(largest) * _HALF)
    for share in _THRESHOLDS:
        found, mean = _beyond(values, weights, at, weights_at, weighted, root * np.float32(share))
        if found > gain:
            gain, scale = found, mean
    for _ in range(_LLOYD):
        found, mean = _beyond(values, weights, at, weights_at, weighted, scale * _HALF)
        if found <= gain:
            break
        gain, scale = found, mean
    return scale


@merged
def _ternary_code(values, at, bound):
    x = load_f32(values, 4 * at)
    code = pick_more(abs_f32(x), bound, sign_f32(x), zero_f32())
    return to_i32(add_f32(code, splat_f32(_F1)))


@kernel
def tq2_0(values, columns, blocks, weights, weighted, out):
    """Encode `values` as TQ2_0; arguments and answer as those of `encode.affine`."""
    for block in range(blocks):
        at = block * BLOCK
        scale = scalar_f16(_ternary_scale(values, weights, at, at % columns, weighted))
        if not np.isfinite(scale):
            return block
        bound = splat_f32(scale * _HALF)
        for byte in range(0, 64, 16):
            first = at + 128 * (byte // 32) + byte % 32
            packed = _ternary_code(values, first, bound)
            packed = add_i32(packed, _shift2(_ternary_code(values, first + 32, bound)))
            packed = add_i32(packed, _shift4(_ternary_code(values, first + 64, bound)))
            packed = add_i32(packed, _shift6(_ternary_code(values, first + 96, bound)))
            store_i8(out, block * 66 + byte, packed)
        store_half(out, block * 66 + 64, scale)
    return -1
