"""exp and SiLU on sixteen lanes, the same bits on every target (no libm)."""

from __future__ import annotations

import numpy as np

from ..kernel import kernel
from .ops import (
    add_f32,
    add_i32,
    as_f32,
    div_f32,
    fma_f32,
    max_f32,
    min_f32,
    mul_f32,
    round_f32,
    shift_left_i32,
    splat_f32,
    splat_i32,
    sub_f32,
    to_i32,
    zero_f32,
)

_to_exponent = shift_left_i32(23)

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, so that x - n ln 2 keeps its low bits (Cody and Waite).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
# Minimax polynomial of (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2 (Cephes expf), error under 2 ulp.
_C0 = np.float32(1.9875691500e-4)
_C1 = np.float32(1.3981999507e-3)
_C2 = np.float32(8.3334519073e-3)
_C3 = np.float32(4.1665795894e-2)
_C4 = np.float32(1.6666665459e-1)
_C5 = np.float32(5.0000001201e-1)
_ONE = np.float32(1.0)
_MOST = np.float32(88.0)
_LEAST = np.float32(-87.0)


@kernel
def exp_f32(x):
    """exp of sixteen floats, clamped to [-87, 88]; relative error under 2e-7."""
    x = min_f32(max_f32(x, splat_f32(_LEAST)), splat_f32(_MOST))
    n = round_f32(mul_f32(x, splat_f32(_LOG2_E)))
    r = fma_f32(n, splat_f32(-_LN2_HIGH), x)
    r = fma_f32(n, splat_f32(-_LN2_LOW), r)
    p = splat_f32(_C0)
    p = fma_f32(p, r, splat_f32(_C1))
    p = fma_f32(p, r, splat_f32(_C2))
    p = fma_f32(p, r, splat_f32(_C3))
    p = fma_f32(p, r, splat_f32(_C4))
    p = fma_f32(p, r, splat_f32(_C5))
    p = add_f32(fma_f32(p, mul_f32(r, r), r), splat_f32(_ONE))
    scale = as_f32(_to_exponent(add_i32(to_i32(n), splat_i32(np.int32(127)))))
    return mul_f32(p, scale)


@kernel
def silu_f32(x):
    """x / (1 + exp(-x)) of sixteen floats."""
    return div_f32(x, add_f32(splat_f32(_ONE), exp_f32(sub_f32(zero_f32(), x))))
