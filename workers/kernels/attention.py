"""Attention over the latent cache (absorbed MLA): one latent row serves all heads.

Queries and softmax weights are rounded to float16, the cache's own precision: llama.cpp does so too,
and near ties between experts then fall the same way.

Each token reads the positions 0..p of its own stream in order, so that its bits do not depend on
who else is in the batch or how its prompt was cut into chunks.
"""

from __future__ import annotations

import numpy as np

from .kernel import kernel
from .simd.mathematics import exp_f32
from .simd.ops import (
    add_f32,
    fma_f32,
    largest_f32,
    load_f16,
    load_f32,
    max_f32,
    mul_f32,
    round_f16,
    splat_f32,
    store_f32,
    sub_f32,
    sum_f32,
    zero_f32,
)


@kernel
def _score(q, q_at, cache, row_at, count, acc):
    for i in range(0, count, 16):
        acc = fma_f32(load_f16(cache, row_at + 2 * i), round_f16(load_f32(q, 4 * (q_at + i))), acc)
    return acc


@kernel
def _softmax(scores, count):
    """Turn scores[:count] into weights that sum to 1; pads to a multiple of 16 with zeros."""
    padded = (count + 15) // 16 * 16
    for i in range(count, padded):
        scores[i] = scores[0]
    top = load_f32(scores, 0)
    for i in range(16, padded, 16):
        top = max_f32(load_f32(scores, 4 * i), top)
    peak = splat_f32(largest_f32(top))
    for i in range(0, padded, 16):
        store_f32(scores, 4 * i, exp_f32(sub_f32(load_f32(scores, 4 * i), peak)))
    for i in range(count, padded):
        scores[i] = np.float32(0.0)
    total = zero_f32()
    for i in range(0, padded, 16):
        total = add_f32(total, load_f32(scores, 4 * i))
    inverse = splat_f32(np.float32(1.0) / sum_f32(total))
    for i in range(0, padded, 16):
        store_f32(scores, 4 * i, round_f16(mul_f32(load_f32(scores, 4 * i), inverse)))


@kernel
def latent_attention(
    q_latent, q_rope, rope_at, rope_step, rope_head_step, heads, rank, width, scale,
    cache, cache_at, tables, slots, positions, block, count, scores, row_places, out,
):  # fmt: skip
    """out[t, h] = softmax(scale * (q_latent[t, h] . c + q_rope[t, h] . k)) @ c over positions 0..p.

    q_latent, out: float32 (count, heads * rank); q_rope: float32 flat, head h of row t at
    rope_at + t * rope_step + h * rope_head_step; cache: uint8 holding float16 rows of `width` =
    rank + rope, this layer from byte cache_at; tables: int32 (slots, blocks) block tables; slots,
    positions: int (count,); scores: float32 scratch and row_places: int64 scratch, both at least
    max(positions) + 16 long. rank % 32 == 0, rope % 16 == 0.
    """
    for t in range(count):
        length = positions[t] + 1
        for p in range(length):
            place = np.int64(tables[slots[t], p // block]) * block + p % block
            row_places[p] = cache_at + place * width * 2
        for h in range(heads):
            q_at = (t * heads + h) * rank
            r_at = rope_at + t * rope_step + h * rope_head_step
            for p in range(length):
                acc = _score(q_latent, q_at, cache, row_places[p], rank, zero_f32())
                acc = _score(q_rope, r_at, cache, row_places[p] + 2 * rank, width - rank, acc)
                scores[p] = sum_f32(acc) * scale
            _softmax(scores, length)
            for i in range(0, rank, 32):
                low = zero_f32()
                high = zero_f32()
                for p in range(length):
                    share = splat_f32(scores[p])
                    at = row_places[p] + 2 * i
                    low = fma_f32(load_f16(cache, at), share, low)
                    high = fma_f32(load_f16(cache, at + 32), share, high)
                store_f32(out, 4 * (q_at + i), low)
                store_f32(out, 4 * (q_at + i + 16), high)
