"""Vocabulary of the file formats' kernels: small integers, shifts of bytes, table look-up.

Loads widen sixteen bytes, one per row, to sixteen lanes. A table holds sixteen bytes and is looked up
by the low four bits of each byte: one shuffle on x86 and NEON, selections elsewhere.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..target import TARGET
from .groups import _SCALES, GROUPS, codes_type, scales_type
from .groups import _load as _load_scales
from .ops import _lanewise, _load
from .vector import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    call,
    constant,
    join,
    llvm_type,
    part,
    pointer,
    v16f32,
    v16i32,
    v64u8,
)

load_u8 = _load(v16i32, llvm_type(I8), lambda b, v: b.zext(v, llvm_type(I32)), "Sixteen unsigned bytes.")
load_i8 = _load(v16i32, llvm_type(I8), lambda b, v: b.sext(v, llvm_type(I32)), "Sixteen signed bytes.")


def _half_power(builder, exponents):
    # 2^(e - 128). Below e = 2 it is subnormal: 2^22 << e are its bits; 255 is no NaN in this format.
    e = builder.zext(exponents, llvm_type(I32))
    normal = builder.shl(builder.sub(e, constant(I32, 1)), constant(I32, 23))
    tiny = builder.shl(constant(I32, 0x00200000), e)
    small = builder.icmp_unsigned("<", e, constant(I32, 2))
    return builder.bitcast(builder.select(small, tiny, normal), llvm_type(F32))


load_e8m0_half = _load(v16f32, llvm_type(I8), _half_power, "2^(e - 128) for sixteen bytes e.")
load_half_powers = _load_scales(
    scales_type,
    _SCALES,
    llvm_type(I8),
    _half_power,
    "2^(e - 128) for sixteen bytes e of each group, the groups `step` bytes apart.",
)

mul_i32 = _lanewise(v16i32, (v16i32, v16i32), lambda b, x, y: b.mul(x, y))
or_bytes = _lanewise(v64u8, (v64u8, v64u8), lambda b, x, y: b.or_(x, y))


@intrinsic
def signed_codes(typing, codes):
    """Turn the bytes int8 + 128 of Codes to int8."""

    def emit(context, builder, signature, args):
        value = args[0]
        for group in range(GROUPS):
            flipped = builder.xor(builder.extract_value(value, group), constant(I8, -128, 4 * LANES))
            value = builder.insert_value(value, flipped, group)
        return value

    return codes_type(codes_type), emit


def and_i32(mask: int):
    """Return the intrinsic that masks each 32-bit lane with `mask`."""
    return _lanewise(v16i32, (v16i32,), lambda b, x: b.and_(x, constant(I32, mask)))


def shift_left_bytes(bits: int):
    """Return the intrinsic that shifts left within 16-bit lanes; mask the result afterwards."""

    def body(builder, x):
        wide = builder.bitcast(x, llvm_type(I16, 2 * LANES))
        return builder.bitcast(builder.shl(wide, constant(I16, bits, 2 * LANES)), llvm_type(I8, 4 * LANES))

    return _lanewise(v64u8, (v64u8,), body)


def _shuffle_pieces(name: str, width: int):
    def emit(builder, table, index):
        pieces = []
        for start in range(0, 4 * LANES, width):
            operands = [part(builder, table, start, width), part(builder, index, start, width)]
            pieces.append(call(builder, name, llvm_type(I8, width), operands))
        return join(builder, pieces)

    return emit


def _shuffle_vnni(builder, table, index):
    return call(builder, "llvm.x86.avx512.pshuf.b.512", llvm_type(I8, 4 * LANES), [table, index])


def _shuffle_generic(builder, table, index):
    found = constant(I8, 0, 4 * LANES)
    whole = table.type
    for code in range(16):
        lanes = ir.Constant(llvm_type(I32, 4 * LANES), [code] * (4 * LANES))
        value = builder.shuffle_vector(table, ir.Constant(whole, ir.Undefined), lanes)
        found = builder.select(
            builder.icmp_unsigned("==", index, constant(I8, code, 4 * LANES)), value, found
        )
    return found


_SHUFFLES = {
    "avx512vnni": _shuffle_vnni,
    "avxvnni": _shuffle_pieces("llvm.x86.avx2.pshuf.b", 32),
    "avx2": _shuffle_pieces("llvm.x86.avx2.pshuf.b", 32),
    "neon": _shuffle_pieces("llvm.aarch64.neon.tbl1.v16i8", 16),
    "generic": _shuffle_generic,
}


@intrinsic
def lookup(typing, table, index):
    """Return table[index] per byte: the table's 16 bytes stand four times in `table`; index 0..15."""

    def emit(context, builder, signature, args):
        return _SHUFFLES[TARGET](builder, *args)

    return v64u8(v64u8, v64u8), emit


def _four_times(builder, sixteen):
    lanes = ir.Constant(llvm_type(I32, 4 * LANES), list(range(16)) * 4)
    return builder.shuffle_vector(sixteen, ir.Constant(sixteen.type, ir.Undefined), lanes)


load_table = _load(v64u8, llvm_type(I8, 16), _four_times, "Sixteen bytes, four times over.")


@intrinsic
def load_dword(typing, array, byte_offset):
    """The 32 bits at any byte of `array`, as uint32."""

    def emit(context, builder, signature, args):
        value = builder.load(pointer(context, builder, signature.args[0], args[0], args[1], I32))
        value.align = 1
        return value

    return types.uint32(array, types.intp), emit


@intrinsic
def store_dword(typing, array, byte_offset, value):
    """Store the low 32 bits of `value` at any byte of `array`."""

    def emit(context, builder, signature, args):
        address = pointer(context, builder, signature.args[0], args[0], args[1], I32)
        builder.store(args[2], address).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint32), emit
