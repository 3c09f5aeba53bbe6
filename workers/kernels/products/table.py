"""The matrix product of each format: its kernel, the one signature of all, and calls by address.

A product is compiled by itself, once. Kernels that multiply take its address as a number and call
that: a model compiles only the formats it holds, and LLVM optimises none of them again in each of its
callers. An address holds for this process and those forked from it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types
from numba.extending import intrinsic

from ..calls import address_of, emit_call
from . import base3, floating, kquants, nibbles, q8, ternary

F32, F16, BF16, Q8 = 0, 1, 2, 3
TL1, TL1_ROW, TL1_TOKEN = ternary.TL1, ternary.TL1_ROW, 7

_KERNELS: dict[int, Any] = {
    **floating.GEMMS,
    Q8: q8.gemm,
    **dict.fromkeys((TL1, TL1_ROW, TL1_TOKEN), ternary.gemm),
    base3.B3: base3.gemm,
    **dict.fromkeys((nibbles.Q4_0, nibbles.IQ4_NL, nibbles.MXFP4), nibbles.gemm),
    **kquants.GEMMS,
}

FORMS = tuple(_KERNELS)
"""All formats, as numbers."""

_BYTES = types.Array(types.uint8, 1, "C")
_FLOATS = types.Array(types.float32, 2, "C")
_NUMBER = types.int64
# The signature of every product: gemm(form, w, codes_at, scales_at, groups, columns, x, q, scales, sums,
# rows, count, scratch, out, out_at, out_step); ternary.gemm says what each is.
ARGUMENT_TYPES = (
    _NUMBER, _BYTES, _NUMBER, _NUMBER, _NUMBER, _NUMBER, _FLOATS, types.Array(types.int8, 2, "C"), _FLOATS,
    types.Array(types.int32, 2, "C"), types.Array(types.int32, 1, "C"), _NUMBER, _BYTES, _FLOATS, _NUMBER,
    _NUMBER,
)  # fmt: skip


def kernel_of(form: int) -> Callable[..., None]:
    """Return the product of `form` to be called from Python. Raises KeyError for an unknown format."""
    function: Callable[..., None] = _KERNELS[form]
    return function


@cache
def product(form: int) -> int:
    """Return the address of the product of `form`, compiled now or loaded from the cache.

    Raises KeyError for an unknown format.
    """
    return address_of(_KERNELS[form], ARGUMENT_TYPES)


@intrinsic
def multiply(
    typing, address, form, w, codes_at, scales_at, groups, columns, x, q, scales, sums, rows, count, scratch,
    out, out_at, out_step
):  # fmt: skip
    """out[t] = W @ x[rows[t]] by the product at `address`: float formats read x, others (q, scales, sums)."""

    def emit(context, builder, signature, args):
        return emit_call(context, builder, args[0], ARGUMENT_TYPES, args[1:])

    return types.void(_NUMBER, *ARGUMENT_TYPES), emit
