"""Replays: a naive twin, the published trace, ruvllm's table, bytes, and cache-prior routing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sterna.scheduler.residency.policies import DEFAULT_POLICY, POLICY_IDS
from sterna.scheduler.residency.reference.expert_cache import ExpertCache
from sterna.scheduler.residency.replay import simulate as s
from sterna.scheduler.residency.replay.simulate import (
    POLICIES,
    ReplayReport,
    ReplaySetting,
    compare,
    simulate,
)
from sterna.scheduler.residency.replay.trace import DECODE, Routes, Trace, read_trace
from sterna.shm.errors import UsageError
from sterna.workers.kernels.routing import eviction
from sterna.workers.kernels.routing.replay import replay

from .. import synthetic

ROOT = Path(__file__).parents[4]
SAMPLE = Path(__file__).parents[3] / "data/route-sample.csv"
PUBLISHED = ROOT.parent / "shared/data/traces/qwen3-30b-a3b.route.csv"
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{PUBLISHED} is not here")


@pytest.fixture(scope="module")
def published() -> Trace:
    return read_trace(PUBLISHED)


def random_trace(seed: int, events: int, layers: int = 4, experts: int = 24, tokens: int = 3) -> Trace:
    """Return a trace of batches with experts of different sizes, some hot, and runner-ups."""
    rng = np.random.default_rng(seed)
    k = 3
    sizes = rng.integers(1, tokens + 1, events)
    rows = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    scores = (
        rng.normal(size=(rows[-1], experts)).astype(np.float32) - np.arange(experts, dtype=np.float32) / 8
    )
    order = np.argsort(-scores, axis=1)[:, : 2 * k].astype(np.int32)
    ranked = np.take_along_axis(scores, order, axis=1)
    return Trace(
        experts_per_layer=experts,
        expert_bytes=np.array([700, 1000, 1000, 850][:layers]),
        rows=rows,
        layers=(np.arange(events) % layers).astype(np.int32),
        phases=np.where(np.arange(events) < events // 8, 0, DECODE).astype(np.uint8),
        experts=order[:, :k].copy(),
        weights=np.full((rows[-1], k), 1 / 3, dtype=np.float32),
        runner_ups=Routes(
            scores=ranked[:, :k].copy(),
            others=order[:, k:].copy(),
            other_scores=ranked[:, k:].copy(),
            spread=scores.max(axis=1) - scores.min(axis=1),
        ),
    )


def naive_lru(trace: Trace, memory_bytes: int) -> list[int]:
    """Return what an event-atomic global LRU of `memory_bytes` fetches in each event."""
    last: dict[int, int] = {}
    resident: set[int] = set()
    fetched = []
    size = trace.expert_bytes.tolist()
    for event in range(trace.num_events):
        layer = int(trace.layers[event])
        used = trace.experts[trace.rows[event] : trace.rows[event + 1]].ravel().tolist()
        keys = sorted({layer * trace.experts_per_layer + e for e in used})
        missing = [key for key in keys if key not in resident]
        last |= dict.fromkeys(keys, event)
        for key in missing:
            room = memory_bytes - sum(size[k // trace.experts_per_layer] for k in resident)
            while room < size[layer] and (others := resident.difference(keys)):
                out = min(others, key=lambda k: (last[k], k))
                resident.remove(out)
                room += size[out // trace.experts_per_layer]
            if room >= size[layer]:
                resident.add(key)
        fetched.append(len(missing))
    return fetched


def test_replay_is_that_of_a_naive_lru() -> None:
    trace = random_trace(1, 400)
    for memory in (900, 12_345, 40_000):
        report = simulate(trace, ReplaySetting(policy="lru", memory_bytes=memory))
        expected = naive_lru(trace, memory)
        assert report.misses_per_logical == pytest.approx(sum(expected) / trace.logical.sum())
        decode = trace.phases == DECODE
        distinct = np.diff(trace.uses()[0])
        assert report.decode_hit_rate == pytest.approx(
            1 - np.array(expected)[decode].sum() / distinct[decode].sum()
        )


@pytest.mark.parametrize("policy", [*POLICY_IDS, "belady", "belady-bypass"])
@pytest.mark.parametrize("floor", [0, 3])
def test_what_is_resident_is_what_was_counted(policy: str, floor: int) -> None:
    """INV-3 from outside: after every ten of 10^5 random events the residents' bytes are summed."""
    trace = random_trace(9, 100_000, tokens=1)
    pool, arrays = s._memory(trace, ReplaySetting(policy=policy, memory_bytes=30_000, floor=floor))
    starts, keys, tokens = trace.uses()
    following, fetched = s.next_uses(starts, keys), np.zeros(len(keys), dtype=np.uint8)
    policy_id = POLICY_IDS.get(policy, eviction.BELADY)
    for first in range(0, trace.num_events, 10):
        replay(policy_id, starts[first : first + 11], keys, tokens, following, fetched, *arrays, pool)
        held = arrays.resident.reshape(trace.num_layers, -1).sum(axis=1, dtype=np.int64)
        assert int(held @ trace.expert_bytes) == pool.used[0] <= 30_000
        assert (held == pool.layer_counts).all()
        assert (pool.candidates == arrays.resident).all()
        assert first < 100 or held.min() >= floor
    assert 0.1 < fetched.mean() < 0.6


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_stay_within_the_budget(policy: str) -> None:
    """INV-3: the most bytes ever held in 10^5 random events, as the replay reports them."""
    trace = random_trace(7, 100_000, tokens=1)
    least = {"belady": 0.5, "belady-bypass": 0.5}.get(policy, 0.4)
    for per_layer in (False, True):
        report = simulate(trace, ReplaySetting(policy=policy, memory_bytes=30_000, per_layer=per_layer))
        assert 25_000 < report.peak_bytes <= 30_000
        assert least < report.hit_rate < 0.99
    assert simulate(trace, ReplaySetting(policy=policy, memory_bytes=0)).hit_rate == 0.0
    assert simulate(trace, ReplaySetting(policy=policy, memory_bytes=trace.total_bytes)).hit_rate > 0.99


