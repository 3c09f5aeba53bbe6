"""TL1: ternary matrices of two bits a weight, sixteen rows interleaved.

For each group of 16 rows and each block of 256 columns 1,024 bytes of codes: 16 times
[16 rows][4 bytes]; bits 2s..2s+1 of byte j hold the code (weight + 1) of column 16 kb + 4 s + j.
A 32-bit lane is one row, so that one broadcast dword of activations serves sixteen rows and no
sum runs across lanes. All codes come first, then all scales: float16, [group][block][16 rows].
"""

from __future__ import annotations

import numpy as np

from .kernel import kernel
from .simd.dot import SMALL_CODES, dot_unsigned
from .simd.ops import (
    add_i32,
    and_bytes,
    broadcast_dword,
    fma_f32,
    load_bytes,
    load_f16,
    mul_f32,
    shift_right_bytes,
    shift_right_i32,
    splat_f32,
    splat_i32,
    store_f32,
    sub_i32,
    to_f32,
    zero_f32,
    zero_i32,
)

BLOCK = 256

_field0 = and_bytes(0x03)
_field1 = and_bytes(0x0C)
_field2 = and_bytes(0x30)
_field3 = and_bytes(0xC0 - 256)
_down2 = shift_right_bytes(2)
_down4 = shift_right_bytes(4)
_down6 = shift_right_bytes(6)
_sum2 = shift_right_i32(2)
_sum4 = shift_right_i32(4)
_sum6 = shift_right_i32(6)


