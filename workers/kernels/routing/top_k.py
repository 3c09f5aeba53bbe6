"""Top-k routing, grouping of tokens by expert, and the sum of the experts' outputs.

Called in every layer, with flat arguments: see `kernel.kernel`.
"""

from __future__ import annotations

import math

import numpy as np

from ...gating import SIGMOID, SOFTMAX_SELECTED
from ..kernel import kernel

_LARGEST = np.float32(np.finfo(np.float32).max)

# llama.cpp's floor under the sum of the selected weights: the smallest normal float16.
SMALLEST_SUM = np.float32(6.103515625e-5)

# Columns of an account: what it may still lose; what it had to route, how many of these (token, layer) were
# changed, in how many experts, and the gate mass that was lost, summed.
CREDIT, EVENTS, CHANGED, SWAPS, LOST = range(5)


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
def _close_groups(scores, gating, groups, groups_used, best):
    """Take the experts of all but the best groups out: their scores become -inf. best: float32 scratch."""
    size = scores.shape[0] // groups
    for g in range(groups):
        first = second = np.float32(-np.inf)
        for e in range(g * size, (g + 1) * size):
            if scores[e] > first:
                first, second = scores[e], first
            elif scores[e] > second:
                second = scores[e]
        best[g] = min(first + second, _LARGEST) if gating == SIGMOID and size > 1 else first
    for _ in range(groups - groups_used):
        worst = -1
        for g in range(groups):
            if best[g] <= _LARGEST and (worst < 0 or best[g] <= best[worst]):
                worst = g
        best[worst] = np.float32(np.inf)
        scores[worst * size : (worst + 1) * size] = np.float32(-np.inf)


@kernel
def _score(logits, bias, t, experts, gating, groups, groups_used, work):
    """work[0] = token t's probabilities, work[1] = what its experts are ranked by, -inf: not at all."""
    p, scores = work[0], work[1]
    _probabilities(logits[:, :experts], t, gating, p)
    for e in range(experts):
        logit = logits[t, e]
        score = (logit if gating == SOFTMAX_SELECTED else p[e]) + bias[e]
        usable = math.isfinite(score) and math.isfinite(logit)
        scores[e] = score if usable else np.float32(-np.inf)
    if groups_used < groups:
        _close_groups(scores[:experts], gating, groups, groups_used, work[2])


@kernel
def _rank(scores, t, experts, ranked):
    """Write the best experts of token t to ranked[t], best first, -1 where none is left; uses scores up."""
    for rank in range(ranked.shape[1]):
        best = -1
        best_score = np.float32(-np.inf)
        for e in range(experts):
            if scores[e] > best_score:
                best, best_score = e, scores[e]
        ranked[t, rank] = best
        if best >= 0:
            scores[best] = np.float32(-np.inf)


@kernel
def _mass(p, selected, t):
    total = np.float32(0.0)
    for rank in range(selected.shape[1]):
        total += p[selected[t, rank]]
    return total


@kernel
def _weigh(p, selected, t, mass, normalise, scale, weights):
    """Weights of token t; mass: of the true selection, so that a trade leaves the others' weights alone."""
    divisor = max(mass, SMALLEST_SUM) if normalise else np.float32(1.0)
    for rank in range(selected.shape[1]):
        weights[t, rank] = p[selected[t, rank]] / divisor * scale


@kernel
def route_top_k(
    logits, bias, count, experts, gating, groups, groups_used, normalise, scale, work, ranked, selected,
    weights,
):  # fmt: skip
    """Select the best experts of `count` tokens; return the first token without enough, or -1.

    logits: float32 (tokens, >= experts); bias: float32 (experts,) added for selection only; gating: see
    `workers.gating`; groups: experts lie in `groups` groups of one size, and only those of the best
    `groups_used` count: a group is as good as its best score (sigmoid: the sum of its two best), ties to the
    lower (DeepSeek-V3, arXiv:2412.19437, section 2.1.2); work: float32 scratch (3, experts);
    ranked: int32 (tokens, m >= k), the best m, best first, ties to the lower id, -1 where none is
    left; selected: int32 (tokens, k), the first of them; weights: float32 (tokens, k) from the unbiased p,
    divided by their sum if `normalise`, times `scale`. An expert with a non-finite logit or score is never
    selected.

    SOFTMAX_SELECTED ranks by logit + bias and always divides: the softmax over all, divided by the sum of the
    selected, is the softmax over these.
    """
    k = selected.shape[1]
    p = work[0]
    normalise = normalise or gating == SOFTMAX_SELECTED
    for t in range(count):
        _score(logits, bias, t, experts, gating, groups, groups_used, work)
        _rank(work[1], t, experts, ranked)
        if ranked[t, k - 1] < 0:
            return t
        for rank in range(k):
            selected[t, rank] = ranked[t, rank]
        _weigh(p, selected, t, _mass(p, selected, t), normalise, scale, weights)
    return -1


