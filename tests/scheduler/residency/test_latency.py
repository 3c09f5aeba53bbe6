"""Histograms of nanoseconds and the router's metrics with ruvllm's pinned numbers (ADR-092)."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.scheduler.residency.latency import LatencyHistogram, RouterMetrics, bucket_of, last_of
from sterna.shm.errors import InternalError


def test_buckets_follow_each_other_without_gap() -> None:
    edges = [last_of(b) for b in range(bucket_of(2**63 - 1) + 1)]
    assert edges == sorted(set(edges))
    assert edges[-1] == 2**63 - 1
    for b, last in enumerate(edges[:-1]):
        assert bucket_of(last) == b
        assert bucket_of(last + 1) == b + 1
        first = edges[b - 1] + 1 if b else 0
        assert last <= first * 1.032


def test_percentiles_are_within_a_bucket() -> None:
    samples = np.random.default_rng(1).lognormal(9, 1, 5000).astype(int).tolist()
    first, second = LatencyHistogram(), LatencyHistogram()
    for i, ns in enumerate(samples):
        (first if i % 3 else second).record(ns)
    first.merge(second)
    ordered = sorted(samples)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        exact = ordered[max(int(np.ceil(share * 5000)), 1) - 1]
        assert exact <= first.percentile(share) <= exact * 1.032
    assert first.mean_ns == sum(samples) / 5000
    assert first.max_ns == ordered[-1] == first.percentile(1.0)
    assert (first.count, LatencyHistogram().p50_ns) == (5000, 0)
    with pytest.raises(InternalError):
        first.record(-1)


def test_pinned_hits() -> None:
    metrics = RouterMetrics()
    assert metrics.hit_rate == 0.0
    metrics.record_accesses(3, 1)
    assert metrics.hit_rate == 0.75
    metrics.reset()
    metrics.record_accesses(5, 1)
    metrics.record_accesses(1, 2)
    assert metrics.hit_rate == pytest.approx(6 / 9)


def test_pinned_times_and_prefetches() -> None:
    metrics = RouterMetrics()
    for us in (10, 20):
        metrics.record_routing(us * 1000)
    metrics.record_paging(40_000, paged_in=2, paged_out=1)
    for hit in (True, True, False):
        metrics.record_prefetch(hit)
    found = metrics.summary()
    assert (found.average_routing_us, found.max_routing_us, found.routing_decisions) == (15.0, 20.0, 2)
    assert (found.average_paging_us, found.max_paging_us, found.page_operations) == (40.0, 40.0, 3)
    assert found.prefetch_accuracy == pytest.approx(0.6666667)
    metrics.reset()
    empty = metrics.summary()
    assert {getattr(empty, name) for name in empty.__slots__} == {0}


def test_what_is_below_a_microsecond_is_not_lost() -> None:
    metrics = RouterMetrics()
    for _ in range(10):
        metrics.record_routing(300)
    assert metrics.summary().average_routing_us == pytest.approx(0.3)


def test_one_outlier_does_not_fail_the_targets_for_ever() -> None:
    metrics = RouterMetrics()
    metrics.record_accesses(7, 3)
    metrics.record_routing(1_000_000)
    assert not metrics.summary().meets_targets()
    for _ in range(99):
        metrics.record_routing(14_500)
    assert metrics.summary().meets_targets()
    metrics.record_accesses(0, 1)
    assert not metrics.summary().meets_targets()
