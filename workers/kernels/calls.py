"""Kernels called through their address, and values handed to another thread's kernel through memory.

Numba knows a function by name and compiles it into each caller; an address costs no compiling and may be
chosen while running. It holds for this process and those forked from it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

from .simd.vector import pointer

_I64 = ir.IntType(64)


def address_of(dispatcher: Any, arguments: tuple[types.Type, ...]) -> int:
    """Return the address of the kernel for `arguments`, compiled now or loaded from the cache."""
    dispatcher.compile(arguments)
    compiled = dispatcher.overloads[arguments]
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.mangled_name)
    return address


def emit_call(context, builder, address, arg_types, args):
    """Emit the call of the kernel at `address`, of `arg_types`, which returns nothing."""
    convention = context.call_conv
    pointee = convention.get_function_type(types.none, arg_types)
    function = builder.inttoptr(address, ir.PointerType(pointee))
    status, _ = convention.call_function(builder, function, types.none, arg_types, args)
    with cgutils.if_unlikely(builder, status.is_error):
        convention.return_status_propagate(builder, status)
    return context.get_dummy_value()


@intrinsic
def lend(typing, board, index, value):
    """Keep `value` on the stack until this kernel returns, and its address in board[index]."""

    def emit(context, builder, signature, args):
        stored_at = cgutils.alloca_once_value(builder, args[2])
        offset = builder.shl(args[1], ir.Constant(args[1].type, 3))
        builder.store(
            builder.ptrtoint(stored_at, _I64),
            pointer(context, builder, signature.args[0], args[0], offset, _I64),
        )
        return context.get_dummy_value()

    return types.void(board, types.intp, value), emit


def borrower(value_type: types.Type):
    """Return the intrinsic (board, index) that gives the value of type `value_type` lent at board[index]."""

    def borrow(typing, board, index):
        def emit(context, builder, signature, args):
            offset = builder.shl(args[1], ir.Constant(args[1].type, 3))
            entry = pointer(context, builder, signature.args[0], args[0], offset, _I64)
            stored = context.get_value_type(value_type).as_pointer()
            value = builder.load(builder.inttoptr(builder.load(entry), stored))
            return impl_ret_borrowed(context, builder, value_type, value)

        return value_type(board, types.intp), emit

    return intrinsic(borrow)
