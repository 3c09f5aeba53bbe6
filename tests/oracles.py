"""Naive numpy twins of the kernels: slow, plain, and written from their contracts alone.

Where a kernel documents the order of its float32 sums the twin follows it, so that results can be
compared bit for bit; everything else is float64 and compared within a bound. Not here: the packing
(a kernel is always given what its own `pack` made) and the tests themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

TERNARY_BLOCK = 256
Q8_BLOCK = 32
SMALLEST_SUM = 6.103515625e-5
SOFTMAX, SIGMOID, SOFTMAX_SELECTED = 1, 2, 3


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> F32:
    """Return a * b + c of float32 values, rounded once.

    The product is exact in float64; the sum is rounded to odd there, which makes the second rounding
    to float32 the right one (Boldo and Melquiond 2008).
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.broadcast_to(np.asarray(c, np.float64), np.broadcast_shapes(product.shape, np.shape(c)))
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    even = (total.view(np.int64) & 1) == 0 if total.shape else (np.array([total]).view(np.int64)[0] & 1) == 0
    inexact = np.isfinite(total) & (error != 0)
    towards = np.where(error > 0, np.inf, -np.inf)
    odd = np.where(inexact & even, np.nextafter(total, towards), total)
    return np.asarray(odd.astype(np.float32))


def block_sums(weights: I64, q: I8, block: int) -> I64:
    """Return the exact sum of weight * activation: (rows, K) x (tokens, K) -> (tokens, rows, K/block)."""
    rows, columns = weights.shape
    w = weights.astype(np.int64).reshape(rows, columns // block, block)
    x = q.astype(np.int64).reshape(len(q), columns // block, block)
    return np.einsum("nbk,tbk->tnb", w, x)


def scaled_gemm(weights: I64, w_scales: F32, q: I8, x_scales: F32, block: int) -> F32:
    """Return (tokens, rows): acc = fma(block sum, w_scale * x_scale, acc) in the order of the blocks."""
    sums = block_sums(weights, q, block)
    acc = np.zeros(sums.shape[:2], np.float32)
    for b in range(sums.shape[2]):
        scale = (w_scales[None, :, b] * x_scales[:, b, None]).astype(np.float32)
        acc = fma(sums[:, :, b].astype(np.float32), scale, acc)
    return acc


def floating_gemm(weights: F32, x: F32) -> F32:
    """Return (tokens, rows): four fma chains over the columns modulo 4, added as (0 + 1) + (2 + 3)."""
    acc = np.zeros((4, len(x), len(weights)), np.float32)
    for k in range(weights.shape[1]):
        acc[k % 4] = fma(weights[None, :, k], x[:, k, None], acc[k % 4])
    low: F32 = acc[0] + acc[1]
    high: F32 = acc[2] + acc[3]
    return low + high


def quantize_rows(x: F32, block: int) -> tuple[I8, F32, I32]:
    """Return q, scales and sums of the rows of `x`; finite values whose maximum is not subnormal."""
    blocks = x.reshape(len(x), -1, block)
    peak: F32 = np.abs(blocks).max(axis=2)
    with np.errstate(divide="ignore"):
        inverse = np.where(peak > 0, np.float32(127) / peak, np.float32(0)).astype(np.float32)
    q = np.rint(blocks * inverse[:, :, None]).astype(np.int8)
    if block == Q8_BLOCK:
        scales = (peak / np.float32(127)).astype(np.float16).astype(np.float32)
    else:
        with np.errstate(divide="ignore"):
            scales = np.where(peak > 0, np.float32(1) / inverse, np.float32(0)).astype(np.float32)
    sums = q.astype(np.int32).sum(axis=2, dtype=np.int32)
    return q.reshape(x.shape), scales, sums


def rms_rows(x: F32, weight: F32, eps: float) -> F64:
    """Return x / sqrt(mean(x^2) + eps) * weight in float64."""
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * weight)


def rope_pairs(x: F64, positions: I32, base: float) -> F64:
    """Rotate the pairs (2i, 2i+1) of the rows of `x` (tokens, heads, width) by p * base^(-2i/width)."""
    width = x.shape[-1]
    angle = positions[:, None, None] * base ** (-np.arange(0, width, 2) / width)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)


def rope_halves(x: F64, positions: I32, base: float) -> F64:
    """Rotate the pairs (i, i + width / 2) of `x` (tokens, heads, width) by p * base^(-2i/width)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate((turned.real, turned.imag), axis=-1)


def softmax(scores: F64) -> F64:
    """Return exp(scores) / sum, over the last axis."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def latent_attention(q_latent: F32, q_rope: F32, rows: npt.NDArray[np.float16], scale: float) -> F64:
    """Return one token's context (heads, rank).

    q_latent (heads, rank), q_rope (heads, rope), rows (positions, rank + rope). Queries and softmax
    weights are rounded to float16 as the kernel documents; the rest is float64.
    """
    rank = q_latent.shape[1]
    query = np.concatenate((q_latent, q_rope), axis=1).astype(np.float16).astype(np.float64)
    cache = rows.astype(np.float64)
    weights = softmax(query @ cache.T * scale).astype(np.float16).astype(np.float64)
    return np.asarray(weights @ cache[:, :rank])


