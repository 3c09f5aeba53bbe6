"""Encoders of ternary formats: float32 rows to TQ2_0 and TQ1_0 blocks, a scale for each 256 columns.

A value's code is its sign where its size is beyond a threshold, else 0. Threshold t and scale s by one of
three rules, with weights w (1, or how much a column matters):

    LLOYD_MAX      Lloyd 1982, Max 1960: s the mean of |x| over the values beyond t, t half of s, both
                   repeated from the best of several thresholds; the sum of w (x - code s)^2 never rises.
    ABSMEAN        s the mean of |x| over all values plus 1e-8, |x| >= s / 2 counts (BitNet b1.58's rule
                   for training, Ma et al. 2024, used on a finished model).
    LEAST_SQUARES  the codes of ABSMEAN, then the s that is best for them.

Only LLOYD_MAX and LEAST_SQUARES give back a block that is ternary already: a mean over all values counts
the zeros too. All targets give the same bits.
"""

from __future__ import annotations

import numpy as np

from ..kernel import inner, kernel, merged
from ..simd.fitting import pick_more, sign_f32, store_half
from ..simd.ops import (
    abs_f32,
    add_f32,
    add_i32,
    fma_f32,
    largest_f32,
    load_f32,
    max_f32,
    scalar_f16,
    shift_left_i32,
    splat_f32,
    store_i8,
    sum_f32,
    to_i32,
    zero_f32,
)
from .code_blocks import BLOCK

LLOYD_MAX, LEAST_SQUARES, ABSMEAN = 0, 1, 2

_F0, _F1 = np.float32(0.0), np.float32(1.0)
_HALF = np.float32(0.5)
_TINY = np.float32(1e-8)
# Times half of a scale: the next smaller float32, so that "beyond" becomes "at least".
_BELOW_HALF = np.float32(0.5) * np.float32(1.0 - 2.0**-24)

_THRESHOLDS = (0.35, 0.5, 0.65, 0.8, 1.0, 1.4)  # of the root of the mean square
_LLOYD = 6

_shift2, _shift4, _shift6 = shift_left_i32(2), shift_left_i32(4), shift_left_i32(6)


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
def _lloyd_max(values, weights, at, weights_at, weighted, root, largest):
    """Find the scale of a block of 256 with that root of the mean square and largest size."""
    gain, scale = _beyond(values, weights, at, weights_at, weighted, largest * _HALF)
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


@inner
def _fit(rule, values, weights, at, weights_at, weighted):
    """Return (scale as float16 rounds it, threshold) of a block of 256; not finite if a value is not."""
    squares, largest = zero_f32(), zero_f32()
    for i in range(0, BLOCK, 16):
        x = load_f32(values, 4 * (at + i))
        squares, largest = fma_f32(x, x, squares), max_f32(abs_f32(x), largest)
    root = np.sqrt(sum_f32(squares) / np.float32(BLOCK))
    if not np.isfinite(root):
        return np.float32(np.nan), _F0
    if rule == LLOYD_MAX:
        scale = scalar_f16(_lloyd_max(values, weights, at, weights_at, weighted, root, largest_f32(largest)))
        return scale, scale * _HALF
    _, mean = _beyond(values, weights, at, weights_at, weighted, -_F1)
    scale = mean + _TINY
    bound = scale * _BELOW_HALF
    if rule == LEAST_SQUARES:
        _, scale = _beyond(values, weights, at, weights_at, weighted, bound)
    return scalar_f16(scale), bound


@merged
def _ternary_code(values, at, bound):
    x = load_f32(values, 4 * at)
    code = pick_more(abs_f32(x), bound, sign_f32(x), zero_f32())
    return to_i32(add_f32(code, splat_f32(_F1)))


@merged
def _write_digits(codes, first, step, digits, count, out, at):
    """Write `count` bytes: digit n of byte m is the code at first + step n + m, the first counts most."""
    for m in range(count):
        value = 0
        for n in range(digits):
            value = 3 * value + int(codes[first + step * n + m])
        if digits == 4:
            value *= 3
        # ceil(value * 256 / 243), so that the digits come out as carries of a product with 3.
        out[at + m] = np.uint8((value * 256 + 242) // 243)


@inner
def _write_tq1_0(values, first, bound, codes, scale, out, at):
    for i in range(0, BLOCK, 16):
        store_i8(codes, i, _ternary_code(values, first + i, bound))
    _write_digits(codes, 0, 32, 5, 32, out, at)
    _write_digits(codes, 160, 16, 5, 16, out, at + 32)
    _write_digits(codes, 240, 4, 4, 4, out, at + 48)
    store_half(out, at + 52, scale)


@inner
def _write_tq2_0(values, first, bound, scale, out, at):
    for byte in range(0, 64, 16):
        element = first + 128 * (byte // 32) + byte % 32
        packed = _ternary_code(values, element, bound)
        packed = add_i32(packed, _shift2(_ternary_code(values, element + 32, bound)))
        packed = add_i32(packed, _shift4(_ternary_code(values, element + 64, bound)))
        packed = add_i32(packed, _shift6(_ternary_code(values, element + 96, bound)))
        store_i8(out, at + byte, packed)
    store_half(out, at + 64, scale)


@kernel
def ternary(rule, base3, values, columns, blocks, weights, weighted, codes, out):
    """Encode `values` as TQ2_0, or TQ1_0 if `base3`; rule: LLOYD_MAX, LEAST_SQUARES or ABSMEAN.

    Other arguments and the answer as those of `encode.affine`.
    """
    for block in range(blocks):
        at = block * BLOCK
        scale, threshold = _fit(rule, values, weights, at, at % columns, weighted)
        if not np.isfinite(scale):
            return block
        bound = splat_f32(threshold)
        if base3:
            _write_tq1_0(values, at, bound, codes, scale, out, block * 54)
        else:
            _write_tq2_0(values, at, bound, scale, out, block * 66)
    return -1
