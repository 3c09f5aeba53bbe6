"""TL1: ternary matrices of two bits a weight, sixteen rows interleaved.

For each group of 16 rows and each block of 256 columns 1,024 bytes of codes: 16 times
[16 rows][4 bytes]; bits 2s..2s+1 of byte j hold the code (weight + 1) of column 16 kb + 4 s + j.
A 32-bit lane is one row, so that one broadcast dword of activations serves sixteen rows and no
sum runs across lanes. All codes come first, then all scales: float16, [group][block][16 rows].
"""

from __future__ import annotations

import numpy as np

from .kernel import kernel, piece
from .simd.dot import SMALL_CODES, dot_unsigned
from .simd.ops import (
    add_i32,
    and_bytes,
    broadcast_dword,
    broadcast_f32,
    fma_f32,
    load_bytes,
    load_f16,
    load_f32,
    load_i32,
    mul_f32,
    shift_right_bytes,
    shift_right_i32,
    splat_f32,
    splat_i32,
    store_bytes,
    store_f32,
    sub_i32,
    to_f32,
    zero_f32,
    zero_i32,
)
from .simd.tile import broadcast_tile, store_tile, tile_dot_unsigned

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


@piece
def _finish(acc, sums, weight_scales, x_sum, x_scale):
    """Take the code offset off and add the scaled block to `acc`."""
    exact = to_f32(sub_i32(sums, splat_i32(x_sum)))
    return fma_f32(exact, mul_f32(weight_scales, splat_f32(x_scale)), acc)


if SMALL_CODES:
    # Codes must stay small: the upper two fields are shifted down by four bits.
    @piece
    def _third(v):
        return _field0(_down4(v))

    @piece
    def _fourth(v):
        return _field1(_down4(v))

    @piece
    def _whole(c0, c1, c2, c3):
        return add_i32(add_i32(c0, c2), _sum2(add_i32(c1, c3)))

else:
    # The fields stay where they are: their sums are multiples of 1, 4, 16 and 64.
    @piece
    def _third(v):
        return _field2(v)

    @piece
    def _fourth(v):
        return _field3(v)

    @piece
    def _whole(c0, c1, c2, c3):
        return add_i32(add_i32(c0, _sum2(c1)), add_i32(_sum4(c2), _sum6(c3)))


