"""LatencyHistogram and RouterMetrics: what routing and paging cost, in nanoseconds.

No clock in here: callers measure and hand the nanoseconds in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...shm.errors import InternalError

TARGET_HIT_RATE = 0.70
TARGET_ROUTING_NS = 15_000

_SUB_BITS = 5  # 32 linear steps within each power of two: at most 3.1 % wide
_STEPS = 1 << _SUB_BITS
_BUCKETS = (63 - _SUB_BITS) * _STEPS + _STEPS


def bucket_of(ns: int) -> int:
    """Return the bucket of `ns` (0 <= ns < 2**63); below 64 ns each has its own."""
    shift = max(ns.bit_length() - _SUB_BITS - 1, 0)
    return shift * _STEPS + (ns >> shift)


def last_of(bucket: int) -> int:
    """Return the greatest nanoseconds in `bucket`."""
    shift = max(bucket // _STEPS - 1, 0)
    return ((bucket - shift * _STEPS + 1) << shift) - 1


class LatencyHistogram:
    """Counts of durations in buckets of <= 3.1 %; `count`, `total_ns` and `max_ns` are exact."""

    __slots__ = ("_counts", "count", "max_ns", "total_ns")

    def __init__(self) -> None:
        self._counts: npt.NDArray[np.int64] = np.zeros(_BUCKETS, np.int64)
        self.count = 0
        self.total_ns = 0
        self.max_ns = 0

    def reset(self) -> None:
        """Forget everything."""
        self._counts[:] = 0
        self.count = self.total_ns = self.max_ns = 0

    def record(self, ns: int) -> None:
        """Add one duration; raise InternalError if it is negative or 2**63 and more."""
        if not 0 <= ns < 2**63:
            raise InternalError(f"a latency of {ns} ns")
        self._counts[bucket_of(ns)] += 1
        self.count += 1
        self.total_ns += ns
        self.max_ns = max(self.max_ns, ns)

    def merge(self, other: LatencyHistogram) -> None:
        """Add what `other` holds."""
        self._counts += other._counts
        self.count += other.count
        self.total_ns += other.total_ns
        self.max_ns = max(self.max_ns, other.max_ns)

    def percentile(self, share: float) -> int:
        """Return the ns that `share` (0..1) of the durations keep to: the end of a bucket, 0 if none."""
        if not self.count:
            return 0
        rank = min(max(math.ceil(share * self.count), 1), self.count)
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank))
        return min(last_of(bucket), self.max_ns)

    @property
    def p50_ns(self) -> int:
        """The median."""
        return self.percentile(0.50)

    @property
    def p99_ns(self) -> int:
        """What 99 of 100 do not exceed."""
        return self.percentile(0.99)

    @property
    def mean_ns(self) -> float:
        """The exact mean, 0 if none."""
        return self.total_ns / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSummary:
    """RouterMetrics at one moment, in the units people read."""

    hit_rate: float
    average_routing_us: float
    p99_routing_us: float
    max_routing_us: float
    average_paging_us: float
    max_paging_us: float
    prefetch_accuracy: float
    routing_decisions: int
    page_operations: int

    def meets_targets(self) -> bool:
        """Return whether 70 % of accesses hit and 99 % of routings took at most 15 us."""
        return self.hit_rate >= TARGET_HIT_RATE and self.p99_routing_us * 1000 <= TARGET_ROUTING_NS


class RouterMetrics:
    """Counters of a router and of whoever pages for it; plain adds, one writer.

    `paging.count` is not the number of pages moved: an operation may bring in several.
    """

    def __init__(self) -> None:
        self.routing = LatencyHistogram()
        self.paging = LatencyHistogram()
        self.hits = 0
        self.misses = 0
        self.experts_paged_in = 0
        self.experts_paged_out = 0
        self.prefetch_operations = 0
        self.prefetch_hits = 0
        self.affinity_evictions = 0

    def reset(self) -> None:
        """Set everything to zero."""
        self.hits = self.misses = 0
        self.experts_paged_in = self.experts_paged_out = 0
        self.prefetch_operations = self.prefetch_hits = 0
        self.affinity_evictions = 0
        self.routing.reset()
        self.paging.reset()

    def record_accesses(self, hits: int, misses: int) -> None:
        """Add `hits` experts that were resident when selected, and `misses` that were not."""
        self.hits += hits
        self.misses += misses

    def record_routing(self, ns: int) -> None:
        """Add a routing decision that took `ns`."""
        self.routing.record(ns)

    def record_paging(self, ns: int, *, paged_in: int = 0, paged_out: int = 0) -> None:
        """Add a paging operation that took `ns`."""
        self.paging.record(ns)
        self.experts_paged_in += paged_in
        self.experts_paged_out += paged_out

    def record_prefetch(self, hit: bool) -> None:
        """Add a prefetch whose expert was, or was not, used."""
        self.prefetch_operations += 1
        self.prefetch_hits += hit

    @property
    def hit_rate(self) -> float:
        """Hits of all accesses, 0 if none."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 0.0

    @property
    def prefetch_accuracy(self) -> float:
        """Used prefetches of all, 0 if none."""
        return self.prefetch_hits / self.prefetch_operations if self.prefetch_operations else 0.0

    def summary(self) -> RouterSummary:
        """Return what the counters say now."""
        return RouterSummary(
            hit_rate=self.hit_rate,
            average_routing_us=self.routing.mean_ns / 1000,
            p99_routing_us=self.routing.p99_ns / 1000,
            max_routing_us=self.routing.max_ns / 1000,
            average_paging_us=self.paging.mean_ns / 1000,
            max_paging_us=self.paging.max_ns / 1000,
            prefetch_accuracy=self.prefetch_accuracy,
            routing_decisions=self.routing.count,
            page_operations=self.experts_paged_in + self.experts_paged_out,
        )
