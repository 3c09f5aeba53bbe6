"""File bytes of a matrix into its arena layout, at memory speed: one packer per file type.

Sixteen rows are read side by side and transposed in registers, so that whole 64-byte packets are
written. Every packer takes `raw`, the tensor's bytes row by row, and writes codes from byte `codes_at`
and scales from byte `scales_at` of `out` (uint8 both; nothing is allocated); rows beyond the matrix up
to the next multiple of 16 become zero weights with scale 0. The layouts written are those of `ternary`
(format TL1 and its form with one float32 per row), `q8` and `floating`. Packers of two-bit codes return
-1, or row * (columns / 256) + block of the first weight whose code is 3; the arena is then unusable.

Not here: file types that are decoded to codes first (`checkpoint.ternary_types`, then `codes`).
"""

from __future__ import annotations

import numpy as np

from ..kernel import kernel
from ..simd.ops import zero_i32
from ..simd.transpose import (
    any_set,
    digits,
    digits_within,
    gather_u16,
    gather_u32,
    lanes_to,
    load_quads,
    load_rows,
    merge_codes,
    offset_bytes,
    part_halves,
    signed_fives,
    store_lanes,
    store_rows,
    store_u16,
    swap_fields,
    swap_within,
    threes,
)

BLOCK = 256
ZEROS = 0x55555555  # sixteen codes of weight 0

_store_codes = store_rows(4, ZEROS)
_store_digits = store_rows(5, ZEROS)
_store_packet = store_lanes(ZEROS)
_store_bytes = store_rows(4, 0x80808080)
_store_block = store_rows(8, 0x80808080)
_store_floats = store_rows(4, 0)
_store_scales = store_lanes(0)


@kernel
def _first_three(out, codes_at, group, columns):
    """Return row * blocks + block of the first code 3 of a group of rows, by its packed codes."""
    blocks = columns // BLOCK
    for row in range(16):
        for block in range(blocks):
            at = codes_at + (group * blocks + block) * 1024 + row * 4
            for packet in range(16):
                for j in range(4):
                    byte = out[at + packet * 64 + j]
                    if byte & (byte >> 1) & 0x55:
                        return (group * 16 + row) * blocks + block
    return -1