@kernel
def _one_token(w, codes, scales, columns, pair, q, x_scales, x_sums, row, out, place):
    """Compute one group of 16 rows, or two if `pair` is the bytes from one to the next, for one token."""
    blocks = columns // BLOCK
    a = zero_f32()
    d = zero_f32()
    for b in range(blocks):
        c0, c1, c2, c3 = zero_i32(), zero_i32(), zero_i32(), zero_i32()
        e0, e1, e2, e3 = zero_i32(), zero_i32(), zero_i32(), zero_i32()
        at = codes + b * 1024
        x = row * columns + b * BLOCK
        for kb in range(16):
            v = load_bytes(w, at + kb * 64)
            u = load_bytes(w, at + pair + kb * 64)
            x0 = broadcast_dword(q, x + kb * 16)
            x1 = broadcast_dword(q, x + kb * 16 + 4)
            x2 = broadcast_dword(q, x + kb * 16 + 8)
            x3 = broadcast_dword(q, x + kb * 16 + 12)
            c0 = dot_unsigned(c0, _field0(v), x0)
            e0 = dot_unsigned(e0, _field0(u), x0)
            c1 = dot_unsigned(c1, _field1(v), x1)
            e1 = dot_unsigned(e1, _field1(u), x1)
            c2 = dot_unsigned(c2, _third(v), x2)
            e2 = dot_unsigned(e2, _third(u), x2)
            c3 = dot_unsigned(c3, _fourth(v), x3)
            e3 = dot_unsigned(e3, _fourth(u), x3)
        s, h = x_sums[row, b], x_scales[row, b]
        a = _finish(a, _whole(c0, c1, c2, c3), load_f16(w, scales + b * 32), s, h)
        d = _finish(d, _whole(e0, e1, e2, e3), load_f16(w, scales + pair // 32 + b * 32), s, h)
    store_f32(out, 4 * place, a)
    if pair:
        store_f32(out, 4 * (place + 16), d)


_TILE = 8
_first_tile = broadcast_tile(_TILE)
_tile_dot = tile_dot_unsigned(_TILE)
_store_tile = store_tile(2 * _TILE)
# Scratch: codes of two groups' block, one byte each; a tile's sums; then for eight tokens at a time
# the panels, then [block][token] negated sums, then [block][token] scales; then for each token the
# float sums of both groups.
_SUMS_AT = 2 * 64 * 64
_PANELS_AT = _SUMS_AT + 2 * _TILE * 64


def scratch_nbytes(columns: int, tokens: int) -> int:
    """Return the size of the scratch that `gemm` needs for up to `tokens` tokens."""
    return _PANELS_AT + tokens * (columns + 8 * (columns // BLOCK) + 128)


@kernel
def _pack_panels(q, x_scales, x_sums, columns, rows, count, scratch):
    """Copy tokens in eights: [column / 4][token][4 int8] each, with their sums and scales behind."""
    blocks = columns // BLOCK
    quads = columns // 4
    words = q.view(np.int32)
    panels = scratch[_PANELS_AT:].view(np.int32)
    sums = panels[count * quads :]
    scales = scratch[_PANELS_AT + count * (columns + 4 * blocks) :].view(np.float32)
    for t in range(0, count, _TILE):
        for i in range(_TILE):
            row = rows[t + i]
            for k in range(quads):
                panels[t * quads + k * _TILE + i] = words[row, k]
            for b in range(blocks):
                sums[t * blocks + b * _TILE + i] = -x_sums[row, b]
                scales[t * blocks + b * _TILE + i] = x_scales[row, b]


@kernel
def _unpack(w, at, out, out_at):
    """Spread one block of codes (16 rows, 256 columns) to one byte per code."""
    for kb in range(16):
        v = load_bytes(w, at + kb * 64)
        place = out_at + kb * 256
        store_bytes(out, place, _field0(v))
        store_bytes(out, place + 64, _field0(_down2(v)))
        store_bytes(out, place + 128, _field0(_down4(v)))
        store_bytes(out, place + 192, _field0(_down6(v)))


@piece
def _tile(scratch, panel, sums_at, scales_at, first, second, acc_at):
    """Add one block of two groups, unpacked in scratch, to the sums of eight tokens at acc_at.

    first, second: the groups' weight scales of this block. The code offset goes in with the start.
    """
    tile = _first_tile(scratch, sums_at)
    for k in range(64):
        u = load_bytes(scratch, k * 64)
        v = load_bytes(scratch, 4096 + k * 64)
        tile = _tile_dot(tile, u, v, scratch, panel + k * 4 * _TILE)
    _store_tile(scratch, _SUMS_AT, tile)
    for i in range(_TILE):
        x_scale = broadcast_f32(scratch, scales_at + 4 * i)
        at = acc_at + i * 128
        a = to_f32(load_i32(scratch, _SUMS_AT + i * 64))
        d = to_f32(load_i32(scratch, _SUMS_AT + (_TILE + i) * 64))
        store_f32(scratch, at, fma_f32(a, mul_f32(first, x_scale), load_f32(scratch, at)))
        store_f32(scratch, at + 64, fma_f32(d, mul_f32(second, x_scale), load_f32(scratch, at + 64)))


@kernel
def _tiles(w, codes, scales, pair, columns, count, scratch, out, place, out_step):
    """Compute two groups for `count` tokens, a multiple of eight, whose panels lie in scratch."""
    blocks = columns // BLOCK
    sums_at = _PANELS_AT + count * columns
    scales_at = sums_at + 4 * count * blocks
    acc_at = scales_at + 4 * count * blocks
    for t in range(count):
        store_f32(scratch, acc_at + t * 128, zero_f32())
        store_f32(scratch, acc_at + t * 128 + 64, zero_f32())
    for b in range(blocks):
        _unpack(w, codes + b * 1024, scratch, 0)
        _unpack(w, codes + pair + b * 1024, scratch, 4096)
        first = load_f16(w, scales + b * 32)
        second = load_f16(w, scales + pair // 32 + b * 32)
        for t in range(0, count, _TILE):
            side = 4 * (t * blocks + b * _TILE)
            panel = _PANELS_AT + t * columns + b * BLOCK * _TILE
            _tile(scratch, panel, sums_at + side, scales_at + side, first, second, acc_at + t * 128)
    for t in range(count):
        store_f32(out, 4 * (place + t * out_step), load_f32(scratch, acc_at + t * 128))
        if pair:
            store_f32(out, 4 * (place + t * out_step + 16), load_f32(scratch, acc_at + t * 128 + 64))


@kernel
def gemm(
    form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out, out_at,
    out_step,
):  # fmt: skip
    """out[t, :] = W @ x[rows[t]] for t < count; every token gets the same bits in any batch.

    The signature is that of all products (`products`). form: the format's number; w: uint8 arena; groups:
    padded rows / 16; x: float32 (tokens, columns), read by float formats only; q: int8 (tokens, columns)
    with x_scales, x_sums (tokens, columns/256), read by the others; rows: int; scratch: uint8, see
    scratch_nbytes; out: float32, row t starts at element out_at + t * out_step and is 16 * groups long.
    Sums are exact integers; scales are applied in block order.
    """
    blocks = columns // BLOCK
    tiled = count // _TILE * _TILE
    if tiled:
        _pack_panels(q, x_scales, x_sums, columns, rows, tiled, scratch)
    for group in range(0, groups, 2):
        codes = codes_at + group * blocks * 1024
        scales = scales_at + group * blocks * 32
        pair = blocks * 1024 if group + 1 < groups else 0
        place = out_at + group * 16
        if tiled:
            _tiles(w, codes, scales, pair, columns, tiled, scratch, out, place, out_step)
        for t in range(tiled, count):
            _one_token(
                w, codes, scales, columns, pair, q, x_scales, x_sums, rows[t], out, place + t * out_step
            )
