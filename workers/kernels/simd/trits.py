"""Bytes of five base-3 digits as vectors: dot products with them, their digits, and making them.

A byte u stands for the fraction u / 256, whose first five base-3 digits are the codes. Tripling is
`u' = 3 u mod 256`, and what it carries out is the next digit: 3 u - u' = 256 * digit. Hence two ways:

* telescoped: sum digit(n) a(n) = (3 sum u(n) a(n) - sum u(n + 1) a(n)) / 256, two dot products of whole
  bytes for each digit and nothing to extract. Over 256 columns either sum is at most 255 * 128 * 256 =
  2^23, so that nothing wraps in 32 bits.
* digit by digit where a dot product of whole bytes is not exact (AVX2) or slow (generic): two comparisons.

With s = u - 128 as a signed byte the same holds for the digit less one: 3 s - s' = 256 * (digit - 1), with
the same thresholds. FLIP is what stored bytes are xored with to be of the form that the target reads.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from ..target import TARGET
from .barrier import emit_barrier, emit_registers
from .dot import emit_dot_unsigned
from .groups import GROUPS
from .tile import Tile
from .vector import I8, I16, I32, LANES, call, constant, join, llvm_type, part, pointer, splat, v16i32, v64u8

SIGNED = TARGET == "neon"
"""Whether `whole_sums` are those of digit - 1; if not the caller subtracts the sum of the activations."""

TELESCOPED = SIGNED or TARGET in ("avx512vnni", "avxvnni")
FLIP = 0x80 if SIGNED or not TELESCOPED else 0
DIGITS = 5

_BYTES = llvm_type(I8, 4 * LANES)
# Independent chains of dot products in each sum hide their latency; NEON has them by its short registers.
_CHAINS = 1 if TARGET == "neon" else 2
_PER_GROUP = 2 * _CHAINS if TELESCOPED else 1
_SUMS = Tile(GROUPS * _PER_GROUP)


def _load(context, builder, array_type, array, at, stored: ir.Type):
    value = builder.load(pointer(context, builder, array_type, array, at, stored))
    value.align = 1
    return value


def _ahead(builder, at, distance: int):
    return builder.add(at, ir.Constant(at.type, distance))


def _tripled(builder, u):
    # The barrier stands before the last addition: behind it, NEON's multiplication by 3 would be taken,
    # which keeps one of two pipes busy for twice as long.
    pieces = emit_registers(builder, u)
    return join(builder, [builder.add(x, emit_barrier(builder, builder.add(x, x))) for x in pieces])


def _digit(builder, s):
    """Return the first digit of each byte, 0..2; `s` is of the signed form."""
    digit = constant(I8, 0, 4 * LANES)
    for value, limit in ((1, -43), (2, 42)):  # u > 256 / 3 and u > 512 / 3
        above = builder.icmp_signed(">", s, constant(I8, limit, 4 * LANES))
        if TARGET == "avx512vnni":
            digit = builder.select(above, constant(I8, value, 4 * LANES), digit)  # one masked move
        else:
            digit = builder.sub(digit, builder.sext(above, _BYTES))
    return digit


def _dot_small(builder, acc, digits, x):
    """Add a dot product of digits: on AVX2 sums of 16 bits, of which each takes half the columns.

    Over 256 columns such a sum is within 128 * 2 * (-128..127): it just fits.
    """
    if TARGET != "avx2":
        return emit_dot_unsigned(builder, acc, digits, x)
    x_bytes = builder.bitcast(x, _BYTES)
    halves = []
    for start in (0, 32):
        operands = [part(builder, digits, start, 32), part(builder, x_bytes, start, 32)]
        halves.append(call(builder, "llvm.x86.avx2.pmadd.ub.sw", llvm_type(I16, 16), operands))
    words = builder.bitcast(acc, llvm_type(I16, 2 * LANES))
    return builder.bitcast(builder.add(words, join(builder, halves)), llvm_type(I32))


def _whole_small(builder, acc):
    if TARGET != "avx2":
        return acc
    words = builder.bitcast(acc, llvm_type(I16, 2 * LANES))
    ones = constant(I16, 1, LANES)
    halves = [
        call(builder, "llvm.x86.avx2.pmadd.wd", llvm_type(I32, 8), [part(builder, words, start, 16), ones])
        for start in (0, 16)
    ]
    return join(builder, halves)


def _activations(context, builder, q_type, q, at, digits: int):
    """Return `digits` vectors with a dword of activations in all lanes each."""
    if TARGET != "neon":
        offsets = [_ahead(builder, at, 4 * n) for n in range(digits)]
        return [splat(builder, _load(context, builder, q_type, q, offset, I32)) for offset in offsets]
    # Four dwords in a register, of which sdot takes any: to repeat one costs the pipes that compute.
    found = []
    for n in range(digits):
        start = max(n - 3, 0)
        four = _load(context, builder, q_type, q, _ahead(builder, at, 4 * start), llvm_type(I32, 4))
        lanes = ir.Constant(llvm_type(I32), [n - start] * LANES)
        found.append(builder.shuffle_vector(four, ir.Constant(four.type, ir.Undefined), lanes))
    return found


@intrinsic
def zero_sums(typing):
    """Return the sums of GROUPS groups before their first packet."""

    def emit(context, builder, signature, args):
        return ir.Constant(ir.ArrayType(llvm_type(I32), _SUMS.count), None)

    return _SUMS(), emit


def add_packet(digits: int):
    """Return the intrinsic (sums, w, at, pair, q, x_at): add the packet at `at` of `w` to the sums.

    If GROUPS is 2 the packet at `at + pair` is the second group's. A packet holds [16 rows][4 bytes];
    digit n of byte j meets the activation x_at + 4 n + j of `q`.
    """

    def add(typing, sums, w, at, pair, q, x_at):
        def emit(context, builder, signature, args):
            sums, w, at, pair, q, x_at = args
            arg_types = signature.args
            parts = [builder.extract_value(sums, i) for i in range(_SUMS.count)]
            offsets = (at, builder.add(at, pair))[:GROUPS]
            bytes_of = [_load(context, builder, arg_types[1], w, offset, _BYTES) for offset in offsets]
            xs = _activations(context, builder, arg_types[4], q, x_at, digits)
            for n, x in enumerate(xs):
                for group in range(GROUPS):
                    first = group * _PER_GROUP
                    u = bytes_of[group]
                    if TELESCOPED:
                        here, there = first + n % _CHAINS, first + _CHAINS + n % _CHAINS
                        parts[here] = emit_dot_unsigned(builder, parts[here], u, x)
                        u = _tripled(builder, u)
                        parts[there] = emit_dot_unsigned(builder, parts[there], u, x)
                    else:
                        parts[first] = _dot_small(builder, parts[first], _digit(builder, u), x)
                        u = _tripled(builder, u) if n + 1 < digits else u
                    bytes_of[group] = u
            for i, value in enumerate(parts):
                sums = builder.insert_value(sums, value, i)
            return sums

        return _SUMS(_SUMS, w, types.intp, types.intp, q, types.intp), emit

    return intrinsic(add)


def whole_sums(group: int):
    """Return the intrinsic (sums): the integer sums (v16i32) of a group over up to 256 columns."""

    def whole(typing, sums):
        def emit(context, builder, signature, args):
            if group >= GROUPS:
                return constant(I32, 0)
            first = group * _PER_GROUP
            parts = [builder.extract_value(args[0], first + i) for i in range(_PER_GROUP)]
            if not TELESCOPED:
                return _whole_small(builder, parts[0])
            here, there = parts[0], parts[_CHAINS]
            for i in range(1, _CHAINS):
                here = builder.add(here, parts[i])
                there = builder.add(there, parts[_CHAINS + i])
            telescoped = builder.sub(builder.mul(here, constant(I32, 3)), there)
            return builder.ashr(telescoped, constant(I32, 8))

        return v16i32(_SUMS), emit

    return intrinsic(whole)


def spread_packet(digits: int):
    """Return the intrinsic (w, at, out, out_at): store a packet's codes, one byte each, 64 bytes a digit."""

    def spread(typing, w, at, out, out_at):
        def emit(context, builder, signature, args):
            arg_types = signature.args
            s = _load(context, builder, arg_types[0], args[0], args[1], _BYTES)
            if not FLIP:
                s = builder.xor(s, constant(I8, -128, 4 * LANES))
            for n in range(digits):
                at_n = _ahead(builder, args[3], 64 * n)
                address = pointer(context, builder, arg_types[2], args[2], at_n, _BYTES)
                builder.store(_digit(builder, s), address).align = 1
                s = _tripled(builder, s)
            return context.get_dummy_value()

        return types.void(w, types.intp, out, types.intp), emit

    return intrinsic(spread)


