"""Sixteen rows of a file turned into lanes: loads, transpositions and stores for `repack`.

A tile of four vectors holds 16 bytes of each of 16 rows: vector s, lane i is dword s of row i. Plain
LLVM vector operations, so that every target has them; nothing in here is used by the products.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .tile import Tile
from .vector import I8, I16, I32, LANES, constant, join, llvm_type, pointer, splat, v16i32

_QUAD = Tile(4)


def _vectors(builder, tile, count: int):
    return [builder.extract_value(tile, i) for i in range(count)]


def _tile(builder, vectors):
    value = ir.Constant(ir.ArrayType(llvm_type(I32), len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        value = builder.insert_value(value, vector, i)
    return value


def _row_offset(builder, at, step, last, i: int):
    """Return at + min(i, last) * step."""
    here = ir.Constant(last.type, i)
    row = builder.select(builder.icmp_signed("<=", here, last), here, last)
    return builder.add(at, builder.mul(row, step))


def _shuffle(builder, x, y, lanes):
    return builder.shuffle_vector(x, y, ir.Constant(llvm_type(I32, len(lanes)), lanes))


def _in_quads(pattern):
    """Repeat a shuffle of four lanes of two vectors (0..3 and 16..19) in every 128 bits."""
    return [4 * quad + lane for quad in range(LANES // 4) for lane in pattern]


def _load(builder, address, value_type):
    value = builder.load(address)
    value.align = 1
    return value


@intrinsic
def load_rows(typing, array, at, step, last):
    """Return the tile of 16 bytes of each row min(i, last), which starts at byte `at` + row * `step`."""

    def emit(context, builder, signature, args):
        four = llvm_type(I32, 4)
        rows = []
        for i in range(LANES):
            offset = _row_offset(builder, args[1], args[2], args[3], i)
            rows.append(
                _load(builder, pointer(context, builder, signature.args[0], args[0], offset, four), four)
            )
        # Rows 4q + i of the same i side by side, so that all further moves stay within 128 bits.
        a, b, c, d = (join(builder, rows[i::4]) for i in range(4))
        low, high = _in_quads((0, 16, 1, 17)), _in_quads((2, 18, 3, 19))
        first, second = _in_quads((0, 1, 16, 17)), _in_quads((2, 3, 18, 19))
        ab, cd = _shuffle(builder, a, b, low), _shuffle(builder, c, d, low)
        ef, gh = _shuffle(builder, a, b, high), _shuffle(builder, c, d, high)
        pairs = ((ab, cd, first), (ab, cd, second), (ef, gh, first), (ef, gh, second))
        return _tile(builder, [_shuffle(builder, x, y, lanes) for x, y, lanes in pairs])

    return _QUAD(array, types.intp, types.intp, types.intp), emit


@intrinsic
def load_quads(typing, array, at, step, last):
    """Return 16 bytes from each offset `at` + min(i, last) * `step`, i = 0..3, one after the other."""

    def emit(context, builder, signature, args):
        four = llvm_type(I32, 4)
        offsets = [_row_offset(builder, args[1], args[2], args[3], i) for i in range(4)]
        addresses = [
            pointer(context, builder, signature.args[0], args[0], offset, four) for offset in offsets
        ]
        return join(builder, [_load(builder, address, four) for address in addresses])

    return v16i32(array, types.intp, types.intp, types.intp), emit


def _gather(element: ir.Type):
    def gather(typing, array, at, step, last):
        def emit(context, builder, signature, args):
            value = ir.Constant(llvm_type(I32), ir.Undefined)
            for i in range(LANES):
                offset = _row_offset(builder, args[1], args[2], args[3], i)
                address = pointer(context, builder, signature.args[0], args[0], offset, element)
                scalar = _load(builder, address, element)
                if element is not I32:
                    scalar = builder.zext(scalar, I32)
                value = builder.insert_element(value, scalar, I32(i))
            return value

        return v16i32(array, types.intp, types.intp, types.intp), emit

    return intrinsic(gather)


# One element of each row min(i, last), zero-extended to a lane.
gather_u16 = _gather(I16)
gather_u32 = _gather(I32)


@intrinsic
def lanes_to(typing, last):
    """Return -1 in the lanes up to `last`, 0 beyond."""

    def emit(context, builder, signature, args):
        numbers = ir.Constant(llvm_type(I32), list(range(LANES)))
        limit = splat(builder, builder.trunc(args[0], I32))
        return builder.sext(builder.icmp_signed("<=", numbers, limit), llvm_type(I32))

    return v16i32(types.intp), emit


def _blend(builder, keep, value, fill: int):
    chosen = builder.and_(value, keep)
    return builder.or_(chosen, builder.and_(builder.not_(keep), constant(I32, fill))) if fill else chosen


def store_rows(count: int, fill: int):
    """Return the intrinsic (array, at, step, tile, keep): vector i to byte at + i * step, 64 bytes.

    Lanes outside `keep` (0 or -1) become the dword `fill`.
    """

    def store(typing, array, at, step, tile, keep):
        def emit(context, builder, signature, args):
            array, at, step, tile, keep = args
            for i, vector in enumerate(_vectors(builder, tile, count)):
                offset = builder.add(at, builder.mul(step, ir.Constant(step.type, i)))
                address = pointer(context, builder, signature.args[0], array, offset, llvm_type(I32))
                builder.store(_blend(builder, keep, vector, fill), address).align = 1
            return context.get_dummy_value()

        return types.void(array, types.intp, types.intp, Tile(count), v16i32), emit

    return intrinsic(store)


def store_lanes(fill: int):
    """Return the intrinsic (array, at, vector, keep) that stores 64 bytes, as `store_rows` does."""

    def store(typing, array, at, vector, keep):
        def emit(context, builder, signature, args):
            address = pointer(context, builder, signature.args[0], args[0], args[1], llvm_type(I32))
            builder.store(_blend(builder, args[3], args[2], fill), address).align = 1
            return context.get_dummy_value()

        return types.void(array, types.intp, v16i32, v16i32), emit

    return intrinsic(store)


@intrinsic
def store_u16(typing, array, at, vector, keep):
    """Store the low 16 bits of each lane (32 bytes), zero outside `keep`."""

    def emit(context, builder, signature, args):
        narrow = builder.trunc(builder.and_(args[2], args[3]), llvm_type(I16))
        address = pointer(context, builder, signature.args[0], args[0], args[1], llvm_type(I16))
        builder.store(narrow, address).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, v16i32, v16i32), emit


def _quad_operation(body):
    """Return the intrinsic tile -> tile that maps four vectors by `body`(builder, vectors)."""

    def operation(typing, tile):
        def emit(context, builder, signature, args):
            return _tile(builder, body(builder, _vectors(builder, args[0], 4)))

        return _QUAD(_QUAD), emit

    return intrinsic(operation)


def _exchange(builder, a, b, bits: int, mask: int):
    """Exchange the upper fields of `a` (outside `mask`) with the lower ones of `b`, `bits` apart."""
    low, high, by = constant(I32, mask), constant(I32, ~mask & 0xFFFFFFFF), constant(I32, bits)
    left = builder.or_(builder.and_(a, low), builder.and_(builder.shl(b, by), high))
    right = builder.or_(builder.and_(builder.lshr(a, by), low), builder.and_(b, high))
    return left, right


def _swap_fields(builder, vectors):
    a, b, c, d = vectors
    a, c = _exchange(builder, a, c, 4, 0x0F0F0F0F)
    b, d = _exchange(builder, b, d, 4, 0x0F0F0F0F)
    a, b = _exchange(builder, a, b, 2, 0x33333333)
    c, d = _exchange(builder, c, d, 2, 0x33333333)
    return [a, b, c, d]


# Field s of byte j of vector l becomes what was field l of byte j of vector s; a field has two bits.
swap_fields = _quad_operation(_swap_fields)


def _swap_within(builder, vectors):
    results = []
    for x in vectors:
        for bits, mask in ((6, 0x00CC00CC), (12, 0x0000F0F0)):
            by = constant(I32, bits)
            change = builder.and_(builder.xor(x, builder.lshr(x, by)), constant(I32, mask))
            x = builder.xor(x, builder.xor(change, builder.shl(change, by)))
        results.append(x)
    return results


# Within each dword field s of byte j becomes what was field j of byte s.
swap_within = _quad_operation(_swap_within)


def _offset_bytes(builder, vectors):
    bytes_type = llvm_type(I8, 4 * LANES)
    one = constant(I8, 1, 4 * LANES)
    results = []
    for x in vectors:
        turned = builder.bitcast(builder.xor(x, constant(I32, 0x80808080)), bytes_type)
        raised = builder.select(builder.icmp_unsigned(">", turned, one), turned, one)
        results.append(builder.bitcast(raised, llvm_type(I32)))
    return results


# Each byte, an int8, plus 128; -128 counts as -127.
offset_bytes = _quad_operation(_offset_bytes)


def _fifth_bits(builder, fifths, first: int):
    """Return bits first .. first + 3 of each lane as 16 in the lane's four bytes."""
    four = builder.and_(builder.lshr(fifths, constant(I32, first)), constant(I32, 0x0F))
    # Four copies, 7 bits apart and so without carries, put bit i at bit 8 i, among others.
    spread = builder.and_(builder.mul(four, constant(I32, 0x00204081)), constant(I32, 0x01010101))
    return builder.shl(spread, constant(I32, 4))


