"""RMS norm, rotary embedding, and the small row operations around them.

Each element is rounded as written (a product, then a sum), in vectors or one by one alike.
"""

from __future__ import annotations

import math

import numpy as np

from ..kernel import kernel, merged
from ..simd.ops import add_f32, load_f32, mul_f32, splat_f32, store_f32, sub_f32
from .kv_values import store_cached, value_nbytes


@merged
def rms_row(x, at, weight, eps, width, out, out_at):
    """One row of `rms_rows`, from element `at` of x to element `out_at` of out."""
    flat = x.ravel()
    squares = np.float64(0.0)
    for i in range(at, at + width):
        squares += np.float64(flat[i] * flat[i])
    mean = np.float32(squares / width)
    factor = splat_f32(np.float32(1.0) / np.sqrt(mean + eps))
    for i in range(0, width, 16):
        v = mul_f32(load_f32(x, 4 * (at + i)), factor)
        store_f32(out, 4 * (out_at + i), mul_f32(v, load_f32(weight, 4 * i)))


@kernel
def rms_rows(x, x_step, weight, eps, count, width, out):
    """out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight for `count` rows, `width % 16 == 0`.

    x: float32, row t starts at element t * x_step; out: float32 (count, width), contiguous. The
    squares are summed in float64, as llama.cpp does: their order then does not show. Where x_step is
    `width` out may be x; the heads of (tokens, heads * width) are count = tokens * heads such rows.
    """
    for t in range(count):
        rms_row(x, t * x_step, weight, eps, width, out, t * width)


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
def rope_halves(x, start, step, heads, head_step, half, positions, cosine, sine, count):
    """Rotate the pairs (i, i + half) of each head of each row in place; arguments as rope_pairs.

    cosine, sine: rows are contiguous.
    """
    whole = half // 16 * 16
    for t in range(count):
        p = positions[t]
        row = p * cosine.shape[1]
        for h in range(heads):
            at = start + t * step + h * head_step
            for i in range(0, whole, 16):
                c, s = load_f32(cosine, 4 * (row + i)), load_f32(sine, 4 * (row + i))
                a, b = load_f32(x, 4 * (at + i)), load_f32(x, 4 * (at + half + i))
                store_f32(x, 4 * (at + i), sub_f32(mul_f32(a, c), mul_f32(b, s)))
                store_f32(x, 4 * (at + half + i), add_f32(mul_f32(a, s), mul_f32(b, c)))
            for i in range(whole, half):
                cs, sn = cosine[p, i], sine[p, i]
                first, second = x[at + i], x[at + half + i]
                x[at + i] = first * cs - second * sn
                x[at + half + i] = first * sn + second * cs


@kernel
def store_latent(latent, rope, rope_at, rope_step, rank, width, cache_rows, count, cache, cache_at):
    """Append each token's normalised latent and rotated key to the cache.

    latent: float32 (count, rank); rope: float32 flat, row t at rope_at + t * rope_step; cache_rows: the
    token's row in this layer's cache; cache: see `cached`, this layer at byte cache_at, rows of `width`.
    """
    size = value_nbytes(cache)
    for t in range(count):
        at = cache_at + cache_rows[t] * width * size
        for i in range(0, rank, 16):
            store_cached(cache, at + size * i, load_f32(latent, 4 * (t * rank + i)))
        for i in range(0, width - rank, 16):
            v = load_f32(rope, 4 * (rope_at + t * rope_step + i))
            store_cached(cache, at + size * (rank + i), v)


@kernel
def add_rows(x, y, count, width):
    """x += y for `count` rows of `width` float32, both contiguous."""
    fx = x.ravel()
    fy = y.ravel()
    for i in range(count * width):
        fx[i] += fy[i]


@kernel
def add_vector(x, vector, count, width):
    """x[t] += vector for `count` contiguous rows of `width` float32; vector: float32 (width,)."""
    flat = x.ravel()
    whole = width // 16 * 16
    for t in range(count):
        at = t * width
        for i in range(0, whole, 16):
            store_f32(x, 4 * (at + i), add_f32(load_f32(x, 4 * (at + i)), load_f32(vector, 4 * i)))
        for i in range(whole, width):
            flat[at + i] += vector[i]


@kernel
def add_scaled_rows(x, y, factor, count, width):
    """x += factor * y for `count` rows of `width` float32, both contiguous; factor: float32."""
    fx, fy = x.ravel(), y.ravel()
    whole = count * width // 16 * 16
    factors = splat_f32(factor)
    for i in range(0, whole, 16):
        store_f32(x, 4 * i, add_f32(load_f32(x, 4 * i), mul_f32(factors, load_f32(y, 4 * i))))
    for i in range(whole, count * width):
        fx[i] += factor * fy[i]


@kernel
def scale_rows(x, factor, count, width):
    """x *= factor for `count` contiguous rows of `width` float32; factor: float32."""
    flat = x.ravel()
    whole = count * width // 16 * 16
    factors = splat_f32(factor)
    for i in range(0, whole, 16):
        store_f32(x, 4 * i, mul_f32(load_f32(x, 4 * i), factors))
    for i in range(whole, count * width):
        flat[i] *= factor


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


@kernel
def gate_rows(x, logits, step, count, width):
    """x[t] *= sigmoid(logits[t * step]) for `count` contiguous rows of `width` float32.

    logits: float32, contiguous, of any dimensions (the gate of qwen2moe's shared expert).
    """
    flat, gates = x.ravel(), logits.ravel()
    whole = width // 16 * 16
    for t in range(count):
        factor = np.float32(1.0) / (np.float32(1.0) + np.float32(math.exp(-gates[t * step])))
        factors = splat_f32(factor)
        at = t * width
        for i in range(0, whole, 16):
            store_f32(x, 4 * (at + i), mul_f32(load_f32(x, 4 * (at + i)), factors))
        for i in range(whole, width):
            flat[at + i] *= factor