def _encoded(builder, v):
    """Return the stored bytes of v = sum digit(n) 3^(4 - n).

    u = v + (55 v + 1023) // 1024 has the digits of v (all 243 are tried by a test), and so have a few
    others: u / 256 need only lie in [v / 243, (v + 1) / 243).
    """
    words = builder.bitcast(v, llvm_type(I16, 2 * LANES))
    low = constant(I16, 0xFF, 2 * LANES)
    eight = constant(I16, 8, 2 * LANES)
    more = []
    for values in (builder.and_(words, low), builder.lshr(words, eight)):
        product = builder.mul(values, constant(I16, 55, 2 * LANES))
        rounded = builder.add(product, constant(I16, 1023, 2 * LANES))
        more.append(builder.lshr(rounded, constant(I16, 10, 2 * LANES)))
    extra = builder.or_(more[0], builder.shl(more[1], eight))
    u = builder.add(v, builder.bitcast(extra, _BYTES))
    return builder.xor(u, constant(I8, FLIP - 256 if FLIP else 0, 4 * LANES))


def _appended(builder, v, digit):
    return builder.add(builder.add(v, builder.add(v, v)), digit)


@intrinsic
def zero_codes(typing):
    """Return 64 codes 0 (v64u8)."""
    return v64u8(), lambda context, builder, signature, args: constant(I8, 0, 4 * LANES)


