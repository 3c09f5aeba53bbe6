"""Four-byte dot products per 32-bit lane: the one operation that differs by target.

`dot_unsigned(acc, w, a)`: acc[lane] += sum over four bytes of unsigned w times signed a.
SMALL_CODES says that bytes of `w` must not exceed 63 (AVX2's 16-bit sums saturate, NEON's bytes are
signed); otherwise 0..255 are exact.
"""

from __future__ import annotations

from numba.extending import intrinsic

from ..target import TARGET
from .vector import I8, I16, I32, LANES, call, constant, join, llvm_type, part, v16i32, v64u8

SMALL_CODES = TARGET in ("avx2", "neon")
# Whether the dot takes one dword of a register for all lanes, so that one load serves four of them.
BY_ELEMENT = TARGET == "neon"


def _dot_vnni(builder, acc, w, a):
    # Since LLVM 22 the operands are bytes; the older dword form is upgraded on load, so emit that.
    operands = [acc, builder.bitcast(w, llvm_type(I32)), a]
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", llvm_type(I32), operands)


def _dot_vnni_256(builder, acc, w, a):
    halves = []
    dwords = builder.bitcast(w, llvm_type(I32))
    for start in (0, 8):
        operands = [part(builder, operand, start, 8) for operand in (acc, dwords, a)]
        halves.append(call(builder, "llvm.x86.avx512.vpdpbusd.256", llvm_type(I32, 8), operands))
    return join(builder, halves)


def _dot_avx2(builder, acc, w, a):
    a_bytes = builder.bitcast(a, llvm_type(I8, 4 * LANES))
    halves = []
    for start in (0, 32):
        operands = [part(builder, w, start, 32), part(builder, a_bytes, start, 32)]
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", llvm_type(I16, 16), operands)
        ones = constant(I16, 1, 16)
        halves.append(call(builder, "llvm.x86.avx2.pmadd.wd", llvm_type(I32, 8), [pairs, ones]))
    return builder.add(acc, join(builder, halves))


def _dot_neon(builder, acc, w, a):
    a_bytes = builder.bitcast(a, llvm_type(I8, 4 * LANES))
    quarters = []
    for start in range(0, LANES, 4):
        operands = [
            part(builder, acc, start, 4),
            part(builder, w, 4 * start, 16),
            part(builder, a_bytes, 4 * start, 16),
        ]
        quarters.append(call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", llvm_type(I32, 4), operands))
    return join(builder, quarters)


def _dot_generic(builder, acc, w, a, extend=None):
    dwords = builder.bitcast(w, llvm_type(I32))
    for byte in range(4):
        up = constant(I32, 24 - 8 * byte)
        left = builder.lshr(builder.shl(dwords, up), constant(I32, 24))
        right = builder.ashr(builder.shl(a, up), constant(I32, 24))
        acc = builder.add(acc, builder.mul(left, right))
    return acc


_BODIES = {
    "avx512vnni": _dot_vnni,
    "avxvnni": _dot_vnni_256,
    "avx2": _dot_avx2,
    "neon": _dot_neon,
    "generic": _dot_generic,
}


def emit_dot_unsigned(builder, acc, w, a):
    """Emit acc + dot of unsigned w with a for this target."""
    return _BODIES[TARGET](builder, acc, w, a)


@intrinsic
def dot_unsigned(typing, acc, w, a):
    """acc (v16i32) + dot of w (v64u8, unsigned) with a (v16i32 holding 4 int8 each)."""

    def emit(context, builder, signature, args):
        return emit_dot_unsigned(builder, *args)

    return v16i32(v16i32, v64u8, v16i32), emit


def _signed_avx2(builder, acc, w, a):
    # |w| as unsigned times a carrying w's sign; int8 weights are never -128 in Q8_0 as we pack it.
    zero = constant(I8, 0, 4 * LANES)
    magnitude = builder.select(builder.icmp_signed("<", w, zero), builder.sub(zero, w), w)
    a_bytes = builder.bitcast(a, llvm_type(I8, 4 * LANES))
    turned = []
    for start in (0, 32):
        operands = [part(builder, a_bytes, start, 32), part(builder, w, start, 32)]
        turned.append(call(builder, "llvm.x86.avx2.psign.b", llvm_type(I8, 32), operands))
    return _dot_avx2(builder, acc, magnitude, builder.bitcast(join(builder, turned), llvm_type(I32)))


def _signed_generic(builder, acc, w, a):
    dwords = builder.bitcast(w, llvm_type(I32))
    for byte in range(4):
        up, down = constant(I32, 24 - 8 * byte), constant(I32, 24)
        left = builder.ashr(builder.shl(dwords, up), down)
        right = builder.ashr(builder.shl(a, up), down)
        acc = builder.add(acc, builder.mul(left, right))
    return acc


_OFFSET = {
    "avx512vnni": _dot_vnni,
    "avxvnni": _dot_vnni_256,
    "avx2": _signed_avx2,
    "neon": _dot_neon,
    "generic": _signed_generic,
}
# Whether dot_offset turns w back to signed itself; if not, the caller subtracts 128 * sum(a).
OFFSET_IN_DOT = TARGET not in ("avx512vnni", "avxvnni")
# What dot_weights wants added to the weights: it takes them as the target's instruction does.
WEIGHT_OFFSET = 0 if OFFSET_IN_DOT else 128


def emit_dot_weights(builder, acc, w, a):
    """Emit acc + dot of w (int8 + WEIGHT_OFFSET) with a, without the offset."""
    return _OFFSET[TARGET](builder, acc, w, a)


@intrinsic
def dot_weights(typing, acc, w, a):
    """acc (v16i32) + dot of w (v64u8: int8 + WEIGHT_OFFSET, of -127..127) with a (v16i32 of 4 int8 each).

    The result is too large by WEIGHT_OFFSET * (sum of a).
    """

    def emit(context, builder, signature, args):
        return emit_dot_weights(builder, *args)

    return v16i32(v16i32, v64u8, v16i32), emit


def emit_dot_offset(builder, acc, w, a):
    """Emit acc + dot of w (int8 + 128) with a, without the offset where OFFSET_IN_DOT says so."""
    if OFFSET_IN_DOT:
        w = builder.xor(w, constant(I8, -128, 4 * LANES))
    return emit_dot_weights(builder, acc, w, a)


@intrinsic
def dot_offset(typing, acc, w, a):
    """acc (v16i32) + dot of w (v64u8: int8 + 128, of -127..127) with a (v16i32 of 4 int8 each).

    Unless OFFSET_IN_DOT the result is too large by 128 * (sum of a).
    """

    def emit(context, builder, signature, args):
        return emit_dot_offset(builder, *args)

    return v16i32(v16i32, v64u8, v16i32), emit