def grouped_attention(
    q: F32, keys: npt.NDArray[np.float16], values: npt.NDArray[np.float16], scale: float, sinks: F32
) -> F64:
    """Return one token's heads (heads, width): keys, values (positions, shared, width).

    sinks: empty or (heads,). As transformers' eager attention of gpt_oss: a head's sink is one more score,
    whose weight is dropped.
    Queries and weights are rounded to float16 as the kernel documents; the rest is float64.
    """
    out = np.zeros(q.shape)
    group = len(q) // keys.shape[1]
    for h, query in enumerate(q.astype(np.float16).astype(np.float64)):
        scores = keys[:, h // group].astype(np.float64) @ query * scale
        both = np.append(scores, sinks[h]) if len(sinks) else scores
        weights = softmax(both)[: len(scores)].astype(np.float16).astype(np.float64)
        out[h] = weights @ values[:, h // group].astype(np.float64)
    return out


def silu(x: npt.ArrayLike) -> F64:
    """Return x / (1 + exp(-x)) in float64."""
    wide = np.asarray(x, np.float64)
    return np.asarray(wide / (1.0 + np.exp(-wide)))


def activated(gate: npt.ArrayLike, up: npt.ArrayLike, activation: int) -> F64:
    """Return the middle of a feed-forward network in float64: SILU 0, RELU2 1, CLAMPED 2."""
    g, u = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    if activation == 0:
        return silu(g) * u
    if activation == 1:
        return np.asarray(np.maximum(g, 0.0) ** 2 * u)
    g, u = np.minimum(g, 7.0), np.clip(u, -7.0, 7.0)
    return np.asarray(g / (1.0 + np.exp(-1.702 * g)) * (u + 1.0))


def route_top_k(
    logits: npt.NDArray[np.floating], bias: npt.NDArray[np.floating], k: int, gating: int, normalise: bool,
    scale: float, groups: int = 1, groups_used: int = 1,
) -> tuple[list[int], F64]:  # fmt: skip
    """Return one token's experts, best first, and weights; fewer than `k` when too few are finite."""
    wide = logits.astype(np.float64)
    p = 1.0 / (1.0 + np.exp(-wide)) if gating == SIGMOID else softmax(wide)
    scores = (wide if gating == SOFTMAX_SELECTED else p).astype(np.float32) + bias.astype(np.float32)
    members = np.arange(len(wide)).reshape(groups, -1)
    # DeepSeek-V3: the sum of the two best biased scores; V2: the maximum.
    counted = 2 if gating == SIGMOID else 1
    merit = [float(np.sort(scores[group])[-counted:].sum(dtype=np.float32)) for group in members]
    best = sorted(range(groups), key=lambda g: (-merit[g], g))[:groups_used]
    allowed = {int(e) for g in best for e in members[g]}
    usable = [e for e in sorted(allowed) if math.isfinite(wide[e]) and math.isfinite(bias[e])]
    chosen = sorted(usable, key=lambda e: (-scores[e], e))[:k]
    if gating == SOFTMAX_SELECTED:
        return chosen, softmax(wide[chosen]) * scale
    weights = p[chosen]
    if normalise:
        weights = weights / max(float(weights.sum()), SMALLEST_SUM)
    return chosen, weights * scale


def group_by_expert(selected: Sequence[Sequence[int]]) -> dict[int, list[tuple[int, int]]]:
    """Return {expert: [(token, rank), ...]}, experts ascending, tokens in input order."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for token, experts in enumerate(selected):
        for rank, expert in enumerate(experts):
            groups.setdefault(int(expert), []).append((token, rank))
    return dict(sorted(groups.items()))


def combine(x: F32, y: F32, weights: F32, shared: F32) -> F32:
    """Return x + (sum over ranks, in rank order, of weight * y) + shared, each step rounded to float32."""
    total = np.zeros(x.shape, np.float32)
    for rank in range(y.shape[1]):
        total = total + weights[:, rank, None] * y[:, rank]
    result: F32 = x + (total + shared)
    return result


def feed_forward(gate: F64, up: F64, down: F64, x: npt.NDArray[np.floating]) -> F64:
    """Return down(silu(gate x) * (up x)) of each row of `x`, in float64 and without quantisation."""
    wide = x.astype(np.float64)
    return np.asarray((silu(wide @ gate.T) * (wide @ up.T)) @ down.T)


def dequantized_gemm(weights: F32, x: F64) -> F64:
    """Return x @ weights.T in float64: (tokens, K) x (rows, K) -> (tokens, rows)."""
    return np.asarray(x @ weights.astype(np.float64).T)