@kernel
def tq2_0(raw, rows, columns, out, codes_at, scales_at):
    """Pack TQ2_0 (blocks of 256: 64 bytes of codes, float16 scale) as TL1; see the module for the rest."""
    blocks = columns // BLOCK
    step = blocks * 66
    for group in range((rows + 15) // 16):
        last = min(15, rows - 1 - group * 16)
        keep = lanes_to(last)
        found = zero_i32()
        for block in range(blocks):
            at = group * 16 * step + block * 66
            to = codes_at + (group * blocks + block) * 1024
            for half in range(2):
                for i in range(2):
                    # Field l of bytes 16 i ... 16 i + 15 is columns 128 half + 32 l + 16 i ...
                    tile = swap_fields(load_rows(raw, at + half * 32 + i * 16, step, last))
                    found = threes(found, tile)
                    _store_codes(out, to + half * 512 + i * 64, 128, tile, keep)
            scales = gather_u16(raw, at + 64, step, last)
            store_u16(out, scales_at + (group * blocks + block) * 32, scales, keep)
        if any_set(found):
            return _first_three(out, codes_at, group, columns)
    return -1


@kernel
def t158(raw, rows, columns, out, codes_at, scales_at):
    """Pack BITNET_T158 (blocks of 256: 64 bytes of codes in column order, float16 scale) as TL1."""
    blocks = columns // BLOCK
    step = blocks * 66
    for group in range((rows + 15) // 16):
        last = min(15, rows - 1 - group * 16)
        keep = lanes_to(last)
        found = zero_i32()
        for block in range(blocks):
            at = group * 16 * step + block * 66
            to = codes_at + (group * blocks + block) * 1024
            for i in range(4):
                tile = swap_within(load_rows(raw, at + i * 16, step, last))
                found = threes(found, tile)
                _store_codes(out, to + i * 256, 64, tile, keep)
            scales = gather_u16(raw, at + 64, step, last)
            store_u16(out, scales_at + (group * blocks + block) * 32, scales, keep)
        if any_set(found):
            return _first_three(out, codes_at, group, columns)
    return -1


@kernel
def tq1_0(raw, rows, columns, out, codes_at, scales_at):
    """Pack TQ1_0 (blocks of 256 in base 3: 48 bytes of 5 digits, 4 of 4, float16 scale) as TL1.

    Every byte decodes to digits 0..2, so that there is nothing to refuse: returns -1.
    """
    blocks = columns // BLOCK
    step = blocks * 54
    for group in range((rows + 15) // 16):
        last = min(15, rows - 1 - group * 16)
        keep = lanes_to(last)
        for block in range(blocks):
            at = group * 16 * step + block * 54
            to = codes_at + (group * blocks + block) * 1024
            for i in range(2):
                # Digit n of bytes 16 i ... is columns 32 n + 16 i ..., then of bytes 32 ... 160 + 16 n ...
                tile = digits(load_rows(raw, at + i * 16, step, last))
                _store_digits(out, to + i * 64, 128, tile, keep)
            tile = digits(load_rows(raw, at + 32, step, last))
            _store_digits(out, to + 640, 64, tile, keep)
            rest = digits_within(gather_u32(raw, at + 48, step, last))
            _store_packet(out, to + 960, rest, keep)
            scales = gather_u16(raw, at + 52, step, last)
            store_u16(out, scales_at + (group * blocks + block) * 32, scales, keep)
    return -1


@kernel
def i2_s(raw, rows, columns, out, codes_at, scales_at):
    """Pack I2_S (32 bytes per 128 columns; one float32 behind all codes) as TL1 with row scales."""
    step = columns // 4
    scale = gather_u32(raw, rows * step, 0, 0)
    for group in range((rows + 15) // 16):
        last = min(15, rows - 1 - group * 16)
        keep = lanes_to(last)
        found = zero_i32()
        for chunk in range(columns // 128):
            at = group * 16 * step + chunk * 32
            to = codes_at + (group * columns + chunk * 128) * 4
            for i in range(2):
                # As TQ2_0, but the first columns are in the highest bits.
                tile = swap_fields(load_rows(raw, at + i * 16, step, last))
                found = threes(found, tile)
                _store_codes(out, to + 384 + i * 64, -128, tile, keep)
        _store_scales(out, scales_at + group * 64, scale, keep)
        if any_set(found):
            return _first_three(out, codes_at, group, columns)
    return -1


@kernel
def iq2_bn(raw, rows, columns, out, codes_at, scales_at):
    """Pack IQ2_BN (rows of a float32 scale, then 16 bytes per 64 columns) as TL1 with row scales."""
    step = 4 + columns // 4
    for group in range((rows + 15) // 16):
        last = min(15, rows - 1 - group * 16)
        keep = lanes_to(last)
        found = zero_i32()
        start = group * 16 * step
        for chunk in range(columns // 64):
            tile = swap_fields(load_rows(raw, start + 4 + chunk * 16, step, last))
            found = threes(found, tile)
            _store_codes(out, codes_at + (group * columns + chunk * 64) * 4, 64, tile, keep)
        _store_scales(out, scales_at + group * 64, gather_u32(raw, start, step, last), keep)
        if any_set(found):
            return _first_three(out, codes_at, group, columns)
    return -1


@kernel
def iq2_bn_r4(raw, rows, columns, out, codes_at, scales_at):
    """Pack IQ2_BN_R4 (four rows together, in our order of columns) as TL1 with row scales.

    rows: a multiple of 4.
    """
    step = 16 + columns
    for group in range((rows + 15) // 16):
        keep = lanes_to(min(15, rows - 1 - group * 16))
        last = min(3, rows // 4 - 1 - group * 4)
        start = group * 4 * step
        found = zero_i32()
        for packet in range(columns // 16):
            codes = load_quads(raw, start + 16 + packet * 16, step, last)
            found = threes(found, codes)
            _store_packet(out, codes_at + (group * columns // 16 + packet) * 64, codes, keep)
        _store_scales(out, scales_at + group * 64, load_quads(raw, start, step, last), keep)
        if any_set(found):
            return _first_three(out, codes_at, group, columns)
    return -1


@kernel
def codes(codes, scale_bits, out, codes_at, scales_at):
    """Pack codes (uint8 0..2, C-contiguous (N, K)) and float16 scales (uint16 bits, (N, K/256)) as TL1."""
    rows, columns = codes.shape
    blocks = columns // BLOCK
    for group in range((rows + 15) // 16):
        last = min(15, rows - 1 - group * 16)
        keep = lanes_to(last)
        for packet in range(columns // 16):
            merged = merge_codes(load_rows(codes, group * 16 * columns + packet * 16, columns, last))
            _store_packet(out, codes_at + (group * columns // 16 + packet) * 64, merged, keep)
        for block in range(blocks):
            scales = gather_u16(scale_bits, (group * 16 * blocks + block) * 2, blocks * 2, last)
            store_u16(out, scales_at + (group * blocks + block) * 32, scales, keep)


@kernel
def q8_0(raw, rows, columns, out, codes_at, scales_at):
    """Pack Q8_0 (blocks of 32: float16 scale, 32 int8) in the layout of `q8`; -128 becomes -127."""
    blocks = columns // 32
    step = blocks * 34
    for group in range((rows + 15) // 16):
        last = min(15, rows - 1 - group * 16)
        keep = lanes_to(last)
        for block in range(blocks):
            at = group * 16 * step + block * 34
            to = codes_at + (group * blocks + block) * 512
            for i in range(2):
                tile = offset_bytes(load_rows(raw, at + 2 + i * 16, step, last))
                _store_bytes(out, to + i * 256, 64, tile, keep)
            store_u16(out, scales_at + (group * blocks + block) * 32, gather_u16(raw, at, step, last), keep)


@kernel
def q5_0(raw, rows, columns, out, codes_at, scales_at):
    """Pack Q5_0 (blocks of 32: float16 scale, 4 bytes of fifth bits, 16 of nibbles) in the layout of `q8`."""
    blocks = columns // 32
    step = blocks * 22
    for group in range((rows + 15) // 16):
        last = min(15, rows - 1 - group * 16)
        keep = lanes_to(last)
        for block in range(blocks):
            at = group * 16 * step + block * 22
            to = codes_at + (group * blocks + block) * 512
            fifths = gather_u32(raw, at + 2, step, last)
            tile = signed_fives(load_rows(raw, at + 6, step, last), fifths)
            _store_block(out, to, 64, tile, keep)
            store_u16(out, scales_at + (group * blocks + block) * 32, gather_u16(raw, at, step, last), keep)


@kernel
def floats(raw, rows, columns, width, out, at):
    """Pack a row-major matrix of `width`-byte elements (2 or 4) in the layout of `floating`, from `at` on."""
    step = columns * width
    whole = step // 16 * 16
    for group in range((rows + 15) // 16):
        start = group * 16 * step
        last = min(15, rows - 1 - group * 16)
        keep = lanes_to(last)
        for byte in range(0, whole, 16):
            tile = load_rows(raw, start + byte, step, last)
            if width == 2:
                _store_floats(out, at + start + byte * 16, 64, part_halves(tile, keep), lanes_to(15))
            else:
                _store_floats(out, at + start + byte * 16, 64, tile, keep)
        for byte in range(whole, step):
            column, i = byte // width, byte % width
            for lane in range(16):
                value = raw[start + lane * step + byte] if lane <= last else np.uint8(0)
                out[at + start + (column * 16 + lane) * width + i] = value