@kernel
def _swap(p, scores, gating, t, experts, ranked, keep, bonus, present, share, account, selected):
    """Trade experts of token t that are not present for ones that are, as far as its account allows."""
    k = selected.shape[1]
    mass = np.float64(_mass(p, selected, t))
    lowest, highest = np.inf, -np.inf
    for e in range(experts):
        if scores[e] > -np.inf:
            lowest, highest = min(lowest, scores[e]), max(highest, scores[e])
    swapped = False
    candidate = k
    for rank in range(k - 1, keep - 1, -1):
        out = selected[t, rank]
        if present[out]:
            continue
        while candidate < ranked.shape[1] and (ranked[t, candidate] < 0 or not present[ranked[t, candidate]]):
            candidate += 1
        if candidate == ranked.shape[1]:
            break
        new = ranked[t, candidate]
        behind = np.float64(scores[out]) - np.float64(scores[new])
        lost = np.float64(p[out]) - np.float64(p[new])
        # Where the bias decides, the lost mass may be nothing or less: the trade is not free for that. Scores
        # that are logits cannot be compared with a mass.
        cost = (abs(lost) if gating == SOFTMAX_SELECTED else max(behind, lost)) / mass
        # What a trade harms grows with the weight that changes hands, too: at the same lost mass, choosing by
        # this product cost a third less perplexity (docs/expert-memory.md).
        harm = cost * np.float64(p[out]) / mass
        if behind > bonus * (highest - lowest) or cost >= account[CREDIT] or harm > account[CREDIT] * share:
            break
        selected[t, rank] = new
        account[CREDIT] -= cost
        account[LOST] += cost
        account[SWAPS] += 1.0
        swapped = True
        candidate += 1
    if swapped:
        account[CHANGED] += 1.0


@kernel
def route_resident(
    logits, bias, count, experts, gating, groups, groups_used, normalise, scale, work, ranked, selected,
    weights, streams, epsilon, limit, keep, bonus, share, resident, present, accounts,
):  # fmt: skip
    """As route_top_k, but tokens with an account prefer experts that are resident.

    streams: int32 (tokens,), the account of each token, -1 for exact ones; epsilon: float64 (accounts,), the
    share of its gate mass that a token may lose in this layer on average; limit: what an account may save up,
    in such shares; keep: ranks that are never traded; bonus: a swap may cost at most this share of the spread
    of the token's scores; share: the lost mass times the expert's weight may be this share of the credit;
    resident: uint8 (experts,); present:
    uint8 scratch; accounts: float64 (accounts, 5), see CREDIT and those after it.

    An account gets epsilon for each token and layer, and a swap is paid with the gate mass it loses, as a
    share of what the true selection had: the mean lost mass can never exceed epsilon. The weights of what
    was not traded stay those of the true selection, by whose mass all are divided; so SOFTMAX_SELECTED takes
    the softmax over all experts as p. Only experts of the groups that count are traded for.
    """
    bad = route_top_k(
        logits, bias, count, experts, gating, groups, groups_used, normalise, scale, work, ranked, selected,
        weights,
    )  # fmt: skip
    if bad >= 0:
        return bad
    p = work[0]
    normalise = normalise or gating == SOFTMAX_SELECTED
    for e in range(experts):
        present[e] = resident[e]
    for t in range(count):  # what must be read for one token is there for all
        if streams[t] < 0:
            for rank in range(selected.shape[1]):
                present[selected[t, rank]] = 1
    for t in range(count):
        if streams[t] < 0:
            continue
        account = accounts[streams[t]]
        refill = epsilon[streams[t]]
        account[CREDIT] = min(account[CREDIT] + refill, refill * limit)
        account[EVENTS] += 1.0
        _score(logits, bias, t, experts, gating, groups, groups_used, work)
        mass = _mass(p, selected, t)
        _swap(p, work[1], gating, t, experts, ranked, keep, bonus, present, share, account, selected)
        _weigh(p, selected, t, mass, normalise, scale, weights)
        for rank in range(selected.shape[1]):
            present[selected[t, rank]] = 1
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
