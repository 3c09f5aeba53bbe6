"""Decoders of whole blocks to float32 rows, for conversion: K-quants, Q8_0, float16 and bfloat16.

Values and rounding are those of the decoders in `checkpoint` (numpy, of all types, and slower): scale times
code, minus the minimum, each product and the difference rounded once.
"""

from __future__ import annotations

import numpy as np

from ..kernel import kernel
from ..products.planes import BLOCK, FILE_NBYTES, OFFSETS, SUBS, _unpack
from ..simd.codes import load_i8, load_u8
from ..simd.fitting import half_at
from ..simd.ops import load_bf16, load_f16, mul_f32, splat_f32, store_f32, sub_f32, to_f32
from ..simd.planes import Q2_K, Q3_K, Q6_K


@kernel
def kquants(form, raw, blocks, work, out):
    """Decode blocks of Q2_K to Q6_K (raw: uint8) to out (float32, blocks * 256).

    work: uint8 (planes.WORK_NBYTES,).
    """
    nbytes, subs = FILE_NBYTES[form - Q2_K], SUBS[form - Q2_K]
    offset = splat_f32(np.float32(OFFSETS[form - Q2_K]))
    width = BLOCK // subs
    signed = form in (Q3_K, Q6_K)
    for block in range(blocks):
        _unpack(form, raw, block * nbytes, work)
        d, dmin = half_at(work, 288), half_at(work, 290)
        for s in range(subs):
            code = work[256 + s]
            scale = splat_f32(d * np.float32(np.int8(code) if signed else code))
            least = splat_f32(np.float32(0.0) if signed else dmin * np.float32(work[256 + subs + s]))
            for i in range(s * width, (s + 1) * width, 16):
                value = mul_f32(sub_f32(to_f32(load_u8(work, i)), offset), scale)
                store_f32(out, 4 * (block * BLOCK + i), sub_f32(value, least))


@kernel
def q8_0(raw, blocks, out):
    """Decode Q8_0 blocks (float16 scale, 32 int8; raw: uint8) to out (float32, blocks * 32)."""
    for block in range(blocks):
        scale = splat_f32(half_at(raw, block * 34))
        for i in range(0, 32, 16):
            value = mul_f32(to_f32(load_i8(raw, block * 34 + 2 + i)), scale)
            store_f32(out, 4 * (block * 32 + i), value)


@kernel
def halves(brain, raw, count, out):
    """Widen `count` (a multiple of 16) float16, or bfloat16 if `brain`, to out (float32)."""
    for i in range(0, count, 16):
        if brain:
            store_f32(out, 4 * i, load_bf16(raw, 2 * i))
        else:
            store_f32(out, 4 * i, load_f16(raw, 2 * i))
