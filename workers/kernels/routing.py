"""Top-k routing, grouping of tokens by expert, and the sum of the experts' outputs."""

from __future__ import annotations

import math

import numpy as np

from .kernel import kernel

SOFTMAX, SIGMOID = 1, 2  # GGUF's expert_gating_func

# llama.cpp's floor under the sum of the selected weights: the smallest normal float16.
SMALLEST_SUM = np.float32(6.103515625e-5)


@kernel
def _probabilities(logits, t, gating, p):
    experts = logits.shape[1]
    if gating == SIGMOID:
        for e in range(experts):
            p[e] = np.float32(1.0) / (np.float32(1.0) + np.float32(math.exp(-logits[t, e])))
        return
    top = logits[t, 0]
    for e in range(1, experts):
        top = max(top, logits[t, e])
    total = np.float32(0.0)
    for e in range(experts):
        p[e] = np.float32(math.exp(logits[t, e] - top))
        total += p[e]
    for e in range(experts):
        p[e] /= total


@kernel
def route_top_k(logits, bias, count, experts, gating, normalise, scale, p, selected, weights):
    """Select the best experts of `count` tokens; return the first token without enough, or -1.

    logits: float32 (tokens, >= experts); bias: float32 (experts,) added for selection only; p:
    float32 scratch; selected: int32 (tokens, k) best first, ties to the lower id; weights: float32
    (tokens, k) from the unbiased p, divided by their sum if `normalise`, times `scale`. An
    expert with a non-finite logit or score is never selected.
    """
    k = selected.shape[1]
    for t in range(count):
        _probabilities(logits[:, :experts], t, gating, p)
        for rank in range(k):
            best = -1
            best_score = np.float32(-np.inf)
            for e in range(experts):
                score = p[e] + bias[e]
                if not (math.isfinite(score) and math.isfinite(logits[t, e])) or score <= best_score:
                    continue
                taken = False
                for r in range(rank):
                    taken = taken or selected[t, r] == e
                if not taken:
                    best, best_score = e, score
            if best < 0:
                return t
            selected[t, rank] = best
            weights[t, rank] = p[best]
        total = np.float32(0.0)
        for rank in range(k):
            total += weights[t, rank]
        divisor = max(total, SMALLEST_SUM) if normalise else np.float32(1.0)
        for rank in range(k):
            weights[t, rank] = weights[t, rank] / divisor * scale
    return -1


@kernel
def group_by_expert(selected, count, ends, tokens, ranks):
    """Counting sort of all (token, rank) pairs by expert, tokens in input order.

    selected: int32 (tokens, k); ends: int32 (experts + 1,) becomes the start of each expert's
    pairs and, last, their number; tokens, ranks: int32 (count * k,), the pairs in that order.
    """
    k = selected.shape[1]
    experts = ends.shape[0] - 1
    ends[:] = 0
    for t in range(count):
        for rank in range(k):
            ends[selected[t, rank] + 1] += 1
    for e in range(experts):
        ends[e + 1] += ends[e]
    for t in range(count):
        for rank in range(k):
            e = selected[t, rank]
            tokens[ends[e]] = t
            ranks[ends[e]] = rank
            ends[e] += 1
    for e in range(experts, 0, -1):
        ends[e] = ends[e - 1]
    ends[0] = 0


@kernel
def all_below(values, limit):
    """Return whether all `values` (int32) are in 0..limit - 1."""
    for value in values:  # noqa: SIM110 - a generator would be slower here
        if value < 0 or value >= limit:
            return False
    return True


@kernel
def scatter_pairs(outputs, tokens, ranks, first, count, y):
    """y[tokens[i], ranks[i]] = outputs[i - first] for the pairs first..first+count (float32 rows)."""
    width = y.shape[2]
    for i in range(count):
        t, rank = tokens[first + i], ranks[first + i]
        for d in range(width):
            y[t, rank, d] = outputs[i, d]


@kernel
def combine(x, y, weights, shared, count):
    """x[t] += sum over ranks of weights[t, rank] * y[t, rank], in rank order, + shared[t]."""
    ranks = weights.shape[1]
    width = y.shape[2]
    for t in range(count):
        for d in range(width):
            total = np.float32(0.0)
            for rank in range(ranks):
                total += weights[t, rank] * y[t, rank, d]
            x[t, d] += total + shared[t, d]