@intrinsic
def signed_fives(typing, tile, fifths):
    """Return eight vectors: the tile's low nibbles, then its high ones, as five-bit codes less 16, plus 128.

    Bit j of a lane of `fifths` is the fifth bit of that row's code j.
    """

    def emit(context, builder, signature, args):
        results = []
        for high in (0, 1):
            for s, x in enumerate(_vectors(builder, args[0], 4)):
                low = builder.and_(builder.lshr(x, constant(I32, 4 * high)), constant(I32, 0x0F0F0F0F))
                codes = builder.or_(low, _fifth_bits(builder, args[1], 16 * high + 4 * s))
                results.append(builder.add(codes, constant(I32, 0x70707070)))  # at most 143: no carry
        return _tile(builder, results)

    return Tile(8)(_QUAD, v16i32), emit


@intrinsic
def part_halves(typing, tile, keep):
    """Return the tile with, in each vector, the lower halves of all lanes, then the upper ones.

    Lanes outside `keep` (0 or -1) count as 0.
    """

    def emit(context, builder, signature, args):
        order = ir.Constant(llvm_type(I32, 2 * LANES), [*range(0, 2 * LANES, 2), *range(1, 2 * LANES, 2)])
        halves = llvm_type(I16, 2 * LANES)
        results = []
        for x in _vectors(builder, args[0], 4):
            wide = builder.bitcast(builder.and_(x, args[1]), halves)
            turned = builder.shuffle_vector(wide, ir.Constant(halves, ir.Undefined), order)
            results.append(builder.bitcast(turned, llvm_type(I32)))
        return _tile(builder, results)

    return _QUAD(_QUAD, v16i32), emit


