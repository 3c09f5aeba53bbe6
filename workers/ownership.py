"""Which worker owns an expert: weighted rendezvous hashing.

Every process computes the same owner without talking; when a worker is added or taken away only the
experts move that the change concerns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b


def owner(layer: int, expert: int, weights: Sequence[float]) -> int:
    """Return the index of the worker that owns (layer, expert).

    `weights` are the workers' capacities, all positive. The score of worker i is -w_i / ln(u_i) with
    u_i in (0, 1) from a hash of (layer, expert, i); the highest wins, which gives each worker a share
    in proportion to its weight (Schindelhauer and Schomaker 2005).
    """
    best, best_score = 0, -math.inf
    for index, weight in enumerate(weights):
        digest = blake2b(f"{layer}/{expert}/{index}".encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "little") + 0.5) / 2.0**64
        score = -weight / math.log(uniform)
        if score > best_score:
            best, best_score = index, score
    return best


def owners(layers: Sequence[int], experts: int, weights: Sequence[float]) -> dict[tuple[int, int], int]:
    """Return the owner of each expert of `layers`."""
    return {(layer, expert): owner(layer, expert, weights) for layer in layers for expert in range(experts)}
