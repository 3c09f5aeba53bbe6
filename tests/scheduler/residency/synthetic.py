"""The trace generators of ruvllm's MoE modules (ADR-092), in float32 as there: one access after another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sterna.scheduler.residency.replay.trace import DECODE, Trace

TOKENS, EXPERTS = 1000, 8


def realistic() -> list[int]:
    i = np.arange(EXPERTS, dtype=np.float32)
    base = np.float32(1.0) / np.sqrt(i + np.float32(1.0))
    accesses: list[int] = []
    for t in range(TOKENS):
        wave = np.sin(np.float32(0.1) * (np.float32(t) * i)).astype(np.float32)
        accesses += _best_two(base + np.float32(0.2) * wave)
    return accesses


def weights() -> list[int]:
    i = np.arange(EXPERTS, dtype=np.float32)
    accesses: list[int] = []
    for t in range(TOKENS):
        accesses += _best_two(np.exp(np.sin(np.float32(0.1) * np.float32(t) * i)).astype(np.float32))
    return accesses


def skewed() -> list[int]:
    accesses: list[int] = []
    for t in range(TOKENS):
        primary = t % 3 if (7 * t) % 10 < 8 else 3 + t % (EXPERTS - 3)
        accesses += [primary, (primary + 1 + t % 2) % EXPERTS]
    return accesses


def bench_cache_hit_rate() -> list[int]:
    accesses: list[int] = []
    for t in range(TOKENS):
        first = (3 * t + t // 10) % 8
        accesses += [first, (first + 1 + t % 3) % 8]
    return accesses


def bench_skewed() -> list[int]:
    accesses: list[int] = []
    for t in range(TOKENS):
        primary = t % 3 if t % 10 < 8 else 3 + t % 5
        accesses += [primary, (primary + 1) % 8]
    return accesses


def bench_eviction_policies() -> list[int]:
    return [i % 3 if i % 10 < 7 else 7 * i % 8 for i in range(TOKENS)]


def _best_two(scores: np.ndarray) -> list[int]:
    return [int(i) for i in np.argsort(-scores, kind="stable")[:2]]


def one_by_one(accesses: Sequence[int], experts: int = EXPERTS) -> Trace:
    """Return a trace of one layer in which every access is an event; an expert has one byte."""
    n = len(accesses)
    return Trace(
        experts_per_layer=experts,
        expert_bytes=np.ones(1, dtype=np.int64),
        rows=np.arange(n + 1, dtype=np.int64),
        layers=np.zeros(n, dtype=np.int32),
        phases=np.full(n, DECODE, dtype=np.uint8),
        experts=np.array(accesses, dtype=np.int32)[:, None],
        weights=np.ones((n, 1), dtype=np.float32),
    )
