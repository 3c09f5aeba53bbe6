"""Loads, stores and lane-wise arithmetic on the vectors of `vector`. Offsets are in bytes.

Float operations carry no fast-math flags: they round as written, on every target alike.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .vector import (
    F16,
    F32,
    I8,
    I16,
    I32,
    LANES,
    call,
    constant,
    llvm_type,
    part,
    pointer,
    splat,
    v16f32,
    v16i32,
    v64u8,
)


def _load(result, stored: ir.Type, widen=None, doc: str = ""):
    def load(typing, array, byte_offset):
        def emit(context, builder, signature, args):
            address = pointer(context, builder, signature.args[0], args[0], args[1], stored)
            value = builder.load(address)
            value.align = 1
            return widen(builder, value) if widen else value

        return result(array, types.intp), emit

    load.__doc__ = doc
    return intrinsic(load)


def _store(source, stored: ir.Type, narrow=None, doc: str = ""):
    def store(typing, array, byte_offset, vector):
        def emit(context, builder, signature, args):
            address = pointer(context, builder, signature.args[0], args[0], args[1], stored)
            value = narrow(builder, args[2]) if narrow else args[2]
            builder.store(value, address).align = 1
            return context.get_dummy_value()

        return types.void(array, types.intp, source), emit

    store.__doc__ = doc
    return intrinsic(store)


@intrinsic
def address(typing, array):
    """The address of the array's first byte."""

    def emit(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.intp))

    return types.intp(array), emit


def _lanewise(result, operands, body, doc: str = ""):
    def typed():
        return result(*operands), lambda context, builder, signature, args: body(builder, *args)

    # Numba reads the number of arguments from the function's own signature.
    by_arity = (
        lambda typing, a: typed(),
        lambda typing, a, b: typed(),
        lambda typing, a, b, c: typed(),
    )
    operation = by_arity[len(operands) - 1]
    operation.__doc__ = doc
    return intrinsic(operation)


def _constant(result, element: ir.Type, value: float):
    def make(typing):
        return result(), lambda context, builder, signature, args: constant(element, value)

    return intrinsic(make)


def _widen_bf16(builder, value):
    bits = builder.shl(builder.zext(value, llvm_type(I32)), constant(I32, 16))
    return builder.bitcast(bits, llvm_type(F32))


def _unary_call(name: str):
    return lambda builder, a: call(builder, f"llvm.{name}.v16f32", llvm_type(F32), [a])


def _choose(builder, comparison: str, x, y):
    # Unordered: a NaN in x is kept. llvm.minnum and maxnum would swallow it.
    return builder.select(builder.fcmp_unordered(comparison, x, y), x, y)


load_bytes = _load(v64u8, llvm_type(I8, 4 * LANES))
load_f32 = _load(v16f32, llvm_type(F32))
load_f16 = _load(v16f32, llvm_type(F16), lambda b, v: b.fpext(v, llvm_type(F32)))
load_bf16 = _load(v16f32, llvm_type(I16), _widen_bf16)
# One dword of the array in every lane: four neighbouring int8 activations for sixteen rows.
broadcast_dword = _load(v16i32, I32, splat)
broadcast_f32 = _load(v16f32, F32, splat)
store_f32 = _store(v16f32, llvm_type(F32))
load_i32 = _load(v16i32, llvm_type(I32))
store_i32 = _store(v16i32, llvm_type(I32))
store_bytes = _store(v64u8, llvm_type(I8, 4 * LANES))
store_f16 = _store(v16f32, llvm_type(F16), lambda b, v: b.fptrunc(v, llvm_type(F16)))

zero_i32 = _constant(v16i32, I32, 0)
zero_f32 = _constant(v16f32, F32, 0.0)

