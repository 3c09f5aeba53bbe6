"""The expert cache: ruvllm's sequences and pinned numbers (ADR-092), and where the default differs."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sterna.scheduler.residency.policies import DEFAULT_POLICY, POLICY_IDS
from sterna.scheduler.residency.reference.expert_cache import ExpertCache
from sterna.shm.errors import ConfigError

GOLDEN = Path(__file__).parents[3] / "data/cache-golden.jsonl"


class Scores:
    """An affinity of given scores."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = np.array(scores, dtype=np.float32)

    def score(self, expert: int) -> float:
        return float(self.scores[expert])

    def top_k_by_affinity(self, k: int) -> list[int]:
        return sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], i))[:k]


def golden() -> list[Any]:
    return [json.loads(line) for line in GOLDEN.read_text().splitlines()]


@pytest.mark.parametrize("case", golden(), ids=lambda case: f"{case['case']}-{case['policy']}")
def test_reference_sequences(case: dict[str, Any]) -> None:
    cache = ExpertCache(case["n"], case["cap"], case["policy"], compat=True)
    for operation, key, hit in case["ops"]:
        if operation == "a":
            assert cache.access(key) == bool(hit)
        else:
            cache.prefetch_admit(key)
    stats = cache.stats
    assert cache.hot == case["hot_in_list_order"]
    assert [stats.hits, stats.misses, stats.evictions, stats.prefetch_hits] == [
        case[name] for name in ("hits", "misses", "evictions", "prefetch_hits")
    ]
    affinity = Scores(case["affinity"])
    victims = {"evict_base": cache.suggest_eviction()}
    for weight in (".3", ".5", "1"):
        victims[f"evict_w_{weight}"] = cache.suggest_eviction_with_affinity(affinity, float(weight))
    assert {name: -1 if key is None else key for name, key in victims.items()} == {
        name: case[name] for name in victims
    }
    assert cache.prefetch_by_affinity(affinity, 2) == case["prefetch_by_affinity_2"]
    assert cache.hot == case["hot_after"]


@pytest.mark.parametrize(
    ("policy", "accesses", "hot", "evictions"),
    [
        ("lru", [0, 1, 2, 0, 3], {0, 2, 3}, 1),
        ("lfu", [0, 0, 0, 1, 2, 2, 3], {0, 2, 3}, 1),
        ("adaptive", [*[0] * 9, *[1] * 3, 2, 3], {0, 1, 3}, 1),
        ("lru", [0, 1, 2, 3], {1, 2, 3}, 1),
    ],
)
def test_pinned_sequences(policy: str, accesses: list[int], hot: set[int], evictions: int) -> None:
    cache = ExpertCache(8, 3, policy, compat=True)
    for key in accesses:
        cache.access(key)
    assert set(cache.hot) == hot
    assert cache.stats.evictions == evictions


def test_never_more_than_its_capacity() -> None:
    cache = ExpertCache(8, 4, compat=True, policy="lru")
    for key in range(8):
        cache.access(key)
        assert cache.hot_count <= 4
    assert cache.hot_count == 4


@pytest.mark.parametrize("compat", [True, False])
def test_hits_and_their_rate(compat: bool) -> None:
    cache = ExpertCache(8, 3, "lru", compat=compat)
    assert cache.stats.hit_rate == 0.0
    assert [cache.access(3) for _ in range(2)] == [False, True]
    assert cache.stats.hit_rate == 0.5
    assert cache.suggest_eviction() is None
    cache.access(3)
    cache.access(3)
    assert cache.stats.hit_rate == 0.75
    cache.admit(3)
    assert cache.hot_count == 1
    cache.access(0)
    cache.access(1)
    assert cache.suggest_eviction() == 3
    assert cache.evict(3)
    assert not cache.evict(3)
    assert cache.stats.evictions == 0


@pytest.mark.parametrize("compat", [True, False])
def test_prefetches(compat: bool) -> None:
    cache = ExpertCache(8, 4, "lru", prefetch_threshold=0.15, compat=compat)
    assert [cache.should_prefetch(0, w) for w in (0.2, 0.16, 0.15, 0.1, 0.0)] == [True, True, *[False] * 3]
    cache.prefetch_admit(5)
    assert not cache.should_prefetch(5, 0.5)
    found = [cache.stats.prefetch_hits]
    for _ in range(2):
        cache.access(5)
        found.append(cache.stats.prefetch_hits)
    assert found == [0, 1, 1]


def test_affinity_joins_the_choice() -> None:
    def filled(policy: str, accesses: list[int]) -> ExpertCache:
        cache = ExpertCache(8, 3, policy, compat=True)
        for key in accesses:
            cache.access(key)
        return cache

    lru = filled("lru", [0, 1, 2])
    assert lru.suggest_eviction_with_affinity(Scores([1.0, 0.5, 0.1, 0, 0, 0, 0, 0]), 1.0) == 2
    only_first = Scores([1.0, *[0.0] * 7])
    assert [lru.suggest_eviction_with_affinity(only_first, w) for w in (0.0, 1.0, 0.5)] == [0, 1, 1]
    lfu = filled("lfu", [0, 1, 1, 1, 2, 2])
    assert lfu.suggest_eviction_with_affinity(only_first, 0.0) == lfu.suggest_eviction() == 0


