"""Tiles: the accumulators of several tokens for 16 rows, as one Numba value.

A tile is an LLVM array of v16i32; it lives in registers because every index is a constant. With it a
matrix product over B tokens is written once for each B. Activations come as a panel:

    panel = for each 4 columns: [token 0: 4 int8][token 1: 4 int8] ... [token B-1: 4 int8]

so that one address and constant offsets reach all tokens.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .dot import emit_dot_offset, emit_dot_unsigned
from .vector import I32, llvm_type, pointer, splat, v64u8


class Tile(types.Type):
    """`count` vectors of sixteen 32-bit lanes."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"tile<{count}>")


class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, front_end) -> None:
        super().__init__(manager, front_end, ir.ArrayType(llvm_type(I32), front_end.count))


register_model(Tile)(_TileModel)


def broadcast_tile(tokens: int):
    """Return the intrinsic (array, byte_offset): tile[i] and tile[tokens + i] hold dword i in all lanes."""

    def load(typing, array, byte_offset):
        def emit(context, builder, signature, args):
            value = ir.Constant(ir.ArrayType(llvm_type(I32), 2 * tokens), ir.Undefined)
            for i in range(tokens):
                at = builder.add(args[1], ir.Constant(args[1].type, 4 * i))
                dword = builder.load(pointer(context, builder, signature.args[0], args[0], at, I32))
                dword.align = 4
                for row in (i, tokens + i):
                    value = builder.insert_value(value, splat(builder, dword), row)
            return value

        return Tile(2 * tokens)(array, types.intp), emit

    return intrinsic(load)


def _tile_dot(tokens: int, emit_dot):
    def dot(typing, tile, w, v, panel, byte_offset):
        def emit(context, builder, signature, args):
            tile, w, v, array, offset = args
            for i in range(tokens):
                at = builder.add(offset, ir.Constant(offset.type, 4 * i))
                place = pointer(context, builder, signature.args[3], array, at, I32)
                dword = builder.load(place)
                dword.align = 4
                x = splat(builder, dword)
                for row, codes in ((i, w), (tokens + i, v)):
                    acc = emit_dot(builder, builder.extract_value(tile, row), codes, x)
                    tile = builder.insert_value(tile, acc, row)
            return tile

        pair = Tile(2 * tokens)
        return pair(pair, v64u8, v64u8, panel, types.intp), emit

    return intrinsic(dot)


def tile_dot_unsigned(tokens: int):
    """Return the intrinsic (tile, w, v, panel, byte_offset) for two groups of 16 rows.

    tile[i] += dot of w with token i's dword at byte_offset + 4 i, and tile[tokens + i] that of v.
    """
    return _tile_dot(tokens, emit_dot_unsigned)


def tile_dot_offset(tokens: int):
    """Return the same for weights stored as int8 + 128, see `dot.dot_offset`."""
    return _tile_dot(tokens, emit_dot_offset)


def store_tile(count: int):
    """Return the intrinsic (array, byte_offset, tile) that stores `count` vectors one after the other."""

    def store(typing, array, byte_offset, tile):
        def emit(context, builder, signature, args):
            for i in range(count):
                at = builder.add(args[1], ir.Constant(args[1].type, 64 * i))
                place = pointer(context, builder, signature.args[0], args[0], at, llvm_type(I32))
                builder.store(builder.extract_value(args[2], i), place).align = 1
            return context.get_dummy_value()

        return types.void(array, types.intp, Tile(count)), emit

    return intrinsic(store)
