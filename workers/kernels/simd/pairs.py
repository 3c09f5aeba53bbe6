"""Sums of pairs in 16-bit lanes: AVX2's own byte product, widened once in a while instead of every time.

`pmaddubsw` multiplies unsigned by signed bytes and adds neighbours to int16. Up to 16 of those with
weights of at most 8 fit: 16 * 2 * 8 * 128 = 32768, reached on the negative side alone.
"""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from .vector import (
    I8,
    I16,
    I32,
    LANES,
    Vector,
    call,
    constant,
    join,
    llvm_type,
    part,
    pointer,
    splat,
    v16i32,
    v64u8,
)

v32i16 = Vector(I16, 2 * LANES)


@intrinsic
def zero_pairs(typing):
    """Return sums of nothing."""

    def emit(context, builder, signature, args):
        return constant(I16, 0, 2 * LANES)

    return v32i16(), emit


@intrinsic
def add_pairs(typing, sums, weights, array, at):
    """Return sums + products of `weights` (v64u8, at most 8 each) with the dword at byte `at` of array."""

    def emit(context, builder, signature, args):
        sums, weights, array, at = args
        dword = builder.load(pointer(context, builder, signature.args[2], array, at, I32))
        dword.align = 1
        x = builder.bitcast(splat(builder, dword, 8), llvm_type(I8, 32))
        halves = []
        for start in (0, 32):
            operands = [part(builder, weights, start, 32), x]
            pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", llvm_type(I16, 16), operands)
            halves.append(builder.add(part(builder, sums, start // 2, 16), pairs))
        return join(builder, halves)

    return v32i16(v32i16, v64u8, array, types.intp), emit


@intrinsic
def widen_pairs(typing, sums):
    """Return the sums of neighbouring lanes as v16i32."""

    def emit(context, builder, signature, args):
        ones = constant(I16, 1, 16)
        halves = [
            call(
                builder,
                "llvm.x86.avx2.pmadd.wd",
                llvm_type(I32, 8),
                [part(builder, args[0], start, 16), ones],
            )
            for start in (0, 16)
        ]
        return join(builder, halves)

    return v16i32(v32i16), emit