def test_prefetch_by_affinity() -> None:
    cache = ExpertCache(8, 6, "lru", compat=True)
    assert cache.prefetch_by_affinity(Scores([0, 0, 0, 1.0, 0, 1.0, 0, 1.0]), 2) == [3, 5]
    cache = ExpertCache(8, 4, "lru", compat=True)
    for key in (1, 2, 3):
        cache.access(key)
    found = cache.prefetch_by_affinity(Scores([0, 0, 0, 1.0, 0, 0.5, 0, 0]), 2)
    assert 5 in found
    assert 3 not in found


def test_default_corrects_prefetches() -> None:
    """M9: the flag ends with an eviction; no prefetch without benefit; none evicts another of its call."""
    cache = ExpertCache(8, 1, "lru")
    cache.prefetch_admit(5)
    cache.access(1)
    cache.access(5)
    assert cache.stats.prefetch_hits == 0
    stale = ExpertCache(8, 1, "lru", compat=True)
    stale.prefetch_admit(5)
    stale.access(1)
    stale.access(5)
    stale.access(5)
    assert stale.stats.prefetch_hits == 1

    cache = ExpertCache(8, 4)
    assert cache.prefetch_by_affinity(Scores([0.05] * 8), 2) == []
    cache = ExpertCache(8, 2)
    cache.access(0)
    cache.access(1)
    assert cache.prefetch_by_affinity(Scores([0.9, 0.1, 0.5, 0.4, 0.3, 0.2, 0, 0]), 4) == [2]
    assert set(cache.hot) == {0, 2}
    assert ExpertCache(8, 2).prefetch_by_affinity(Scores([0.0] * 4 + [0.5] * 4), 4) == [4, 5]


def test_default_corrects_limits() -> None:
    """M9, M10: nothing in a cache of 0, errors out of range, keys by layer, pinned ones stay."""
    empty = ExpertCache(8, 0)
    assert [empty.access(1), empty.access(1), empty.hot_count] == [False, False, 0]
    reference = ExpertCache(8, 0, "lru", compat=True)
    reference.access(1)
    assert reference.hot_count == 1
    cache = ExpertCache(4, 2, layers=2)
    assert cache.key(1, 3) == 7
    for bad in (lambda: cache.access(8), lambda: cache.key(2, 0), lambda: cache.access_batch(np.array([-1]))):
        with pytest.raises(ValueError, match="of "):
            bad()
    cache.access(0)
    cache.pin(0)
    for key in (1, 2, 3, 4, 2, 1):
        cache.access(key)
    assert cache.is_hot(0)
    cache.pin(cache.hot[1])
    cache.access(6)
    assert not cache.is_hot(6)
    assert cache.suggest_eviction() is None
    with pytest.raises(ConfigError, match="lrfu"):
        ExpertCache(8, 2, "lrfu", compat=True)


@pytest.mark.parametrize("policy", POLICY_IDS)
@pytest.mark.parametrize("bypass", [False, True])
def test_a_batch_is_the_same_as_one_by_one(policy: str, bypass: bool) -> None:
    rng = random.Random(3)
    keys = [min(63, int(rng.expovariate(0.1))) for _ in range(2000)]
    one, batch = (ExpertCache(64, 16, policy, bypass=bypass) for _ in range(2))
    expected = [one.access(key) for key in keys]
    hits = batch.access_batch(np.array(keys, dtype=np.int32))
    assert hits.tolist() == expected
    assert batch.hot == one.hot
    assert 0 < batch.stats.evictions < batch.stats.misses


def test_time_of_an_access(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    lines = []
    skewed = np.minimum(63, rng.exponential(12.0, 20000)).astype(np.int32)
    for name, n, cap, keys in (
        ("cyclic 8, cap 4", 8, 4, (np.arange(20000) % 8).astype(np.int32)),
        ("uniform 64, cap 32", 64, 32, rng.integers(0, 64, 20000).astype(np.int32)),
        ("skewed 64, cap 32", 64, 32, skewed),
    ):
        hits = np.empty(len(keys), dtype=np.uint8)
        for policy in ("lru", "adaptive", DEFAULT_POLICY, "lfuda"):
            cache = ExpertCache(n, cap, policy)
            cache.access_batch(keys, hits)
            best = min(_seconds(cache, keys, hits) for _ in range(20))
            lines.append(f"{name} {policy}: {best / len(keys) * 1e9:.1f} ns")
            assert cache.stats.hits + cache.stats.misses == 21 * len(keys)
    with capsys.disabled():
        print("\naccess: " + "; ".join(lines))


def _seconds(cache: ExpertCache, keys: np.ndarray[Any, Any], hits: np.ndarray[Any, Any]) -> float:
    began = time.perf_counter()
    cache.access_batch(keys, hits)
    return time.perf_counter() - began
