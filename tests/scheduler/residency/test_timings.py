"""What routing and scheduling cost here; printed, never judged. ruvllm's figures (ADR-092) stand by."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns

import numpy as np
import pytest

from sterna.scheduler.experts.groups import MoeBatchScheduler
from sterna.scheduler.residency.predictor import ExpertPredictor
from sterna.scheduler.residency.reference.affinity import AffinityConfig, ExpertAffinity
from sterna.scheduler.residency.reference.memory_router import MemoryAwareRouter, MemoryRouterConfig
from sterna.workers.kernels.routing.top_k import group_by_expert


def best_ns(call: Callable[[], object], calls: int = 20, rounds: int = 1000) -> float:
    """Return the ns of one call in the fastest round."""
    call()
    best = float("inf")
    for _ in range(rounds):
        start = perf_counter_ns()
        for _ in range(calls):
            call()
        best = min(best, (perf_counter_ns() - start) / calls)
    return best


def test_print_timings(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    lines = []
    for tokens in (1, 8):
        router = MemoryAwareRouter(MemoryRouterConfig(num_experts=64, top_k=4))
        router.update_cache_state(range(32))
        logits = rng.standard_normal((tokens, 64)).astype(np.float32)
        took = best_ns(lambda router=router, logits=logits: router.route_batch(logits))  # type: ignore[misc]
        lines.append(f"route {tokens} tokens, 4 of 64: {took / 1000:.2f} us (reference, 8 tokens: 3.2)")
    selected = rng.integers(0, 64, (512, 4)).astype(np.int32)
    scheduler = MoeBatchScheduler(64, 4, 512)
    took = best_ns(lambda: scheduler.schedule(selected, 512))
    ends, pairs = np.zeros(65, np.int32), np.zeros((2, 2048), np.int32)
    kernel = best_ns(lambda: group_by_expert(selected, 512, ends, pairs[0], pairs[1]))
    lines.append(
        f"schedule 512 tokens, 4 of 64: {took / 1000:.1f} us, its kernel {kernel / 1000:.1f} (ruvllm 33.8)"
    )
    affinity = ExpertAffinity(AffinityConfig(num_experts=64))
    took = best_ns(lambda: affinity.update_batch(selected, 8))
    lines.append(f"affinity of 8 tokens, 4 of 64: {took / 1000:.2f} us")
    predictor = ExpertPredictor(num_layers=46, num_experts=64)
    took = best_ns(lambda: predictor.observe(5, selected[:8], selected[8:16]))
    lines.append(f"observe 8 tokens, 4 of 64: {took / 1000:.2f} us")
    took = best_ns(lambda: predictor.predict(5, selected[:1], 4))
    lines.append(f"predict 4 of 64: {took / 1000:.2f} us")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