@intrinsic
def append_digit(typing, v, digit):
    """Return 3 v + digit for each byte (v64u8)."""
    return v64u8(v64u8, v64u8), lambda context, builder, signature, args: _appended(builder, *args)


@intrinsic
def encode(typing, v):
    """Return the stored bytes (v64u8) of five digits each, v = 0..242 (v64u8)."""
    return v64u8(v64u8), lambda context, builder, signature, args: _encoded(builder, args[0])


@intrinsic
def gather_codes(typing, codes, at, stride, left):
    """Return 4 bytes each of 16 rows (v64u8), `stride` bytes apart from byte `at`; 1 from row `left` on.

    codes: a C-contiguous uint8 array, of which nothing beyond row left - 1 is read.
    """
    if getattr(codes, "layout", None) != "C":
        raise TypingError("codes must be C-contiguous")

    def emit(context, builder, signature, args):
        codes, at, stride, left = args
        last = builder.sub(left, ir.Constant(left.type, 1))
        found = constant(I32, 0x01010101)
        for lane in range(LANES):
            row = ir.Constant(left.type, lane)
            inside = builder.icmp_signed("<", row, left)
            start = builder.add(at, builder.mul(builder.select(inside, row, last), stride))
            dword = _load(context, builder, signature.args[0], codes, start, I32)
            value = builder.select(inside, dword, ir.Constant(I32, 0x01010101))
            found = builder.insert_element(found, value, I32(lane))
        return builder.bitcast(found, _BYTES)

    return v64u8(codes, types.intp, types.intp, types.intp), emit


@intrinsic
def encode_block(typing, source, at, out, out_at):
    """Turn a block of two-bit codes (16 rows, 256 columns, as `ternary` lays them out) into 13 packets."""

    def emit(context, builder, signature, args):
        arg_types = signature.args
        fields = []
        for kb in range(16):
            packed = _load(context, builder, arg_types[0], args[0], _ahead(builder, args[1], 64 * kb), _BYTES)
            words = builder.bitcast(packed, llvm_type(I16, 2 * LANES))
            for bits in (0, 2, 4, 6):
                down = builder.bitcast(builder.lshr(words, constant(I16, bits, 2 * LANES)), _BYTES)
                fields.append(builder.and_(down, constant(I8, 3, 4 * LANES)))
        fields.append(constant(I8, 0, 4 * LANES))
        for packet in range(13):
            v = constant(I8, 0, 4 * LANES)
            for digit in fields[DIGITS * packet : DIGITS * packet + DIGITS]:
                v = _appended(builder, v, digit)
            address = pointer(
                context, builder, arg_types[2], args[2], _ahead(builder, args[3], 64 * packet), _BYTES
            )
            builder.store(_encoded(builder, v), address).align = 1
        return context.get_dummy_value()

    return types.void(source, types.intp, out, types.intp), emit
