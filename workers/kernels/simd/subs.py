"""Sums of part of a block whose codes share an integer scale, for tiles; and their scaling.

Elsewhere such a sum is an int32 in a lane, begun with what the codes' offset takes off. AVX2 (PAIRS) adds
the int16 that `pmaddubsw` makes of neighbouring products as they are, and `pmaddwd` widens them and
multiplies with the scale in one: no sum may exceed 32767, and the offset is taken off apart from it.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..target import TARGET
from .groups import GROUPS, codes_type
from .tile import tile_dot
from .vector import I16, I32, LANES, call, constant, join, llvm_type, part, pointer, splat

PAIRS = TARGET == "avx2"


def _at(builder, byte_offset, distance: int):
    return builder.add(byte_offset, ir.Constant(byte_offset.type, distance))


def _load(context, builder, array_type, array, byte_offset):
    vector = builder.load(pointer(context, builder, array_type, array, byte_offset, llvm_type(I32)))
    vector.align = 1
    return vector


def _multiply_pairs(builder, sums, x):
    """Return v16i32: of each lane the sum of its two int16 of `sums` times those of `x`."""
    halves = []
    for start in (0, 16):
        operands = [
            part(builder, builder.bitcast(v, llvm_type(I16, 2 * LANES)), start, 16) for v in (sums, x)
        ]
        halves.append(call(builder, "llvm.x86.avx2.pmadd.wd", llvm_type(I32, 8), operands))
    return join(builder, halves)


def _pair(builder, low, high):
    """Return lanes of two int16 from two int32."""
    return builder.or_(builder.and_(low, constant(I32, 0xFFFF)), builder.shl(high, constant(I32, 16)))


def _dword(context, builder, array_type, array, byte_offset, index: int):
    dword = builder.load(
        pointer(context, builder, array_type, array, _at(builder, byte_offset, 4 * index), I32)
    )
    dword.align = 4
    return splat(builder, dword)


@intrinsic
def _tile_dot_pairs(typing, tile, codes, panel, byte_offset):
    """As `tile_dot`, but to sums of int16, two in a lane."""

    def emit(context, builder, signature, args):
        value, codes, array, at = args
        packet = builder.extract_value(codes, 0)
        for token in range(tile.count):
            x = builder.bitcast(_dword(context, builder, signature.args[2], array, at, token), packet.type)
            halves = []
            for start in (0, 32):
                operands = [part(builder, v, start, 32) for v in (packet, x)]
                halves.append(call(builder, "llvm.x86.avx2.pmadd.ub.sw", llvm_type(I16, 16), operands))
            old = builder.bitcast(builder.extract_value(value, token), llvm_type(I16, 2 * LANES))
            new = builder.bitcast(builder.add(old, join(builder, halves)), llvm_type(I32))
            value = builder.insert_value(value, new, token)
        return value

    return tile(tile, codes_type, panel, types.intp), emit


tile_dot_sub = _tile_dot_pairs if PAIRS else tile_dot


@intrinsic
def tile_dot_scales(typing, tile, array, scale_at, panel, byte_offset):
    """Add to the sums two scales of a row times two int16 of its token. Only with PAIRS.

    scale_at: in `array`, int32 of sixteen rows, then as many of the second scale; byte_offset: in `panel`,
    the dwords of the tokens.
    """

    def emit(context, builder, signature, args):
        value, array, at, panel, panel_at = args
        array_type = signature.args[1]
        low = _load(context, builder, array_type, array, at)
        scales = _pair(builder, low, _load(context, builder, array_type, array, _at(builder, at, 4 * LANES)))
        for token in range(tile.count):
            x = _dword(context, builder, signature.args[3], panel, panel_at, token)
            new = builder.add(builder.extract_value(value, token), _multiply_pairs(builder, scales, x))
            value = builder.insert_value(value, new, token)
        return value

    return tile(tile, array, types.intp, panel, types.intp), emit


@intrinsic
def tile_add_scaled(typing, array, byte_offset, tile, scale_at, step):
    """Add the tile of `tile_dot_sub` times a scale per row to the int32 at byte_offset: [token][group][16].

    scale_at: in `array`, int32 of the sixteen rows of a group; those of the groups lie `step` bytes apart.
    """

    def emit(context, builder, signature, args):
        array, offset, value, at, step = args
        array_type = signature.args[0]
        scales = []
        for _ in range(GROUPS):
            scale = _load(context, builder, array_type, array, at)
            scales.append(_pair(builder, scale, scale) if PAIRS else scale)
            at = builder.add(at, step)
        for row in range(tile.count):
            here = _at(builder, offset, 4 * LANES * row)
            operands = [builder.extract_value(value, row), scales[row % GROUPS]]
            scaled = _multiply_pairs(builder, *operands) if PAIRS else builder.mul(*operands)
            new = builder.add(_load(context, builder, array_type, array, here), scaled)
            builder.store(new, pointer(context, builder, array_type, array, here, new.type)).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, tile, types.intp, types.intp), emit


@intrinsic
def load_tile(typing, like, array, byte_offset):
    """A tile as large as `like` from vectors that lie one after the other."""

    def emit(context, builder, signature, args):
        value = args[0]
        for row in range(like.count):
            at = _at(builder, args[2], 4 * LANES * row)
            value = builder.insert_value(value, _load(context, builder, signature.args[1], args[1], at), row)
        return value

    return like(like, array, types.intp), emit
