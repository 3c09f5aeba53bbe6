"""Vocabulary of encoders and decoders: choosing lanes, summing neighbours, single float16 numbers."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..kernel import merged
from .ops import _lanewise, add_f32, max_f32
from .vector import F16, F32, I16, I32, LANES, constant, llvm_type, pointer, v16f32


@intrinsic
def pick_more(typing, left, right, yes, no):
    """Yes where left > right, no elsewhere; a NaN on either side is no."""

    def emit(context, builder, signature, args):
        more = builder.fcmp_ordered(">", args[0], args[1])
        return builder.select(more, args[2], args[3])

    return v16f32(v16f32, v16f32, v16f32, v16f32), emit


@intrinsic
def half_at(typing, array, byte_offset):
    """The float16 at a byte of `array`, as float32."""

    def emit(context, builder, signature, args):
        address = pointer(context, builder, signature.args[0], args[0], args[1], F16)
        value = builder.load(address)
        value.align = 1
        return builder.fpext(value, F32)

    return types.float32(array, types.intp), emit


@intrinsic
def store_half(typing, array, byte_offset, value):
    """Write a float32 as the nearest float16 at a byte of `array`."""

    def emit(context, builder, signature, args):
        address = pointer(context, builder, signature.args[0], args[0], args[1], I16)
        bits = builder.bitcast(builder.fptrunc(args[2], F16), I16)
        builder.store(bits, address).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), emit


def _sign(builder, x):
    one, minus, zero = (constant(F32, v) for v in (1.0, -1.0, 0.0))
    positive = builder.fcmp_ordered(">", x, zero)
    negative = builder.fcmp_ordered("<", x, zero)
    return builder.select(positive, one, builder.select(negative, minus, zero))


sign_f32 = _lanewise(v16f32, (v16f32,), _sign, "1, 0 or -1; 0 for a NaN.")


def _swap(distance: int):
    """Return the intrinsic that swaps each lane with the one `distance` away (a power of two)."""

    def body(builder, x):
        lanes = ir.Constant(llvm_type(I32), [lane ^ distance for lane in range(LANES)])
        return builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), lanes)

    return _lanewise(v16f32, (v16f32,), body)


_swap1, _swap2, _swap4, _swap8 = _swap(1), _swap(2), _swap(4), _swap(8)


@merged
def sum_lanes(x, count):
    """The sum of 8 or 16 neighbouring lanes, in each of them."""
    x = add_f32(x, _swap1(x))
    x = add_f32(x, _swap2(x))
    x = add_f32(x, _swap4(x))
    return add_f32(x, _swap8(x)) if count == LANES else x


@merged
def most_lanes(x, count):
    """The largest of 8 or 16 neighbouring lanes, in each of them."""
    x = max_f32(x, _swap1(x))
    x = max_f32(x, _swap2(x))
    x = max_f32(x, _swap4(x))
    return max_f32(x, _swap8(x)) if count == LANES else x
