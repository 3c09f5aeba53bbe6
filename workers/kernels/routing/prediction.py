"""Transitions between the experts of successive layers: counting them, and scoring what comes next."""

from __future__ import annotations

import math

import numpy as np

from ..kernel import kernel

_LONG_AGO = np.float32(1e-30)  # not subnormal, which would be slow

# What is added to a count. On the public trace of Qwen3-30B-A3B (156 tokens, top 6 of 128) 0.1 finds 76.4 %
# of the next layer's experts among its first 12, 1 finds 75.2 %; the mean of probabilities, as
# ruvllm (ADR-092) adds them, 74.1 %.
_PRIOR = 0.1
_FACTORS = 32  # multiplied before a logarithm: the least, 0.1 / 2**30, to that power is still above 0


@kernel
def observe_transitions(table, rows, recency, layer, previous, selected, decay, cap):
    """Count previous[t, i] -> selected[t, j] for every token t, and let the recency of `layer` follow.

    table: int32 (layers, experts, experts); rows: int32 (layers, experts), its row sums; recency: float32
    (layers, experts), multiplied by `decay` per token, 1 for what it selected; previous, selected: int32
    (tokens, k), -1 for none. A row is halved when its sum reaches `cap`, so that old habits fade.
    """
    experts = rows.shape[1]
    for t in range(selected.shape[0]):
        for e in range(experts):
            if recency[layer, e] > 0:  # and stays so: above 0 says that it was seen
                recency[layer, e] = max(recency[layer, e] * decay, _LONG_AGO)
        for j in range(selected.shape[1]):
            b = selected[t, j]
            if 0 <= b < experts:
                recency[layer, b] = np.float32(1)
        for i in range(previous.shape[1]):
            a = previous[t, i]
            if a < 0 or a >= experts:
                continue
            for j in range(selected.shape[1]):
                b = selected[t, j]
                if 0 <= b < experts:
                    table[layer, a, b] += 1
                    rows[layer, a] += 1
            if rows[layer, a] >= cap:
                total = 0
                for b in range(experts):
                    table[layer, a, b] >>= 1
                    total += table[layer, a, b]
                rows[layer, a] = total


@kernel
def score_next(table, rows, layer, current, scores):
    """scores[b] = mean over the experts a of `current` of (count(a, b) + 1) / (row(a) + experts).

    current: int32 (tokens, k), -1 for none; scores: float64 (experts,), 1 / experts if nobody is current.
    """
    experts = rows.shape[1]
    number = 0
    scores[:] = 0.0
    for t in range(current.shape[0]):
        for i in range(current.shape[1]):
            a = current[t, i]
            if a < 0 or a >= experts:
                continue
            number += 1
            each = 1.0 / (rows[layer, a] + experts)
            for b in range(experts):
                scores[b] += (table[layer, a, b] + 1) * each
    for b in range(experts):
        scores[b] = scores[b] / number if number > 0 else 1.0 / experts


@kernel
def predict_next(table, rows, recency, layer, current, weight, excluded, scratch, ids):
    """Fill `ids` (int32) with the likeliest experts of `layer`, best first; return how many.

    The score of b is the mean over the experts a of `current` of log((count(a, b) + 0.1) / (row(a) + 0.1
    * experts)), + weight * recency. An expert that was never seen at that layer, or is excluded (bool
    (experts,)), is left out; ties go to the lower id. scratch: float64 (2, experts).
    """
    experts = rows.shape[1]
    scores, product = scratch[0], scratch[1]
    scores[:] = 0.0
    product[:] = 1.0
    number = 0
    for t in range(current.shape[0]):
        for i in range(current.shape[1]):
            a = current[t, i]
            if a < 0 or a >= experts:
                continue
            each = 1.0 / (rows[layer, a] + _PRIOR * experts)
            for b in range(experts):
                product[b] *= (table[layer, a, b] + _PRIOR) * each
            number += 1
            if number % _FACTORS == 0:
                for b in range(experts):
                    scores[b] += math.log(product[b])
                product[:] = 1.0
    for b in range(experts):
        if recency[layer, b] > 0 and not excluded[b]:
            scores[b] = (scores[b] + math.log(product[b])) / max(number, 1) + weight * recency[layer, b]
        else:
            scores[b] = -np.inf
    for rank in range(ids.shape[0]):
        best = 0
        for b in range(1, experts):
            if scores[b] > scores[best]:
                best = b
        if scores[best] == -np.inf:
            return rank
        ids[rank] = best
        scores[best] = -np.inf
    return ids.shape[0]