@intrinsic
def merge_codes(typing, tile):
    """Return the four vectors' bytes 0..3 as fields of one: vector s gives bits 2s, 2s+1."""

    def emit(context, builder, signature, args):
        whole, *others = _vectors(builder, args[0], 4)
        for s, vector in enumerate(others, 1):
            whole = builder.or_(whole, builder.shl(vector, constant(I32, 2 * s)))
        return whole

    return v16i32(_QUAD), emit


def _biased(builder, x):
    """Return the bytes of a vector less 128, which times 3 stay so: a signed comparison is one operation."""
    return builder.bitcast(builder.xor(x, constant(I32, 0x80808080)), llvm_type(I8, 4 * LANES))


def _add_digit(builder, total, biased, weight: int):
    """Add `weight` times the digit with which a byte begins: (3 * byte) >> 8, as two comparisons."""
    count = 4 * LANES
    for below in (85, 170):
        more = builder.icmp_signed(">", biased, constant(I8, below - 128, count))
        whole = builder.sext(more, llvm_type(I8, count))
        total = builder.add(total, builder.and_(whole, constant(I8, weight, count)))
    return total


def _times3(builder, x):
    return builder.add(builder.add(x, x), x)


@intrinsic
def digits(typing, tile):
    """Return five vectors: field s of byte j of vector n is base-3 digit n of byte j of the tile's vector s.

    A byte is ceil(v * 256 / 243) for the five-digit v: times 3^n mod 256 it begins with digit n.
    """

    def emit(context, builder, signature, args):
        scaled = [_biased(builder, x) for x in _vectors(builder, args[0], 4)]
        results = []
        for n in range(5):
            total = constant(I8, 0, 4 * LANES)
            for s in range(4):
                total = _add_digit(builder, total, scaled[s], 1 << (2 * s))
            results.append(builder.bitcast(total, llvm_type(I32)))
            if n < 4:
                scaled = [_times3(builder, x) for x in scaled]
        return _tile(builder, results)

    return Tile(5)(_QUAD), emit


@intrinsic
def digits_within(typing, vector):
    """Return one vector: field n of byte j is base-3 digit n (0..3) of byte j."""

    def emit(context, builder, signature, args):
        scaled = _biased(builder, args[0])
        total = constant(I8, 0, 4 * LANES)
        for n in range(4):
            total = _add_digit(builder, total, scaled, 1 << (2 * n))
            scaled = _times3(builder, scaled)
        return builder.bitcast(total, llvm_type(I32))

    return v16i32(v16i32), emit


@intrinsic
def threes(typing, found, codes):
    """Return `found` with a bit set in each lane with a field of 3 in `codes`, a vector or tile of four."""
    several = isinstance(codes, Tile)

    def emit(context, builder, signature, args):
        total = args[0]
        for x in _vectors(builder, args[1], 4) if several else [args[1]]:
            both = builder.and_(x, builder.lshr(x, constant(I32, 1)))
            total = builder.or_(total, builder.and_(both, constant(I32, 0x55555555)))
        return total

    return v16i32(v16i32, _QUAD if several else v16i32), emit


@intrinsic
def any_set(typing, vector):
    """Return whether any bit of the vector is set."""

    def emit(context, builder, signature, args):
        wide = builder.bitcast(args[0], ir.IntType(32 * LANES))
        return builder.icmp_unsigned("!=", wide, ir.Constant(wide.type, 0))

    return types.boolean(v16i32), emit
