"""How many multiply-accumulates of bytes one core does when it does nothing else.

The ceiling of every integer matrix product: independent sums in registers, one load in many dot
products. Only for the benchmark.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..kernel import kernel
from ..simd.dot import emit_dot_unsigned
from ..simd.ops import load_bytes
from ..simd.tile import Tile, store_tile
from ..simd.vector import I32, LANES, llvm_type, pointer, splat, v64u8
from ..target import TARGET

# Sums side by side: enough to hide the latency of the dot product (5 cycles, two a cycle), few enough
# that with as many activations they fit the registers (32 of 512 bits, else 16 or 32 of 128 or 256).
SUMS = 12 if TARGET == "avx512vnni" else 4
MACS_PER_ROUND = SUMS * 4 * LANES

_store = store_tile(SUMS)


@intrinsic
def _broadcasts(typing, array, byte_offset):
    """Return a tile whose vector i has the dword at byte_offset + 4 i in all lanes."""

    def emit(context, builder, signature, args):
        value = ir.Constant(ir.ArrayType(llvm_type(I32), SUMS), ir.Undefined)
        for i in range(SUMS):
            at = builder.add(args[1], ir.Constant(args[1].type, 4 * i))
            dword = builder.load(pointer(context, builder, signature.args[0], args[0], at, I32))
            dword.align = 4
            value = builder.insert_value(value, splat(builder, dword), i)
        return value

    return Tile(SUMS)(array, types.intp), emit


@intrinsic
def _dots(typing, sums, w, x):
    """sums[i] += dot of w with x[i]."""

    def emit(context, builder, signature, args):
        sums, w, x = args
        for i in range(SUMS):
            acc = emit_dot_unsigned(builder, builder.extract_value(sums, i), w, builder.extract_value(x, i))
            sums = builder.insert_value(sums, acc, i)
        return sums

    return Tile(SUMS)(Tile(SUMS), v64u8, Tile(SUMS)), emit


@kernel
def dot_rounds(buffer, rounds):
    """Do `rounds` times MACS_PER_ROUND multiply-accumulates; buffer: uint8, at least 2048 bytes.

    The sums end in bytes 1024.. of the buffer. The codes change with each round, because a product of
    the same two would be computed once.
    """
    x = _broadcasts(buffer, 1024)
    sums = _broadcasts(buffer, 1024 + 4 * SUMS)
    for i in range(rounds):
        sums = _dots(sums, load_bytes(buffer, (i & 15) * 64), x)
    _store(buffer, 1024, sums)


def make_buffer() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return a buffer for `dot_rounds`: codes 0..63, which every target multiplies exactly."""
    return np.random.default_rng(3).integers(0, 64, 2048, np.uint8)
