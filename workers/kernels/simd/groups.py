"""What one pass over a matrix handles at a time: GROUPS groups of sixteen rows for up to TOKENS tokens.

The shape is the one whose sums fill the registers: thirty-two of 512 bits hold two groups for eight
tokens, sixteen of 256 bits (or thirty-two of 128) one group for four. `Codes` are a packet of 64 bytes of
each group, `Scales` sixteen float32 of each. With GROUPS == 1 the distance between groups is not used.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from ..target import TARGET
from .vector import F16, F32, I8, I16, LANES, constant, llvm_type, pointer

GROUPS = 2 if TARGET == "avx512vnni" else 1
TOKENS = 8 if TARGET == "avx512vnni" else 4
PACKET = 4 * LANES
SPREAD = 64 * PACKET  # as scratch.SPREAD
"""Bytes between the groups' unpacked codes in scratch: a block of 256 columns, one byte a code."""


class Codes(types.Type):
    """A v64u8 of each group."""

    def __init__(self) -> None:
        super().__init__(name="codes")


class Scales(types.Type):
    """A v16f32 of each group."""

    def __init__(self) -> None:
        super().__init__(name="scales")


_CODES = ir.ArrayType(llvm_type(I8, PACKET), GROUPS)
_SCALES = ir.ArrayType(llvm_type(F32), GROUPS)


class _CodesModel(models.PrimitiveModel):
    def __init__(self, manager, front_end) -> None:
        super().__init__(manager, front_end, _CODES)


class _ScalesModel(models.PrimitiveModel):
    def __init__(self, manager, front_end) -> None:
        super().__init__(manager, front_end, _SCALES)


register_model(Codes)(_CodesModel)
register_model(Scales)(_ScalesModel)
codes_type = Codes()
scales_type = Scales()


def _load(result, whole: ir.ArrayType, stored: ir.Type, widen=None, doc: str = ""):
    def load(typing, array, byte_offset, step):
        def emit(context, builder, signature, args):
            array, at, step = args
            value = ir.Constant(whole, ir.Undefined)
            for group in range(GROUPS):
                address = pointer(context, builder, signature.args[0], array, at, stored)
                vector = builder.load(address)
                vector.align = 1
                value = builder.insert_value(value, widen(builder, vector) if widen else vector, group)
                at = builder.add(at, step)
            return value

        return result(array, types.intp, types.intp), emit

    load.__doc__ = doc
    return intrinsic(load)


load_codes = _load(
    codes_type, _CODES, llvm_type(I8, PACKET), doc="A packet of each group, the groups `step` bytes apart."
)
load_scales = _load(
    scales_type,
    _SCALES,
    llvm_type(F16),
    lambda builder, v: builder.fpext(v, llvm_type(F32)),
    "Sixteen float16 of each group, the groups `step` bytes apart.",
)


@intrinsic
def no_scales(typing):
    """Scales of 1 for every row: a product with them changes no bit."""

    def emit(context, builder, signature, args):
        return ir.Constant(_SCALES, [constant(F32, 1.0)] * GROUPS)

    return scales_type(), emit


@intrinsic
def spread_codes(typing, array, byte_offset, codes):
    """Store the packet of each group, the groups SPREAD bytes apart."""

    def emit(context, builder, signature, args):
        for group in range(GROUPS):
            at = builder.add(args[1], ir.Constant(args[1].type, SPREAD * group))
            address = pointer(context, builder, signature.args[0], args[0], at, llvm_type(I8, PACKET))
            builder.store(builder.extract_value(args[2], group), address).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, codes_type), emit


def field(mask: int, down: int = 0):
    """Return the intrinsic that shifts the bytes of Codes right by `down` bits and masks them with `mask`.

    The bits that a shift brings in from the neighbouring byte must be outside the mask.
    """
    # NEON shifts bytes apart; then the topmost field needs no mask.
    alone = TARGET == "neon" and mask == 0xFF >> down

    def take(typing, codes):
        def emit(context, builder, signature, args):
            value = args[0]
            for group in range(GROUPS):
                packet = builder.extract_value(value, group)
                if alone:
                    packet = builder.lshr(packet, constant(I8, down, PACKET))
                elif down:
                    wide = builder.bitcast(packet, llvm_type(I16, 2 * LANES))
                    packet = builder.bitcast(
                        builder.lshr(wide, constant(I16, down, 2 * LANES)), llvm_type(I8, PACKET)
                    )
                if not alone:
                    packet = builder.and_(packet, constant(I8, mask, PACKET))
                value = builder.insert_value(value, packet, group)
            return value

        return codes_type(codes_type), emit

    return intrinsic(take)
