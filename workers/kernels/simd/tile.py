"""Tiles: the accumulators of several tokens for 16 rows, as one Numba value.

A tile is an LLVM array of v16i32; it lives in registers because every index is a constant. With it a
matrix product over B tokens is written once for each B. Activations come as a panel:

    panel = for each 4 columns: [token 0: 4 int8][token 1: 4 int8] ... [token B-1: 4 int8]

so that one address and constant offsets reach all tokens. A tile is [token][group], see `groups`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .dot import emit_dot_unsigned, emit_dot_weights
from .dwords import load_dwords, load_scalar, quad_of, quads_type
from .groups import GROUPS, codes_type, scales_type
from .vector import F32, I32, LANES, call, constant, llvm_type, pointer, splat


class Tile(types.Type):
    """`count` vectors of sixteen 32-bit lanes."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"tile<{count}>")


class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, front_end) -> None:
        super().__init__(manager, front_end, ir.ArrayType(llvm_type(I32), front_end.count))


register_model(Tile)(_TileModel)


def store_tile(count: int):
    """Return the intrinsic (array, byte_offset, tile) that stores `count` vectors one after the other."""

    def store(typing, array, byte_offset, tile):
        def emit(context, builder, signature, args):
            for i in range(count):
                at = builder.add(args[1], ir.Constant(args[1].type, 64 * i))
                address = pointer(context, builder, signature.args[0], args[0], at, llvm_type(I32))
                builder.store(builder.extract_value(args[2], i), address).align = 1
            return context.get_dummy_value()

        return types.void(array, types.intp, Tile(count)), emit

    return intrinsic(store)


