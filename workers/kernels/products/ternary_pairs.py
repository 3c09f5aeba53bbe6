"""One token times 2-bit weights on AVX2, which has no byte dot product: sums of pairs in 16 bits.

What `ternary._one` does, with the same arguments and bits. Codes are 0..2: a file with others is refused.
"""

from __future__ import annotations

from ..kernel import inner
from ..simd.ops import (
    add_i32,
    and_bytes,
    broadcast_dword,
    broadcast_f32,
    fma_f32,
    load_bytes,
    load_f16,
    load_f32,
    mul_f32,
    shift_right_bytes,
    shift_right_i32,
    store_f32,
    to_f32,
)
from ..simd.pairs import add_pairs, widen_pairs, zero_pairs
from .areas import BLOCK, clear, totals_at, write

_ones = and_bytes(0x03)
_fours = and_bytes(0x0C)
_down4 = shift_right_bytes(4)
_quarter = shift_right_i32(2)


@inner
def one_token(
    w, codes_at, scales_at, first, last, columns, span, by_row, scratch, area, out, element, out_step
):  # fmt: skip
    """Compute the groups first..last - 1 for the one token of the area."""
    spans = columns // span
    totals = totals_at(area, 1, columns, span)
    for group in range(first, last):
        codes = codes_at + group * columns * 4
        scales = scales_at + group * (64 if by_row else columns // BLOCK * 32)
        clear(scratch, totals, 1)
        for b in range(spans):
            total = broadcast_dword(scratch, area + columns + 4 * b)
            for block in range(0, span // 16, 16):
                low, second, fourth = zero_pairs(), zero_pairs(), zero_pairs()
                for kb in range(block, block + 16):
                    v = load_bytes(w, codes + b * span * 4 + kb * 64)
                    x = area + b * span + kb * 16
                    u = _down4(v)
                    low = add_pairs(low, _ones(v), scratch, x)
                    second = add_pairs(second, _fours(v), scratch, x + 4)
                    low = add_pairs(low, _ones(u), scratch, x + 8)
                    fourth = add_pairs(fourth, _fours(u), scratch, x + 12)
                fours = add_i32(widen_pairs(second), widen_pairs(fourth))
                total = add_i32(total, add_i32(widen_pairs(low), _quarter(fours)))
            h = broadcast_f32(scratch, area + columns + 4 * (spans + b))
            scale = h if by_row else mul_f32(load_f16(w, scales + b * 32), h)
            store_f32(scratch, totals, fma_f32(to_f32(total), scale, load_f32(scratch, totals)))
        write(w, scales, by_row, scratch, totals, 1, 1, out, element + group * 16, out_step)
