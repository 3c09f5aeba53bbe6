"""The K-quants' bit planes as vectors: unpacking, dot products and scaling of a chunk (32 columns).

The layout is that of `kernels.planes`. Every intrinsic takes the format as its first argument, which
must be a constant: what is emitted is for that format alone.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from .dot import emit_dot_unsigned
from .vector import F16, F32, I8, I16, I32, LANES, call, constant, llvm_type, pointer, splat, v16f32, v16i32

Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = 16, 17, 18, 19, 20
MINIMA_AT, D_AT, DMIN_AT = 128, 256, 288  # within a block's scales
_NIBBLES = (Q4_K, Q5_K, Q6_K)
_OFFSET = (Q3_K, Q6_K)  # weight = scale * (code - offset); the others have minima
_WIDE = (Q4_K, Q5_K)  # one scale for 32 columns; the others two


def _constant_form(form) -> int:
    if not isinstance(form, types.IntegerLiteral):
        raise TypingError("the format must be a constant")
    return int(form.literal_value)


class _Memory:
    """Loads from one array at `at` bytes and constant distances."""

    def __init__(self, context, builder, array_type, array, at) -> None:
        self._builder = builder
        self._at = at
        self._base = pointer(context, builder, array_type, array, at, I8)

    def load(self, distance: int, stored: ir.Type):
        builder = self._builder
        address = builder.gep(self._base, [ir.Constant(self._at.type, distance)])
        value = builder.load(builder.bitcast(address, stored.as_pointer()))
        value.align = 1
        return value

    def bytes(self, distance: int):
        return self.load(distance, llvm_type(I8, 4 * LANES))

    def dword(self, distance: int):
        return splat(self._builder, self.load(distance, I32))


def _field(builder, plane, right: int, mask: int):
    """Return the bits of `mask` of each byte shifted right by `right` (left if negative)."""
    if right:
        wide = builder.bitcast(plane, llvm_type(I16, 2 * LANES))
        shift = builder.lshr if right > 0 else builder.shl
        plane = builder.bitcast(shift(wide, constant(I16, abs(right), 2 * LANES)), llvm_type(I8, 4 * LANES))
    return builder.and_(plane, constant(I8, mask, 4 * LANES))


def emit_nibbles(builder, memory: _Memory):
    """Return the eight quartets of a plane of nibbles at the start of `memory`."""
    planes = [memory.bytes(64 * n) for n in range(4)]
    return [_field(builder, planes[k % 4], k // 4 * 4, 0x0F) for k in range(8)]


def _emit_codes(builder, form: int, memory: _Memory):
    """Return the eight quartets of a chunk as vectors of bytes below 64."""
    codes = emit_nibbles(builder, memory) if form in _NIBBLES else [None] * 8
    at = 256 if form in _NIBBLES else 0
    shift = 4 if form in _NIBBLES else 0
    if form in (Q2_K, Q3_K, Q6_K):
        planes = [memory.bytes(at), memory.bytes(at + 64)]
        pairs = [_field(builder, planes[k // 4], k % 4 * 2 - shift, 3 << shift) for k in range(8)]
        codes = [
            pair if code is None else builder.or_(code, pair) for code, pair in zip(codes, pairs, strict=True)
        ]
        at, shift = at + 128, shift + 2
    if form in (Q3_K, Q5_K):
        plane = memory.bytes(at)
        codes = [builder.or_(codes[k], _field(builder, plane, k - shift, 1 << shift)) for k in range(8)]
    return codes


def _emit_scales(builder, form: int, memory: _Memory):
    """Return the integer scales of a chunk's two halves; `memory` starts at the chunk's own."""
    sixteen, wide = llvm_type(I8), llvm_type(I32)
    if form in _OFFSET:
        return [builder.sext(memory.load(at, sixteen), wide) for at in (0, 16)]
    both = builder.zext(memory.load(0, sixteen), wide)
    if form == Q2_K:
        return [builder.and_(both, constant(I32, 15)), builder.lshr(both, constant(I32, 4))]
    return [both, both]


def _at(builder, byte_offset, distance: int):
    return builder.add(byte_offset, ir.Constant(byte_offset.type, distance))


@intrinsic(prefer_literal=True)
def add_chunk(typing, form, total, w, at, scales_at, q, x_at, sides, side_at):
    """Return total (v16i32) + scales * (codes of the chunk . activations), a group of 16 rows.

    at, scales_at: the chunk and its scales in `w`; x_at: its activations in `q`; side_at: in `sides`,
    the two dwords -offset * sum of 16 activations, for formats with an offset.
    """
    number = _constant_form(form)

    def emit(context, builder, signature, args):
        arg_types = signature.args
        memory = _Memory(context, builder, arg_types[2], args[2], args[3])
        codes = _emit_codes(builder, number, memory)
        x = _Memory(context, builder, arg_types[5], args[5], args[6])
        starts = _Memory(context, builder, arg_types[7], args[7], args[8])
        scales = _emit_scales(builder, number, _Memory(context, builder, arg_types[2], args[2], args[4]))
        halves = []
        for half in range(2):
            acc = starts.dword(4 * half) if number in _OFFSET else constant(I32, 0)
            for k in range(4 * half, 4 * half + 4):
                acc = emit_dot_unsigned(builder, acc, codes[k], x.dword(4 * k))
            halves.append(acc)
        if number in _WIDE:
            return builder.add(args[1], builder.mul(builder.add(*halves), scales[0]))
        scaled = [builder.mul(half, scale) for half, scale in zip(halves, scales, strict=True)]
        return builder.add(args[1], builder.add(*scaled))

    return v16i32(form, v16i32, w, types.intp, types.intp, q, types.intp, sides, types.intp), emit


@intrinsic(prefer_literal=True)
def spread_chunk(typing, form, w, at, scales_at, out, codes_to, scales_to):
    """Store a chunk's codes, one byte each (512 bytes), and its two halves' scales as int32 (128)."""
    number = _constant_form(form)

    def emit(context, builder, signature, args):
        arg_types = signature.args
        codes = _emit_codes(builder, number, _Memory(context, builder, arg_types[1], args[1], args[2]))
        scales = _emit_scales(builder, number, _Memory(context, builder, arg_types[1], args[1], args[3]))
        for values, to in ((codes, args[5]), (scales, args[6])):
            _store_all(context, builder, arg_types[4], args[4], to, values)
        return context.get_dummy_value()

    return types.void(form, w, types.intp, types.intp, out, types.intp, types.intp), emit


def _store_all(context, builder, array_type, array, at, vectors) -> None:
    for k, vector in enumerate(vectors):
        address = pointer(context, builder, array_type, array, _at(builder, at, 64 * k), vector.type)
        builder.store(vector, address).align = 1


def _emit_minima(builder, form: int, minima: _Memory):
    """Return the minima of a block as vectors of bytes, four subs each."""
    vectors = [minima.bytes(0), minima.bytes(64)]
    if form == Q2_K:
        return [_field(builder, vectors[n % 2], n // 2 * 4, 0x0F) for n in range(4)]
    return vectors


@intrinsic(prefer_literal=True)
def spread_minima(typing, form, w, at, out, to):
    """Store the minima of the block whose scales begin at `at`: four subs of 16 rows per 64 bytes."""
    number = _constant_form(form)

    def emit(context, builder, signature, args):
        arg_types = signature.args
        minima = _Memory(context, builder, arg_types[1], args[1], _at(builder, args[2], MINIMA_AT))
        _store_all(context, builder, arg_types[3], args[3], args[4], _emit_minima(builder, number, minima))
        return context.get_dummy_value()

    return types.void(form, w, types.intp, out, types.intp), emit


def _emit_scaled(builder, acc, total, scales: _Memory, at: int, h):
    """Return fma(total, float16 at byte `at` * h, acc)."""
    scale = builder.fpext(scales.load(at, llvm_type(F16)), llvm_type(F32))
    operands = [builder.sitofp(total, llvm_type(F32)), builder.fmul(scale, h), acc]
    return call(builder, "llvm.fma.v16f32", llvm_type(F32), operands)


@intrinsic(prefer_literal=True)
def add_block(typing, form, acc, total, h, w, at, sides, side_at):
    """Return acc + total * d * h, and for formats with minima + (sum of minimum * side) * dmin * h.

    acc: v16f32; total: v16i32; h: v16f32; at: the block's scales in `w`; side_at: in `sides`, 64 * high +
    low of each sub, dwords of four highs, then of lows. Two fma, in this order.
    """
    number = _constant_form(form)

    def emit(context, builder, signature, args):
        arg_types = signature.args
        scales = _Memory(context, builder, arg_types[4], args[4], args[5])
        acc = _emit_scaled(builder, args[1], args[2], scales, D_AT, args[3])
        if number in _OFFSET:
            return acc
        side = _Memory(context, builder, arg_types[6], args[6], args[7])
        minima = _Memory(context, builder, arg_types[4], args[4], _at(builder, args[5], MINIMA_AT))
        vectors = _emit_minima(builder, number, minima)
        sums = []
        for part in range(2):
            whole = constant(I32, 0)
            for n, vector in enumerate(vectors):
                dword = side.dword(4 * (part * len(vectors) + n))
                whole = emit_dot_unsigned(builder, whole, vector, dword)
            sums.append(whole)
        lowest = builder.add(builder.shl(sums[0], constant(I32, 6)), sums[1])
        return _emit_scaled(builder, acc, lowest, scales, DMIN_AT, args[3])

    return v16f32(form, v16f32, v16i32, v16f32, w, types.intp, sides, types.intp), emit