@needs_published
def test_published_trace_gives_the_published_rates(published: Trace) -> None:
    """Global LRU of 4000 MiB: 74.9 % overall; the table of expert-memory 3a counts decode."""
    report = simulate(published, ReplaySetting(policy="lru", memory_bytes=4000 << 20))
    assert report.hit_rate == pytest.approx(0.749, abs=0.001)
    table = {
        1000: (62.7, 37.7, 40.2),
        4000: (92.7, 80.3, 80.8),
        8000: (97.1, 96.0, 96.0),
    }
    for mib, rates in table.items():
        for policy, rate in zip(("belady", "lru", "lfu"), rates, strict=True):
            report = simulate(published, ReplaySetting(policy=policy, memory_bytes=mib << 20))
            assert 100 * report.decode_hit_rate == pytest.approx(rate, abs=0.06)
    too_small = simulate(published, ReplaySetting(policy="lru", memory_bytes=500 << 20))
    assert too_small.cycle_ratio < 1.0
    assert too_small.hit_rate == 0.0


@needs_published
@pytest.mark.parametrize("per_layer", [False, True])
def test_default_policy_beats_lru(
    published: Trace, per_layer: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for share in (0.125, 0.25, 0.5):
        memory = int(share * published.total_bytes)
        lru, ours, bound = compare(
            published,
            [
                ReplaySetting(policy=policy, memory_bytes=memory, per_layer=per_layer)
                for policy in ("lru", DEFAULT_POLICY, "belady")
            ],
        )
        assert ours.hit_rate > lru.hit_rate
        assert ours.decode_hit_rate > lru.decode_hit_rate
        assert bound.decode_hit_rate > ours.decode_hit_rate
        assert bound.recoverable == 0.0
        with capsys.disabled():
            rates = ", ".join(f"{r.policy} {100 * r.decode_hit_rate:.2f}" for r in (lru, ours, bound))
            print(f"\n{share:.1%} {'per layer' if per_layer else 'pool'}: {rates}")


# name: LRU, LFU, Adaptive, best LRFU, bypass, Belady forced, Belady with bypass
TABLE = {
    "realistic": (95.25, 96.80, 96.80, 96.80, 95.4, 97.10, 97.20),
    "skewed": (43.30, 69.75, 56.55, 69.80, 78.05, 69.90, 78.15),
    "weights": (77.50, 71.90, 76.80, 77.35, 52.9, 87.10, 87.10),
    "bench_cache_hit_rate": (46.60, 36.20, 46.45, 36.7, 38.8, 63.20, 68.15),
    "bench_skewed": (73.25, 84.85, 81.60, 84.85, 84.75, 84.85, 84.85),
    "bench_eviction_policies": (72.20, 87.20, 87.20, None, None, None, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_synthetic_traces_give_the_numbers_of_the_reference(name: str) -> None:
    accesses = getattr(synthetic, name)()
    if name == "realistic":
        assert np.bincount(accesses, minlength=8).tolist() == [1000, 651, 180, 81, 45, 30, 13, 0]
    trace = synthetic.one_by_one(accesses)

    def rate(**options: object) -> float:
        return 100 * simulate(trace, ReplaySetting(memory_bytes=4, **options)).hit_rate

    found: list[float | None] = []
    for policy in ("lru", "lfu", "adaptive"):
        cache = ExpertCache(8, 4, policy, compat=True)
        cache.access_batch(np.array(accesses, dtype=np.int32))
        found.append(100 * cache.stats.hit_rate)
    assert rate(policy="lru") == pytest.approx(found[0])
    found.append(max(rate(policy="lrfu", decay=decay) for decay in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)))
    found.append(rate(policy="lrfu", decay=0.01, bypass=True))
    found += [rate(policy="belady"), rate(policy="belady-bypass")]
    for ours, theirs in zip(found, TABLE[name], strict=True):
        assert theirs is None or ours == pytest.approx(theirs, abs=0.0501)


def test_a_cycle_that_does_not_fit() -> None:
    """The cliff: an LRU smaller than a cycle never hits, whatever is kept in each layer."""
    accesses = list(range(8)) * 50
    trace = synthetic.one_by_one(accesses)
    lru, bound = compare(trace, [ReplaySetting(policy=p, memory_bytes=7) for p in ("lru", "belady-bypass")])
    assert lru.hit_rate == 0.0
    assert bound.hit_rate == pytest.approx(49 * 7 / 400)
    assert lru.recoverable is not None
    assert lru.recoverable > 0.8


def test_a_floor_protects_every_layer() -> None:
    """One layer with many experts must not take the slots of another."""
    layers = np.array([0, 1, 1, 1, 1] * 40, dtype=np.int32)
    experts = np.where(layers == 0, 3, np.arange(200) % 16).astype(np.int32)
    trace = replace(
        synthetic.one_by_one(experts.tolist(), experts=16),
        layers=layers,
        expert_bytes=np.ones(2, dtype=np.int64),
    )
    bare, kept = (
        simulate(trace, ReplaySetting(policy="lru", memory_bytes=4, floor=floor)) for floor in (0, 1)
    )
    assert bare.hit_rate == 0.0
    assert kept.hit_rate == pytest.approx(39 / 200)


def test_routing_that_prefers_residents() -> None:
    trace = random_trace(3, 4000)
    memory = trace.total_bytes // 3

    def prior(**options: object) -> ReplayReport:
        return compare(trace, [ReplaySetting(policy="cache-prior", memory_bytes=memory, **options)])[0]

    exact = simulate(trace, ReplaySetting(memory_bytes=memory))
    none = prior(bonus=0.0)
    assert none.swapped == 0.0
    assert none.hit_rate == exact.hit_rate
    some, more = prior(bonus=0.1), prior(bonus=0.3)
    assert exact.hit_rate < some.hit_rate < more.hit_rate
    assert 0.0 < some.swapped < more.swapped < 0.5
    assert prior(bonus=1.0, keep=trace.top_k).swapped == 0.0
    assert prior(bonus=1.0, exact_layers=4).swapped == 0.0
    assert more.recoverable is not None
    assert exact.misses_per_logical > more.misses_per_logical
    with pytest.raises(UsageError, match="runner-ups"):
        simulate(replace(trace, runner_ups=None), ReplaySetting(policy="cache-prior", memory_bytes=memory))


def test_a_swap_takes_the_best_resident_and_no_more_than_the_bonus() -> None:
    """Layer of 8, memory for 4: after {0,1}, {2,3}: token [4, 5 | 6, 1] with rank 1 swapped for 1 or not."""
    rows = np.array([[0, 1], [2, 3], [4, 5]], dtype=np.int32)
    others = np.array([[-1, -1], [-1, -1], [6, 1]], dtype=np.int32)
    trace = replace(
        synthetic.one_by_one([0, 0, 0]),
        experts=rows,
        weights=np.ones((3, 2), dtype=np.float32),
        runner_ups=Routes(
            scores=np.array([[2, 1], [2, 1], [4.0, 3.0]], dtype=np.float32),
            others=others,
            other_scores=np.array([[0, 0], [0, 0], [2.5, 2.0]], dtype=np.float32),
            spread=np.full(3, 4.0, dtype=np.float32),
        ),
    )
    before = trace.experts.copy()
    reports = [
        simulate(
            trace, ReplaySetting(policy="cache-prior", memory_bytes=4, bonus=bonus, keep=keep, exact_layers=0)
        )
        for bonus, keep in ((0.24, 1), (0.25, 1), (0.6, 0))
    ]
    assert [round(6 * (report.swapped or 0)) for report in reports] == [0, 1, 1]
    assert [round(6 * (1 - report.hit_rate)) for report in reports] == [6, 5, 5]
    assert (trace.experts == before).all()


def test_next_uses() -> None:
    trace = synthetic.one_by_one([3, 1, 3, 3, 2, 1])
    starts, keys, _ = trace.uses()
    assert s.next_uses(starts, keys).tolist() == [2, 5, 3, s.NEVER, s.NEVER, s.NEVER]


def test_sample_and_unknown_settings() -> None:
    trace = read_trace(SAMPLE)
    reports = compare(
        trace, [ReplaySetting(policy=p, memory_bytes=trace.total_bytes // 4) for p in (*POLICY_IDS, "belady")]
    )
    assert all(0.5 < report.hit_rate < 0.63 for report in reports)
    assert all(report.recoverable is not None and report.recoverable >= 0 for report in reports)
    for bad in (
        ReplaySetting(policy="fifo", memory_bytes=1),
        ReplaySetting(memory_bytes=-1),
        ReplaySetting(memory_bytes=1 << 20, floor=1),
        ReplaySetting(memory_bytes=1 << 30, floor=1, per_layer=True),
    ):
        with pytest.raises(UsageError):
            simulate(trace, bad)
