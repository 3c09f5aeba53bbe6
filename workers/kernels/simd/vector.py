"""Vector types for Numba and the helpers with which intrinsics are made."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

LANES = 16

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
F32 = ir.FloatType()
F16 = ir.HalfType()


class Vector(types.Type):
    """`count` elements of the LLVM type `element`, held in registers."""

    def __init__(self, element: ir.Type, count: int) -> None:
        self.element = element
        self.count = count
        super().__init__(name=f"vector<{count} x {element}>")


class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, front_end) -> None:
        super().__init__(manager, front_end, ir.VectorType(front_end.element, front_end.count))


register_model(Vector)(_VectorModel)

v64u8 = Vector(I8, 4 * LANES)
v16i32 = Vector(I32, LANES)
v16f32 = Vector(F32, LANES)


def llvm_type(element: ir.Type, count: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, count)


def constant(element: ir.Type, value: float, count: int = LANES) -> ir.Constant:
    return ir.Constant(llvm_type(element, count), [value] * count)


def pointer(context, builder, array_type, array, byte_offset, pointee: ir.Type):
    """Return a pointer to `pointee`, `byte_offset` bytes into the array's data."""
    data = context.make_array(array_type)(context, builder, array).data
    address = builder.gep(builder.bitcast(data, I8.as_pointer()), [byte_offset])
    return builder.bitcast(address, pointee.as_pointer())


def call(builder, name: str, result: ir.Type, args):
    """Call the LLVM intrinsic `name`."""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def splat(builder, scalar, count: int = LANES):
    """Return a vector with `scalar` in each lane."""
    whole = llvm_type(scalar.type, count)
    first = builder.insert_element(ir.Constant(whole, ir.Undefined), scalar, I32(0))
    lanes = ir.Constant(llvm_type(I32, count), [0] * count)
    return builder.shuffle_vector(first, ir.Constant(whole, ir.Undefined), lanes)


def part(builder, vector, start: int, count: int):
    """Return `count` elements from `start`; free where the target splits the vector anyway."""
    lanes = ir.Constant(llvm_type(I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)


def join(builder, parts):
    """Concatenate vectors of equal type; their number is a power of two."""
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        lanes = ir.Constant(llvm_type(I32, count), list(range(count)))
        parts = [builder.shuffle_vector(a, b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
