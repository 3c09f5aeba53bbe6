"""Choosing a token from logits. Pure: the same logits, settings and position give the same token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .messages import Sampling, TokenScore

_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) of a stream's position, from its seed alone.

    Two rounds of SplitMix64's output function (Steele, Lea and Flood 2014): no state to carry, so
    that a repeated step draws the same number.
    """
    return _mix(_mix(seed & _MASK) ^ (position * 0x9E3779B97F4A7C15 & _MASK)) / 2.0**64


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    # 53 bits, so that the quotient by 2^64 never rounds up to 1.
    return (z ^ (z >> 31)) & ~0x7FF


def choose(logits: npt.NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """Return the token id for `position` (the index it will have in the stream).

    Filters in llama.cpp's order on the logits as they are: top_k, then top_p, then min_p, each on
    the probabilities of what is left; then temperature, then the draw. Ties go to the lower id.
    """
    if sampling.temperature == 0.0:
        return int(np.argmax(logits))
    count = len(logits)
    keep = count if sampling.top_k == 0 else min(sampling.top_k, count)
    ids = best_ids(logits, keep)
    scores = logits[ids].astype(np.float64)
    p = np.exp(scores - scores[0])
    p /= p.sum()
    if sampling.top_p < 1.0:
        cut = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
        ids, scores, p = ids[:cut], scores[:cut], p[:cut]
    if sampling.min_p > 0.0:
        kept = p >= sampling.min_p * p[0]
        ids, scores = ids[kept], scores[kept]
    heated = np.exp((scores - scores[0]) / sampling.temperature)
    cumulative = np.cumsum(heated)
    drawn = uniform(sampling.seed, position) * cumulative[-1]
    return int(ids[min(int(np.searchsorted(cumulative, drawn, side="right")), len(ids) - 1)])


def best_ids(logits: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Return the ids of the `count` largest logits, best first, ties to the lower id."""
    candidates = np.arange(len(logits))
    if count < len(logits):
        # Everything that ties with the last one, then a stable cut.
        threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
        candidates = np.flatnonzero(logits >= threshold)
    return candidates[np.argsort(-logits[candidates], kind="stable")[:count]]


def log_normaliser(logits: npt.NDArray[np.float32]) -> float:
    """Return log(sum(exp(logits))) in float64."""
    top = float(logits.max())
    return top + float(np.log(np.exp(logits.astype(np.float64) - top).sum()))


def score(logits: npt.NDArray[np.float32], token: int, top_n: int) -> TokenScore:
    """Return the log-probability of `token` and of the `top_n` best, under the plain softmax."""
    base = log_normaliser(logits)
    top: list[tuple[int, float]] = []
    if top_n:
        best = best_ids(logits, top_n)
        top = [(int(i), float(logits[i]) - base) for i in best]
    return TokenScore(logprob=float(logits[token]) - base, top=top)
