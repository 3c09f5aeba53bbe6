"""What the encoders share: transposing a block into lanes, writing codes.

Sixteen blocks with a scale of their own ("subs") lie side by side, one a lane: [element][16 lanes].
"""

from __future__ import annotations

import numpy as np

from ..kernel import inner, merged
from ..simd.codes import load_dword, store_dword
from ..simd.fitting import pick_more
from ..simd.ops import abs_f32, div_f32, splat_f32, zero_f32
from ..simd.transpose import lanes_to, load_rows, store_rows

BLOCK = 256
_store_tile = store_rows(4, 0)

# The same bits of four codes at once.
_PAIR, _BIT, _NIBBLE = np.uint32(0x03030303), np.uint32(0x01010101), np.uint32(0x0F0F0F0F)


@inner
def gather(values, at, width, lane, work, to):
    """Transpose a block of 256 values into lanes from `lane` on: [element][16 lanes] at `to`."""
    for s in range(BLOCK // width):
        for i in range(width):
            work[to + i * 16 + lane + s] = values[at + s * width + i]


@inner
def gather_subs(values, at, width, last, work, to):
    """Transpose neighbouring subs 0..last from `at` into the lanes, in registers; others repeat the last."""
    all_lanes = lanes_to(15)
    for i in range(0, width, 4):
        tile = load_rows(values, 4 * (at + i), 4 * width, last)
        _store_tile(work, 4 * (to + 16 * i), 64, tile, all_lanes)


@merged
def inverse(x):
    """1 / x, and 0 for 0."""
    return pick_more(abs_f32(x), zero_f32(), div_f32(splat_f32(np.float32(1.0)), x), zero_f32())


@merged
def write_pairs(codes, out, at):
    """Write the low two bits of 256 codes as Q2_K and Q3_K hold them."""
    for i in range(0, 64, 4):
        first = i // 32 * 128 + i % 32
        word = np.uint32(0)
        for k in range(4):
            word |= (load_dword(codes, first + 32 * k) & _PAIR) << np.uint32(2 * k)
        store_dword(out, at + i, word)


@merged
def write_bits(codes, bit, out, at):
    """Write bit `bit` of 256 codes: byte i holds that of columns i, 32 + i, ..."""
    for i in range(0, 32, 4):
        word = np.uint32(0)
        for k in range(8):
            word |= ((load_dword(codes, 32 * k + i) >> np.uint32(bit)) & _BIT) << np.uint32(k)
        store_dword(out, at + i, word)


@merged
def write_nibbles(codes, out, at):
    """Write the low four bits of 256 codes as Q4_K and Q5_K hold them."""
    for i in range(0, 128, 4):
        first = i // 32 * 64 + i % 32
        low, high = load_dword(codes, first) & _NIBBLE, load_dword(codes, first + 32) & _NIBBLE
        store_dword(out, at + i, np.uint32(low | (high << np.uint32(4))))


@merged
def write_sixes(codes, out, at):
    """Write 256 codes of six bits as Q6_K holds them: 128 bytes of their low four, 64 of their high two."""
    for i in range(0, 128, 4):
        first = i // 64 * 128 + i % 64
        low, high = load_dword(codes, first) & _NIBBLE, load_dword(codes, first + 64) & _NIBBLE
        store_dword(out, at + i, np.uint32(low | (high << np.uint32(4))))
    for i in range(0, 64, 4):
        first = i // 32 * 128 + i % 32
        word = np.uint32(0)
        for k in range(4):
            word |= ((load_dword(codes, first + 32 * k) >> np.uint32(4)) & _PAIR) << np.uint32(2 * k)
        store_dword(out, at + 128 + i, word)