def codes_nbytes(rows: int, columns: int) -> int:
    """Return the size of the code area; `rows` is padded to 16, `columns` a multiple of 256."""
    return -(-rows // 16) * 16 * columns // 4


def scales_nbytes(rows: int, columns: int) -> int:
    """Return the size of the scale area."""
    return -(-rows // 16) * 16 * (columns // BLOCK) * 2


@kernel
def pack(codes, scale_bits, out, codes_at, scales_at):
    """Pack `codes` (uint8 0..2, (N, K)) and float16 scales (as uint16 bits, (N, K/256)) into `out`.

    Rows beyond N up to the next multiple of 16 become zero weights with scale 0.
    """
    rows, columns = codes.shape
    blocks = columns // BLOCK
    for group in range((rows + 15) // 16):
        for lane in range(16):
            row = group * 16 + lane
            for kb in range(columns // 16):
                at = codes_at + (group * (columns // 16) + kb) * 64 + lane * 4
                for j in range(4):
                    byte = 0x55
                    if row < rows:
                        byte = 0
                        for s in range(4):
                            byte |= np.int64(codes[row, kb * 16 + 4 * s + j]) << (2 * s)
                    out[at + j] = byte
            for block in range(blocks):
                at = scales_at + ((group * blocks + block) * 16 + lane) * 2
                bits = scale_bits[row, block] if row < rows else np.uint16(0)
                out[at] = bits & np.uint16(0xFF)
                out[at + 1] = bits >> np.uint16(8)


@kernel
def _block_sum(w, at, q, q_at):
    """Return the 16 sums of code * activation over one block of 256 columns."""
    c0 = zero_i32()
    c1 = zero_i32()
    c2 = zero_i32()
    c3 = zero_i32()
    if SMALL_CODES:
        for kb in range(16):
            v = load_bytes(w, at + kb * 64)
            u = _down4(v)
            x = q_at + kb * 16
            c0 = dot_unsigned(c0, _field0(v), broadcast_dword(q, x))
            c1 = dot_unsigned(c1, _field1(v), broadcast_dword(q, x + 4))
            c2 = dot_unsigned(c2, _field0(u), broadcast_dword(q, x + 8))
            c3 = dot_unsigned(c3, _field1(u), broadcast_dword(q, x + 12))
        return add_i32(add_i32(c0, c2), _sum2(add_i32(c1, c3)))
    # The fields stay where they are: each accumulator is a multiple of 1, 4, 16 or 64.
    for kb in range(16):
        v = load_bytes(w, at + kb * 64)
        x = q_at + kb * 16
        c0 = dot_unsigned(c0, _field0(v), broadcast_dword(q, x))
        c1 = dot_unsigned(c1, _field1(v), broadcast_dword(q, x + 4))
        c2 = dot_unsigned(c2, _field2(v), broadcast_dword(q, x + 8))
        c3 = dot_unsigned(c3, _field3(v), broadcast_dword(q, x + 12))
    return add_i32(add_i32(c0, _sum2(c1)), add_i32(_sum4(c2), _sum6(c3)))


@kernel
def _finish(acc, sums, weight_scales, x_sum, x_scale):
    """Take the code offset off and add the scaled block to `acc`."""
    exact = to_f32(sub_i32(sums, splat_i32(x_sum)))
    return fma_f32(exact, mul_f32(weight_scales, splat_f32(x_scale)), acc)


@kernel
def _four_tokens(w, codes, scales, columns, q, x_scales, x_sums, rows, t, out, out_at, out_step):
    """Compute one group of 16 rows for tokens t..t+3; each weight is decoded once for the four."""
    blocks = columns // BLOCK
    r0, r1, r2, r3 = rows[t], rows[t + 1], rows[t + 2], rows[t + 3]
    a0 = zero_f32()
    a1 = zero_f32()
    a2 = zero_f32()
    a3 = zero_f32()
    for b in range(blocks):
        c0 = zero_i32()
        c1 = zero_i32()
        c2 = zero_i32()
        c3 = zero_i32()
        for kb in range(16):
            v = load_bytes(w, codes + b * 1024 + kb * 64)
            x = b * BLOCK + kb * 16
            x0, x1, x2, x3 = r0 * columns + x, r1 * columns + x, r2 * columns + x, r3 * columns + x
            f = _field0(v)
            c0 = dot_unsigned(c0, f, broadcast_dword(q, x0))
            c1 = dot_unsigned(c1, f, broadcast_dword(q, x1))
            c2 = dot_unsigned(c2, f, broadcast_dword(q, x2))
            c3 = dot_unsigned(c3, f, broadcast_dword(q, x3))
            f = _field0(_down2(v))
            c0 = dot_unsigned(c0, f, broadcast_dword(q, x0 + 4))
            c1 = dot_unsigned(c1, f, broadcast_dword(q, x1 + 4))
            c2 = dot_unsigned(c2, f, broadcast_dword(q, x2 + 4))
            c3 = dot_unsigned(c3, f, broadcast_dword(q, x3 + 4))
            f = _field0(_down4(v))
            c0 = dot_unsigned(c0, f, broadcast_dword(q, x0 + 8))
            c1 = dot_unsigned(c1, f, broadcast_dword(q, x1 + 8))
            c2 = dot_unsigned(c2, f, broadcast_dword(q, x2 + 8))
            c3 = dot_unsigned(c3, f, broadcast_dword(q, x3 + 8))
            f = _field0(_down6(v))
            c0 = dot_unsigned(c0, f, broadcast_dword(q, x0 + 12))
            c1 = dot_unsigned(c1, f, broadcast_dword(q, x1 + 12))
            c2 = dot_unsigned(c2, f, broadcast_dword(q, x2 + 12))
            c3 = dot_unsigned(c3, f, broadcast_dword(q, x3 + 12))
        ws = load_f16(w, scales + b * 32)
        a0 = _finish(a0, c0, ws, x_sums[r0, b], x_scales[r0, b])
        a1 = _finish(a1, c1, ws, x_sums[r1, b], x_scales[r1, b])
        a2 = _finish(a2, c2, ws, x_sums[r2, b], x_scales[r2, b])
        a3 = _finish(a3, c3, ws, x_sums[r3, b], x_scales[r3, b])
    store_f32(out, 4 * (out_at + t * out_step), a0)
    store_f32(out, 4 * (out_at + (t + 1) * out_step), a1)
    store_f32(out, 4 * (out_at + (t + 2) * out_step), a2)
    store_f32(out, 4 * (out_at + (t + 3) * out_step), a3)


@kernel
def gemm(w, codes_at, scales_at, groups, columns, q, x_scales, x_sums, rows, count, out, out_at, out_step):
    """out[t, :] = W @ x[rows[t]] for t < count; every token gets the same bits in any batch.

    w: uint8 arena; groups: padded rows / 16; q: int8 (tokens, columns) with x_scales, x_sums
    (tokens, columns/256); rows: int; out: float32, row t starts at element out_at + t * out_step
    and is 16 * groups long. Sums are exact integers; scales are applied in block order.
    """
    blocks = columns // BLOCK
    for group in range(groups):
        codes = codes_at + group * blocks * 1024
        scales = scales_at + group * blocks * 32
        place = out_at + group * 16
        t = 0
        while t + 4 <= count:
            _four_tokens(w, codes, scales, columns, q, x_scales, x_sums, rows, t, out, place, out_step)
            t += 4
        while t < count:
            row = rows[t]
            acc = zero_f32()
            for b in range(blocks):
                sums = _block_sum(w, codes + b * 1024, q, row * columns + b * BLOCK)
                acc = _finish(acc, sums, load_f16(w, scales + b * 32), x_sums[row, b], x_scales[row, b])
            store_f32(out, 4 * (place + t * out_step), acc)
            t += 1
