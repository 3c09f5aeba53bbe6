"""Policies against naive twins, and the parts that a live engine leans on."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest

from sterna.scheduler.residency.policies import POLICY_IDS, Policy, with_floor
from sterna.shm.errors import ConfigError

KEYS = 40


class Naive:
    """The rules as they are told, with dictionaries and scores that really decay."""

    def __init__(self, name: str, decay: float, cap: float) -> None:
        self.name, self.decay, self.cap = name, decay, cap
        self.clock, self.age = 0, 0.0
        self.last = dict.fromkeys(range(KEYS), 0)
        self.count = dict.fromkeys(range(KEYS), 0.0)
        self.score = dict.fromkeys(range(KEYS), 0.0)  # LRFU: as of `last`; LFUDA: the key

    def touch(self, keys: list[int], tokens: list[int]) -> None:
        self.clock += 1
        for key, n in zip(keys, tokens, strict=True):
            weight = math.sqrt(n) if self.name in ("lrfu", "lfuda") else 1.0
            if self.name == "lrfu":
                self.score[key] = self.now(key) + weight
            self.count[key] += weight
            self.last[key] = self.clock
            if self.name == "lfuda":
                self.score[key] = self.age + min(max(self.count[key], 1), self.cap)

    def now(self, key: int) -> float:
        return self.score[key] * 0.5 ** (self.decay * (self.clock - self.last[key]))

    def worth(self, key: int, among: list[int]) -> float:
        if self.name == "lfu":
            return self.count[key]
        if self.name == "lfuda":
            return self.score[key]
        if self.name == "lrfu":
            return self.now(key)
        counts = [self.count[other] for other in among]
        by_count = self.name == "adaptive" and min(counts) > 0 and max(counts) >= 3 * min(counts)
        return self.count[key] if by_count else self.last[key]

    def victim(self, among: list[int]) -> int:
        return min(among, key=lambda key: (round(self.worth(key, among), 9), self.last[key], key))

    def evicted(self, key: int) -> None:
        if self.name == "lfuda":
            self.age = max(self.age, self.score[key])
            self.count[key] = math.floor(self.count[key] / 2)

    def admitted(self, key: int) -> None:
        if self.name == "lfuda":
            self.score[key] = self.age + min(max(self.count[key], 1), self.cap)


@pytest.mark.parametrize("name", POLICY_IDS)
def test_victims_are_those_of_the_naive_rules(name: str) -> None:
    rng = random.Random(5)
    policy, naive = Policy(name, KEYS, layers=3, decay=0.3, cap=6), Naive(name, 0.1, 6)
    resident: list[int] = []
    evictions = 0
    for _ in range(600):
        keys = sorted({min(KEYS - 1, int(rng.expovariate(0.12))) for _ in range(4)})
        tokens = [rng.choice((1, 1, 4, 9)) for _ in keys]
        policy.touch(np.array(keys, dtype=np.int32), np.array(tokens, dtype=np.float32))
        naive.touch(keys, tokens)
        for key in (key for key in keys if key not in resident):
            while len(resident) >= 12:
                among = [other for other in resident if other not in keys]
                candidates = np.zeros(KEYS, dtype=np.uint8)
                candidates[among] = 1
                out = policy.victim(candidates)
                assert out == naive.victim(among)
                policy.evicted(out)
                naive.evicted(out)
                resident.remove(out)
                evictions += 1
            policy.admitted(key)
            naive.admitted(key)
            resident.append(key)
        assert sorted(resident) == np.flatnonzero(policy.arrays.resident).tolist()
    assert evictions > 200


def test_scores_stay_in_order_when_the_unit_starts_again() -> None:
    """A decay of 64 per event passes the largest unit after 8 events: order by the last use."""
    policy = Policy("lrfu", 8, decay=64.0)
    every = np.ones(8, dtype=np.uint8)
    for event in range(100):
        policy.touch(np.array([event % 8], dtype=np.int32))
        assert np.isfinite(policy.arrays.table).all()
        if event >= 8:
            assert policy.victim(every) == (event + 1) % 8
    slow = Policy("lrfu", 8, decay=1.0)
    slow.touch(np.array([1, 1 + 1], dtype=np.int32))
    slow.touch(np.array([1], dtype=np.int32))
    for _ in range(510):
        slow.touch(np.array([3], dtype=np.int32))
    some = np.array([0, 1, 1, 0, 0, 0, 0, 0], dtype=np.uint8)
    before = slow.victim(some)
    slow.touch(np.array([3], dtype=np.int32))
    assert slow.arrays.scalars[1] == 2.0
    assert slow.victim(some) == before == 2


def test_ties_and_no_candidate() -> None:
    policy = Policy("lfu", 8)
    none = np.zeros(8, dtype=np.uint8)
    assert policy.victim(none) == -1
    for keys in ([5, 6], [2, 3]):
        policy.touch(np.array(keys, dtype=np.int32))
    some = none.copy()
    some[[2, 3, 5, 6]] = 1
    assert policy.victim(some) == 5  # equal counts: the least recently used, then the lower key
    assert policy.victim(some.astype(bool)) == 5


def test_a_prefetched_expert_is_not_the_next_victim() -> None:
    """M8: what comes in without a use starts as if used now."""
    for name in ("lru", "lrfu", "lfuda"):
        policy = Policy(name, 8)
        for _ in range(3):
            policy.touch(np.array([0, 1], dtype=np.int32))
        for _ in range(40):
            policy.touch(np.array([2], dtype=np.int32))
        for key in (0, 1, 2):
            policy.admitted(key)
        policy.evicted(0)
        policy.admitted(7)
        candidates = np.zeros(8, dtype=np.uint8)
        candidates[[1, 7]] = 1
        assert policy.victim(candidates) == 1, name
        assert policy.arrays.table[1, 7] == 0.0


def test_saved_state_goes_on() -> None:
    rng = np.random.default_rng(2)
    one = Policy("lfuda", KEYS, span=10)
    for _ in range(50):
        one.touch(rng.choice(KEYS, 4, replace=False).astype(np.int32))
    one.evicted(11)
    other = Policy("lfuda", KEYS, span=10, cap=3)
    other.load(one.save())
    every = np.ones(KEYS, dtype=np.uint8)
    assert other.victim(every) == one.victim(every)
    assert other.hottest(5).tolist() == one.hottest(5).tolist()
    assert other.arrays.scalars[3] == 3.0  # knobs are the new policy's
    assert Policy("lru", KEYS).hottest(5).tolist() == []
    with pytest.raises(ValueError, match="saved table: expected float64"):
        Policy("lfuda", KEYS + 10, span=10).load({**one.save(), "scalars": np.zeros(9)})


def test_bypass_asks_who_is_worth_more() -> None:
    policy = Policy("lrfu", 8, bypass=True)
    for _ in range(3):
        policy.touch(np.array([1], dtype=np.int32))
    policy.touch(np.array([2], dtype=np.int32))
    assert not policy.prefers(2, 1)
    assert policy.prefers(1, 2)


def test_the_floor_of_a_layer_is_kept() -> None:
    layer_of_key = np.repeat(np.arange(3, dtype=np.int32), 4)
    resident = np.array([1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0], dtype=np.uint8)
    counts = np.array([2, 3, 0])
    assert np.flatnonzero(with_floor(resident, counts, 2, layer_of_key)).tolist() == [4, 5, 6]
    assert np.flatnonzero(with_floor(resident, counts, 3, layer_of_key)).tolist() == []
    assert np.flatnonzero(with_floor(resident, counts, 0, layer_of_key)).tolist() == [0, 1, 4, 5, 6]


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of lru"):
        Policy("mru", 8)
    with pytest.raises(ConfigError, match="8 keys in groups of 3"):
        Policy("lru", 8, span=3)
    policy = Policy("lru", 8)
    for keys, tokens in (([8], None), ([-1], None), ([1], [0.0]), ([1], [1.0, 1.0])):
        with pytest.raises(ValueError, match="key"):
            policy.touch(
                np.array(keys, dtype=np.int32),
                None if tokens is None else np.array(tokens, dtype=np.float32),
            )
    assert policy.arrays.scalars[0] == 0.0
    for call in (policy.evicted, policy.admitted):
        with pytest.raises(ValueError, match="key 8 of 8"):
            call(8)


def test_times(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for name in POLICY_IDS:
        policy = Policy(name, 3000, layers=46)
        for key in range(0, 3000, 6):
            policy.touch(np.arange(key, key + 6, dtype=np.int32))
        candidates = (rng.random(3000) < 0.5).astype(np.uint8)
        keys = rng.choice(3000, 6, replace=False).astype(np.int32)
        took = {"victim": math.inf, "touch": math.inf}
        for _ in range(200):
            began = time.perf_counter()
            found = policy.victim(candidates)
            middle = time.perf_counter()
            policy.touch(keys)
            took["touch"] = min(took["touch"], time.perf_counter() - middle)
            took["victim"] = min(took["victim"], middle - began)
        assert candidates[found]
        lines.append(f"{name} " + ", ".join(f"{what} {s * 1e6:.1f} us" for what, s in took.items()))
    with capsys.disabled():
        print("\n3000 keys: " + "; ".join(lines))
