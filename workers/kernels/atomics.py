"""Atomic operations, pauses and futex waits inside kernels, on the elements of int64 arrays.

Everything is sequentially consistent. A futex looks at the low half of its element, which lies first:
both architectures are little-endian. Waits end after their time at the latest and check nothing.
"""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd.vector import I32, call, pointer

_I64 = ir.IntType(64)
_ARM = platform.machine() == "aarch64"
_SYS_FUTEX = 98 if _ARM else 202
_WAIT_PRIVATE, _WAKE_PRIVATE = 128, 129


def _address(context, builder, signature, args, pointee=_I64):
    """Return a pointer to element args[1] of the array args[0]."""
    offset = builder.shl(args[1], ir.Constant(args[1].type, 3))
    return pointer(context, builder, signature.args[0], args[0], offset, pointee)


@intrinsic
def fetch_add(typing, array, index, value):
    """Add `value` to array[index] and return what was there."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", _address(context, builder, signature, args), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), emit


@intrinsic
def load(typing, array, index):
    """Return array[index]."""

    def emit(context, builder, signature, args):
        return builder.load_atomic(_address(context, builder, signature, args), "seq_cst", 8)

    return types.int64(array, types.intp), emit


@intrinsic
def store(typing, array, index, value):
    """Set array[index]."""

    def emit(context, builder, signature, args):
        builder.store_atomic(args[2], _address(context, builder, signature, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), emit


@intrinsic
def pause(typing):
    """Tell the core that this is a spinning loop."""

    def emit(context, builder, signature, args):
        if _ARM:
            call(builder, "llvm.aarch64.hint", ir.VoidType(), [I32(1)])  # yield
        elif platform.machine() == "x86_64":
            call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), emit


def _futex(builder, word, operation: int, value, timeout):
    """Call futex(2) through libc's syscall(2); its result does not matter: callers look again."""
    byte = ir.IntType(8).as_pointer()
    function_type = ir.FunctionType(_I64, [_I64, byte, _I64, _I64, byte], var_arg=True)
    function = cgutils.get_or_insert_function(builder.module, function_type, "syscall")
    numbers = [_I64(_SYS_FUTEX), builder.bitcast(word, byte), _I64(operation)]
    builder.call(function, [*numbers, value, timeout])


@intrinsic
def futex_wait(typing, array, index, seen, timeout_ns):
    """Sleep until a wake if the low half of array[index] still is that of `seen`; under a second."""

    def emit(context, builder, signature, args):
        time = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        builder.store(ir.Constant(ir.ArrayType(_I64, 2), [_I64(0), _I64(0)]), time)
        nanoseconds = builder.gep(time, [I32(0), I32(1)])
        builder.store(args[3], nanoseconds)
        low = builder.and_(args[2], _I64(0xFFFFFFFF))
        word = _address(context, builder, signature, args, I32)
        _futex(builder, word, _WAIT_PRIVATE, low, builder.bitcast(time, ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64, types.int64), emit


@intrinsic
def futex_wake(typing, array, index, count):
    """Wake up to `count` threads that sleep on array[index]."""

    def emit(context, builder, signature, args):
        word = _address(context, builder, signature, args, I32)
        _futex(builder, word, _WAKE_PRIVATE, args[2], ir.Constant(ir.IntType(8).as_pointer(), None))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), emit
