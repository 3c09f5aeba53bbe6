"""RMS norm, rotary embedding, and the small row operations around them."""

from __future__ import annotations

import numpy as np

from .kernel import kernel
from .simd.ops import load_f32, mul_f32, splat_f32, store_f16, store_f32


@kernel
def rms_rows(x, x_step, weight, eps, count, width, out):
    """out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight for `count` rows, `width % 16 == 0`.

    x: float32, row t starts at element t * x_step; out: float32 (count, width), contiguous. The
    squares are summed in float64, as llama.cpp does: their order then does not show.
    """
    flat = x.ravel()
    for t in range(count):
        squares = np.float64(0.0)
        for i in range(t * x_step, t * x_step + width):
            squares += np.float64(flat[i] * flat[i])
        mean = np.float32(squares / width)
        factor = splat_f32(np.float32(1.0) / np.sqrt(mean + eps))
        for i in range(0, width, 16):
            v = mul_f32(load_f32(x, 4 * (t * x_step + i)), factor)
            store_f32(out, 4 * (t * width + i), mul_f32(v, load_f32(weight, 4 * i)))


@kernel
def rope_pairs(x, start, step, heads, head_step, half, positions, cosine, sine, count):
    """Rotate neighbouring pairs (2i, 2i+1) of each head of each row in place.

    x: float32 flat; row t, head h begins at start + t * step + h * head_step; cosine, sine:
    float32 (positions, half) with the angle p * base^(-2i / (2 half)) of position p, pair i.
    """
    for t in range(count):
        p = positions[t]
        for h in range(heads):
            at = start + t * step + h * head_step
            for i in range(half):
                c, s = cosine[p, i], sine[p, i]
                a, b = x[at + 2 * i], x[at + 2 * i + 1]
                x[at + 2 * i] = a * c - b * s
                x[at + 2 * i + 1] = a * s + b * c


@kernel
def store_latent(latent, rope, rope_at, rope_step, rank, width, places, count, cache, cache_at):
    """Append each token's normalised latent and rotated key to the cache as float16.

    latent: float32 (count, rank); rope: float32 flat, row t at rope_at + t * rope_step; places: the
    token's row in this layer's cache; cache: uint8, this layer at byte cache_at, rows of `width`.
    """
    for t in range(count):
        at = cache_at + places[t] * width * 2
        for i in range(0, rank, 16):
            store_f16(cache, at + 2 * i, load_f32(latent, 4 * (t * rank + i)))
        for i in range(0, width - rank, 16):
            store_f16(cache, at + 2 * (rank + i), load_f32(rope, 4 * (rope_at + t * rope_step + i)))


@kernel
def add_rows(x, y, count, width):
    """x += y for `count` rows of `width` float32, both contiguous."""
    fx = x.ravel()
    fy = y.ravel()
    for i in range(count * width):
        fx[i] += fy[i]


@kernel
def first_bad_row(x, count, width):
    """Return the first row of x (float32, contiguous) with a NaN or infinity, or -1."""
    flat = x.ravel()
    for t in range(count):
        poison = np.float32(0.0)
        for i in range(width):
            poison += flat[t * width + i] * np.float32(0.0)
        if poison != poison:
            return t
    return -1
