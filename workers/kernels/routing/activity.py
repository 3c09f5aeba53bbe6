"""Activity of experts: every token lets all scores decay and lifts those of the experts it selected."""

from __future__ import annotations

import numpy as np

from ..kernel import kernel, merged

# Places in `rates`, float32: what each token multiplies, adds and may not exceed, and whether an expert
# that a token names twice is lifted twice (ruvllm, ADR-092) or once. What falls below FLOOR becomes 0: a
# float that fades through the subnormals costs 100 times the arithmetic, and never quite arrives.
DECAY, GAIN, MAX_SCORE, REPEATS, FLOOR = 0, 1, 2, 3, 4
NUM_RATES = 5


@merged
def mark_token(scores, totals, ids, t, rates):
    """Decay all `scores`, then lift and count the experts ids[t]; ids out of range are skipped."""
    experts = scores.shape[0]
    for e in range(experts):
        score = scores[e] * rates[DECAY]
        scores[e] = score if score >= rates[FLOOR] else np.float32(0)
    for rank in range(ids.shape[1]):
        e = ids[t, rank]
        if e < 0 or e >= experts:
            continue
        totals[e] += 1
        again = False
        if rates[REPEATS] == 0:
            for earlier in range(rank):
                again = again or ids[t, earlier] == e
        if not again:
            scores[e] = min(scores[e] + rates[GAIN], rates[MAX_SCORE])


@kernel
def mark_tokens(scores, totals, layer, ids, count, rates):
    """Mark the first `count` rows of `ids` (int32 (tokens, k), -1 for none) in order, as `mark_token`.

    scores: float32 (layers, experts); totals: int64 of that shape; rates: float32 (NUM_RATES,).
    """
    for t in range(count):
        mark_token(scores[layer], totals[layer], ids, t, rates)
