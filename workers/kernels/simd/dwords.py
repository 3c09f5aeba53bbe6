"""Dwords of an array, each repeated in all lanes: the four int8 activations that meet sixteen rows.

Where dots go by element (see `dot`), one load brings several dwords and repeating them is no instruction;
elsewhere each is loaded by itself, which an instruction's operand does.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .dot import BY_ELEMENT
from .vector import I32, LANES, Vector, llvm_type, pointer, splat

# Four dwords in a register, or only where they are.
quads_type = Vector(I32, 4) if BY_ELEMENT else types.intp


def load_scalar(context, builder, array_type, array, byte_offset, index: int, element: ir.Type):
    """Return the dword at byte_offset + 4 * index, of the LLVM type `element`, in all lanes."""
    at = builder.add(byte_offset, ir.Constant(byte_offset.type, 4 * index))
    scalar = builder.load(pointer(context, builder, array_type, array, at, element))
    scalar.align = 4
    return splat(builder, scalar)


def load_dwords(context, builder, array_type, array, byte_offset, count: int):
    """Yield `count` int32 from byte_offset, each in all lanes; count: 1, 2 or a multiple of 4."""
    if BY_ELEMENT:
        size = min(count, 4)
        for first in range(0, count, size):
            at = builder.add(byte_offset, ir.Constant(byte_offset.type, 4 * first))
            several = _load(context, builder, array_type, array, at, size)
            yield from (_splat_lane(builder, several, i) for i in range(size))
    else:
        for i in range(count):
            yield load_scalar(context, builder, array_type, array, byte_offset, i, I32)


@intrinsic
def load_quads(typing, panel, byte_offset):
    """Return four dwords of one token for `quad_of`."""

    def emit(context, builder, signature, args):
        panel, at = args
        return _load(context, builder, signature.args[0], panel, at, 4) if BY_ELEMENT else at

    return quads_type(panel, types.intp), emit


def quad_of(context, builder, array_type, array, quads, quad: int):
    """Return one of the four dwords in all lanes."""
    if BY_ELEMENT:
        return _splat_lane(builder, quads, quad)
    return load_scalar(context, builder, array_type, array, quads, quad, I32)


def _load(context, builder, array_type, array, byte_offset, count: int):
    vector = builder.load(pointer(context, builder, array_type, array, byte_offset, llvm_type(I32, count)))
    vector.align = 4
    return vector


def _splat_lane(builder, vector, lane: int):
    lanes = ir.Constant(llvm_type(I32), [lane] * LANES)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)