def _spread(builder, like: Tile, vectors):
    """Return a tile with the vector of each token in all its groups."""
    value = ir.Constant(ir.ArrayType(llvm_type(I32), like.count), ir.Undefined)
    for row in range(like.count):
        value = builder.insert_value(value, vectors[row // GROUPS], row)
    return value


def zero_tile(tokens: int):
    """Return the intrinsic () that makes a tile of zeros for `tokens` tokens."""
    tile_type = Tile(tokens * GROUPS)

    def make(typing):
        zeros = ir.Constant(
            ir.ArrayType(llvm_type(I32), tile_type.count), [constant(I32, 0)] * tile_type.count
        )
        return tile_type(), lambda context, builder, signature, args: zeros

    return intrinsic(make)


@intrinsic
def fill_tile(typing, like, value):
    """A tile as large as `like` with the int32 `value` in all lanes."""

    def emit(context, builder, signature, args):
        return _spread(builder, signature.args[0], [splat(builder, args[1])] * like.count)

    return like(like, types.int32), emit


@intrinsic
def start_tile(typing, like, array, byte_offset):
    """A tile as large as `like` with the dword of token i, at byte_offset + 4 i, in its lanes."""

    def emit(context, builder, signature, args):
        array_type = signature.args[1]
        dwords = [
            load_scalar(context, builder, array_type, args[1], args[2], i, I32)
            for i in range(like.count // GROUPS)
        ]
        return _spread(builder, like, dwords)

    return like(like, array, types.intp), emit


def _add_dots(builder, value, codes, token: int, x, emit_dot=emit_dot_unsigned):
    """Add the dots of all groups' codes with `x` to the sums of the token."""
    for group in range(GROUPS):
        row = token * GROUPS + group
        packet = builder.extract_value(codes, group)
        acc = emit_dot(builder, builder.extract_value(value, row), packet, x)
        value = builder.insert_value(value, acc, row)
    return value


@intrinsic
def tile_dot(typing, tile, codes, panel, byte_offset):
    """Add to each sum the dot product of its group's codes with its token's dword of the panel."""

    def emit(context, builder, signature, args):
        value, codes, array, at = args
        xs = load_dwords(context, builder, signature.args[2], array, at, tile.count // GROUPS)
        for token, x in enumerate(xs):
            value = _add_dots(builder, value, codes, token, x)
        return value

    return tile(tile, codes_type, panel, types.intp), emit


def tile_dot_quad(quad: int):
    """Return the intrinsic (tile, codes, panel, quads): `tile_dot` of one token with that one of four quads.

    quads: what `load_quads` makes of the panel.
    """

    def dot(typing, tile, codes, panel, quads):
        def emit(context, builder, signature, args):
            value, codes, array, quads = args
            x = quad_of(context, builder, signature.args[2], array, quads, quad)
            return _add_dots(builder, value, codes, 0, x)

        return tile(tile, codes_type, panel, quads_type), emit

    return intrinsic(dot)


@intrinsic
def tile_dot_weights(typing, tile, codes, panel, byte_offset):
    """As `tile_dot`, for weights as `dot.dot_weights` takes them."""

    def emit(context, builder, signature, args):
        value, codes, array, at = args
        xs = load_dwords(context, builder, signature.args[2], array, at, tile.count // GROUPS)
        for token, x in enumerate(xs):
            value = _add_dots(builder, value, codes, token, x, emit_dot_weights)
        return value

    return tile(tile, codes_type, panel, types.intp), emit


def _each(body):
    """Return the intrinsic that applies `body(builder, vector, ...)` to the vectors of one or two tiles."""

    def emit(context, builder, signature, args):
        value = args[0]
        for row in range(signature.return_type.count):
            operands = [builder.extract_value(tile, row) for tile in args]
            value = builder.insert_value(value, body(builder, *operands), row)
        return value

    return emit


def _shift(bits: int):
    """Return the body that shifts left by `bits`, or right by -`bits`, keeping the sign."""

    def body(builder, x):
        if bits == 0:
            return x
        return builder.shl(x, constant(I32, bits)) if bits > 0 else builder.ashr(x, constant(I32, -bits))

    return body


def tile_shift(bits: int):
    """Return the intrinsic that shifts all sums left by `bits`, or right by -`bits`, keeping the sign."""

    def shift(typing, tile):
        return tile(tile), _each(_shift(bits))

    return intrinsic(shift)


def tile_add(first: int = 0, second: int = 0, both: int = 0):
    """Return the intrinsic (tile, other): ((tile >> first) + (other >> second)) >> both."""

    def body(builder, x, y):
        return builder.add(_shift(-first)(builder, x), _shift(-second)(builder, y))

    def add(typing, tile, other):
        def emit(context, builder, signature, args):
            value = _each(body)(context, builder, signature, args)
            return _each(_shift(-both))(context, builder, signature, [value])

        return tile(tile, tile), emit

    return intrinsic(add)


@intrinsic
def tile_finish(typing, tile, scales, x_scales, scale_at, sums, sum_at):
    """Add the scaled tile to float sums: sum = fma(float(tile), scale of row * scale of token, sum).

    x_scales: array with the float32 of token i at byte scale_at + 4 i; sums: array of float32
    [token][group][16 rows] from byte sum_at.
    """

    def emit(context, builder, signature, args):
        value, scales, x_scales, scale_at, array, at = args
        for row in range(tile.count):
            token, group = divmod(row, GROUPS)
            x_scale = load_scalar(context, builder, signature.args[2], x_scales, scale_at, token, F32)
            scale = builder.fmul(builder.extract_value(scales, group), x_scale)
            exact = builder.sitofp(builder.extract_value(value, row), llvm_type(F32))
            here = builder.add(at, ir.Constant(at.type, 4 * LANES * row))
            address = pointer(context, builder, signature.args[4], array, here, llvm_type(F32))
            old = builder.load(address)
            old.align = 1
            new = call(builder, "llvm.fma.v16f32", llvm_type(F32), [exact, scale, old])
            builder.store(new, address).align = 1
        return context.get_dummy_value()

    return types.void(tile, scales_type, x_scales, types.intp, sums, types.intp), emit


def _interleave(builder, vectors):
    """Return the elements 0 of all vectors, then their elements 1, ..., in as many vectors."""
    if len(vectors) == 1:
        return vectors
    even, odd = _interleave(builder, vectors[0::2]), _interleave(builder, vectors[1::2])
    count = vectors[0].type.count
    result = []
    for a, b in zip(even, odd, strict=True):
        for start in (0, count // 2):
            lanes = [start + i // 2 + count * (i % 2) for i in range(count)]
            result.append(builder.shuffle_vector(a, b, ir.Constant(llvm_type(I32, count), lanes)))
    return result


def _row_of(context, builder, rows_type, rows, index):
    """Return rows[index] of an int32 array as a number of the width of `index`."""
    at = builder.mul(index, ir.Constant(index.type, 4))
    return builder.sext(builder.load(pointer(context, builder, rows_type, rows, at, I32)), index.type)


@intrinsic
def tokens_of(typing, tile):
    """For how many tokens the tile is."""
    count = tile.count // GROUPS

    def emit(context, builder, signature, args):
        return ir.Constant(context.get_value_type(types.intp), count)

    return types.intp(tile), emit


def _copy_panel(dwords: int):
    def copy(typing, like, q, width, rows, first, column, panel, byte_offset):
        tokens, columns = like.count // GROUPS, llvm_type(I32, dwords)

        def emit(context, builder, signature, args):
            _, q, width, rows, first, column, panel, at = args
            vectors = []
            for token in range(tokens):
                index = builder.add(first, ir.Constant(first.type, token))
                row = _row_of(context, builder, signature.args[3], rows, index)
                start = builder.add(builder.mul(row, width), column)
                vector = builder.load(pointer(context, builder, signature.args[1], q, start, columns))
                vector.align = 1
                vectors.append(vector)
            for i, vector in enumerate(_interleave(builder, vectors)):
                here = builder.add(at, ir.Constant(at.type, 4 * dwords * i))
                address = pointer(context, builder, signature.args[6], panel, here, columns)
                builder.store(vector, address).align = 1
            return context.get_dummy_value()

        number = types.intp
        return types.void(like, q, number, rows, number, number, panel, number), emit

    copy.__doc__ = f"""Copy {4 * dwords} columns from `column` of rows[first], ... into a panel.

    There are as many rows as `like` has tokens (a power of two). q: int8, rows of `width`; rows: int32.
    """
    return intrinsic(copy)


copy_panel, copy_half_panel = _copy_panel(LANES), _copy_panel(LANES // 2)


@intrinsic
def copy_column(typing, like, table, width, rows, first, column, factor, array, byte_offset):
    """Copy table[rows[first + i], column] * factor for each token i that `like` has, next to each other.

    table: float32 or int32, rows of `width`; factor: of the same type; array: uint8.
    """
    tokens = like.count // GROUPS
    element = table.dtype
    stored = F32 if isinstance(element, types.Float) else I32

    def emit(context, builder, signature, args):
        _, table, width, rows, first, column, factor, array, at = args
        for token in range(tokens):
            index = builder.add(first, ir.Constant(first.type, token))
            row = _row_of(context, builder, signature.args[3], rows, index)
            source = builder.mul(builder.add(builder.mul(row, width), column), ir.Constant(width.type, 4))
            value = builder.load(pointer(context, builder, signature.args[1], table, source, stored))
            times = builder.fmul if stored is F32 else builder.mul
            here = builder.add(at, ir.Constant(at.type, 4 * token))
            address = pointer(context, builder, signature.args[7], array, here, stored)
            builder.store(times(value, factor), address).align = 1
        return context.get_dummy_value()

    number = types.intp
    return types.void(like, table, number, rows, number, number, element, array, number), emit