splat_f32 = _lanewise(v16f32, (types.float32,), splat)
splat_i32 = _lanewise(v16i32, (types.int32,), splat)
add_i32 = _lanewise(v16i32, (v16i32, v16i32), lambda b, x, y: b.add(x, y))
sub_i32 = _lanewise(v16i32, (v16i32, v16i32), lambda b, x, y: b.sub(x, y))
to_f32 = _lanewise(v16f32, (v16i32,), lambda b, x: b.sitofp(x, llvm_type(F32)))
to_i32 = _lanewise(v16i32, (v16f32,), lambda b, x: b.fptosi(x, llvm_type(I32)))
as_f32 = _lanewise(v16f32, (v16i32,), lambda b, x: b.bitcast(x, llvm_type(F32)))
add_f32 = _lanewise(v16f32, (v16f32, v16f32), lambda b, x, y: b.fadd(x, y))
sub_f32 = _lanewise(v16f32, (v16f32, v16f32), lambda b, x, y: b.fsub(x, y))
mul_f32 = _lanewise(v16f32, (v16f32, v16f32), lambda b, x, y: b.fmul(x, y))
div_f32 = _lanewise(v16f32, (v16f32, v16f32), lambda b, x, y: b.fdiv(x, y))
fma_f32 = _lanewise(
    v16f32,
    (v16f32, v16f32, v16f32),
    lambda b, x, y, z: call(b, "llvm.fma.v16f32", llvm_type(F32), [x, y, z]),
    "x * y + z, rounded once.",
)
round_f16 = _lanewise(
    v16f32,
    (v16f32,),
    lambda b, x: b.fpext(b.fptrunc(x, llvm_type(F16)), llvm_type(F32)),
    "The nearest float16 values.",
)
scalar_f16 = _lanewise(types.float32, (types.float32,), lambda b, x: b.fpext(b.fptrunc(x, F16), F32))
min_f32 = _lanewise(v16f32, (v16f32, v16f32), lambda b, x, y: _choose(b, "<", x, y), "A NaN stays NaN.")
max_f32 = _lanewise(v16f32, (v16f32, v16f32), lambda b, x, y: _choose(b, ">", x, y), "A NaN stays NaN.")
abs_f32 = _lanewise(v16f32, (v16f32,), _unary_call("fabs"))
round_f32 = _lanewise(v16f32, (v16f32,), _unary_call("rint"), "Round half to even.")


def _fold(builder, vector, combine):
    count = LANES
    while count > 1:
        count //= 2
        vector = combine(builder, part(builder, vector, 0, count), part(builder, vector, count, count))
    return builder.extract_element(vector, I32(0))


# Halves are added to each other, so that the order is the same on every target.
sum_f32 = _lanewise(types.float32, (v16f32,), lambda b, x: _fold(b, x, lambda b, p, q: b.fadd(p, q)))


sum_i32 = _lanewise(types.int32, (v16i32,), lambda b, x: _fold(b, x, lambda b, p, q: b.add(p, q)))
largest_f32 = _lanewise(
    types.float32, (v16f32,), lambda b, x: _fold(b, x, lambda b, p, q: _choose(b, ">", p, q))
)


def shift_left_i32(bits: int):
    """Return the intrinsic that shifts each 32-bit lane left by `bits`."""
    return _lanewise(v16i32, (v16i32,), lambda b, x: b.shl(x, constant(I32, bits)))


def shift_right_i32(bits: int):
    """Return the intrinsic that shifts each 32-bit lane right by `bits`, keeping the sign."""
    return _lanewise(v16i32, (v16i32,), lambda b, x: b.ashr(x, constant(I32, bits)))


def and_bytes(mask: int):
    """Return the intrinsic that masks each byte with `mask`."""
    return _lanewise(v64u8, (v64u8,), lambda b, x: b.and_(x, constant(I8, mask, 4 * LANES)))


def xor_bytes(mask: int):
    """Return the intrinsic that flips the bits of `mask` in each byte."""
    return _lanewise(v64u8, (v64u8,), lambda b, x: b.xor(x, constant(I8, mask, 4 * LANES)))


def shift_right_bytes(bits: int):
    """Return the intrinsic that shifts right within 16-bit lanes; mask the result afterwards."""

    def body(builder, x):
        wide = builder.bitcast(x, llvm_type(I16, 2 * LANES))
        return builder.bitcast(builder.lshr(wide, constant(I16, bits, 2 * LANES)), llvm_type(I8, 4 * LANES))

    return _lanewise(v64u8, (v64u8,), body)


store_i8 = _store(
    v16i32, llvm_type(I8), lambda b, v: b.trunc(v, llvm_type(I8)), "Store the low byte of each lane."
)
