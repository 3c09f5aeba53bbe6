"""A cache of expert ids filled access by access: ruvllm's `ExpertCache` (ADR-092), and what is right instead.

`compat=True` replays ruvllm's exactly: lists with swap-removal, ties to the first
listed, flags of prefetches that outlive an eviction, a cache of 0 that holds one. The default differs in
this: `DEFAULT_POLICY` ages what it counts; keys are (layer, expert); an eviction clears the flag of a
prefetch; pinned keys and those prefetched in the same call are never victims; a prefetch must have a score
above the threshold and displaces only what has less; a capacity of 0 holds nothing. In both an id out of
range is an error.

Not in here: bytes, slots and events of a batch, which the live engine has; whole traces
(`residency/replay/simulate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ....shm.errors import ConfigError
from ....workers.kernels.routing import eviction
from ..policies import DEFAULT_CAP, DEFAULT_DECAY, DEFAULT_POLICY, Policy

_SMALLEST_WEIGHT = 1e-6  # of an affinity that counts at all


class Affinity(Protocol):
    """How active each id was of late."""

    def score(self, expert: int, /) -> float:
        """Return the activity of an id, 0 to 1."""

    def top_k_by_affinity(self, k: int, /) -> list[int] | NDArray[np.int32]:
        """Return the `k` most active ids, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a cache has done so far."""

    hits: int
    misses: int
    evictions: int
    prefetch_hits: int

    @property
    def hit_rate(self) -> float:
        """Hits of all accesses, 0 if there were none."""
        return self.hits / max(1, self.hits + self.misses)


class _Hot(NamedTuple):
    """What is hot; `workers/kernels/routing/eviction.py` says what is in it."""

    listed: NDArray[np.int32]
    position: NDArray[np.int32]
    prefetched: NDArray[np.uint8]
    pinned: NDArray[np.uint8]
    totals: NDArray[np.int64]


class ExpertCache:
    """Up to `max_hot` of layers * num_experts keys; key = layer * num_experts + expert.

    `bypass` computes without admitting what is worth less than the victim. `decay` and `cap` as in `Policy`,
    except that every access is an event and `decay` is per access. Raises ConfigError for a value out of
    range.
    """

    def __init__(
        self,
        num_experts: int,
        max_hot: int = 4,
        policy: str = DEFAULT_POLICY,
        *,
        layers: int = 1,
        prefetch_threshold: float = 0.1,
        compat: bool = False,
        bypass: bool = False,
        decay: float = DEFAULT_DECAY / 6,
        cap: float = DEFAULT_CAP,
    ) -> None:
        if num_experts < 1 or layers < 1 or max_hot < 0:
            raise ConfigError(f"expert cache: {num_experts} experts, {layers} layers, {max_hot} hot")
        if compat and (policy not in ("lru", "lfu", "adaptive") or bypass):
            raise ConfigError(f"expert cache: ruvllm's has no policy {policy}{' with bypass' * bypass}")
        self.num_experts, self.layers, self.max_hot = num_experts, layers, max_hot
        self.prefetch_threshold, self.compat, self.bypass = prefetch_threshold, compat, bypass
        self._policy = Policy(policy, num_experts * layers, decay=decay, cap=cap)
        keys = num_experts * layers
        slots = max(1, max_hot) if compat else min(max_hot, keys)
        self._hot = _Hot(
            listed=np.zeros(slots, dtype=np.int32),
            position=np.full(keys, -1, dtype=np.int32),
            prefetched=np.zeros(keys, dtype=np.uint8),
            pinned=np.zeros(keys, dtype=np.uint8),
            totals=np.zeros(5, dtype=np.int64),
        )

    def key(self, layer: int, expert: int) -> int:
        """Return the key of an expert; raises ValueError if there is none such."""
        if not (0 <= layer < self.layers and 0 <= expert < self.num_experts):
            raise ValueError(f"expert {expert} of {self.num_experts}, layer {layer} of {self.layers}")
        return layer * self.num_experts + expert

    @property
    def hot(self) -> list[int]:
        """The hot keys in list order: insertion order, but a removal moves the last one into the gap."""
        return [int(key) for key in self._hot.listed[: self.hot_count]]

    @property
    def hot_count(self) -> int:
        """How many keys are hot."""
        return int(self._hot.totals[eviction.SIZE])

    def is_hot(self, key: int) -> bool:
        """Whether `key` is hot."""
        return bool(self._hot.position[self._checked(key)] >= 0)

    @property
    def stats(self) -> CacheStats:
        """Totals since the cache was made."""
        hits, misses, evictions, prefetch_hits, _ = self._hot.totals.tolist()
        return CacheStats(hits=hits, misses=misses, evictions=evictions, prefetch_hits=prefetch_hits)

    def access(self, key: int) -> bool:
        """Use `key`; return whether it was hot. A miss admits it."""
        return bool(self.access_batch(np.array([self._checked(key)], dtype=np.int32))[0])

    def access_batch(
        self, keys: NDArray[np.int32], hits: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Use `keys`, int32 (n,), one after the other; return, in `hits` if given, 1 for each that was hot.

        Raises ValueError for a key out of range, before any is used.
        """
        keys = np.ascontiguousarray(keys, dtype=np.int32)
        hits = np.empty(len(keys), dtype=np.uint8) if hits is None else hits
        if len(hits) < len(keys):
            raise ValueError(f"{len(keys)} keys, room for {len(hits)} answers")
        policy = self._policy
        bad = eviction.access_batch(
            policy.policy_id, self.compat, self.bypass, keys, hits, *policy.arrays, policy.span, *self._hot
        )
        if bad >= 0:
            raise ValueError(f"key {keys[bad]} of {policy.num_keys}")
        return hits[: len(keys)]

    def admit(self, key: int) -> bool:
        """Make `key` hot without counting a use; return whether it is hot now."""
        policy = self._policy
        key = self._checked(key)
        return bool(
            eviction.cache_admit(policy.policy_id, self.compat, key, *policy.arrays, policy.span, *self._hot)
        )

    def evict(self, key: int) -> bool:
        """Remove `key`; return whether it was hot. Not counted as an eviction."""
        was_hot = self.is_hot(key)
        if was_hot:
            policy, hot = self._policy, self._hot
            arrays = (*policy.arrays, policy.span, hot.listed, hot.position, hot.prefetched, hot.totals)
            eviction.cache_evict(policy.policy_id, self.compat, key, *arrays)
        return was_hot

    def pin(self, key: int) -> None:
        """Keep `key` from being a victim; `evict` removes it all the same."""
        self._hot.pinned[self._checked(key)] = 1

    def unpin(self, key: int) -> None:
        """Let `key` be a victim again."""
        self._hot.pinned[self._checked(key)] = 0

    def should_prefetch(self, key: int, weight: float) -> bool:
        """Whether `weight` is above the threshold and `key` is not hot."""
        return weight > self.prefetch_threshold and not self.is_hot(key)

    def prefetch_admit(self, key: int) -> bool:
        """Make `key` hot; its next access counts as a hit of a prefetch. Returns whether it is hot now."""
        was_hot = self.is_hot(key)
        hot = self.admit(key)
        if self.compat or (hot and not was_hot):
            self._hot.prefetched[key] = 1
        return hot

    def suggest_eviction(self) -> int | None:
        """Return the victim of the next admission; None unless full, or if all are pinned."""
        if self.hot_count < self.max_hot:
            return None
        policy, hot = self._policy, self._hot
        arrays = (policy.arrays.table, hot.listed, hot.pinned, hot.totals)
        key = int(eviction.cache_coldest(policy.policy_id, self.compat, *arrays))
        return None if key < 0 else key

    def suggest_eviction_with_affinity(self, affinity: Affinity, weight: float) -> int | None:
        """Return the victim when activity counts `weight` (0 to 1) and the policy the rest; None unless full.

        Badness is (1 - w) * (1 - rank) + w * (1 - affinity), where rank is the policy's priority scaled to
        0..1 among the hot ones, 0.5 if all are equal; the worst goes, ties to the first listed (reference
        1.6).
        """
        w = min(max(weight, 0.0), 1.0)
        keys = self._evictable()
        if w < _SMALLEST_WEIGHT or self.hot_count < self.max_hot or not keys:
            return self.suggest_eviction()
        return self._worst(keys, affinity, w)

    def prefetch_by_affinity(self, affinity: Affinity, budget: int) -> list[int]:
        """Prefetch up to `budget` of the most active keys that are not hot; return them.

        When full, the victim is that of weight 0.5. By default a prefetch needs an affinity above the
        threshold and above that of its victim, and nothing prefetched in this call is a victim of it.
        """
        admitted: list[int] = []
        pinned_now: list[int] = []
        for key in map(int, affinity.top_k_by_affinity(self._policy.num_keys)):
            if len(admitted) >= budget:
                break
            if self.is_hot(key):
                continue
            if not self.compat and not affinity.score(key) > self.prefetch_threshold:
                break
            if self.hot_count >= self.max_hot:
                keys = self._evictable()
                if not self.compat:
                    keys = [other for other in keys if affinity.score(other) < affinity.score(key)]
                    if not keys:
                        break
                if keys:
                    self.evict(self._worst(keys, affinity, 0.5))
                    self._hot.totals[eviction.EVICTIONS] += 1
            if self.prefetch_admit(key):
                admitted.append(key)
                if not self.compat and not self._hot.pinned[key]:
                    self.pin(key)
                    pinned_now.append(key)
        for key in pinned_now:
            self.unpin(key)
        return admitted

    def _evictable(self) -> list[int]:
        return [key for key in self.hot if not self._hot.pinned[key]]

    def _worst(self, keys: list[int], affinity: Affinity, weight: float) -> int:
        """Return the key of greatest badness; float32 as ruvllm computes it."""
        values = self._priorities(keys)
        low, high = values.min(), values.max()
        one, w = np.float32(1.0), np.float32(weight)
        rank = np.full(len(keys), 0.5, dtype=np.float32)
        if high > low:
            rank = one - (values - low).astype(np.float32) / np.float32(high - low)
        activity = np.array([affinity.score(key) for key in keys], dtype=np.float32)
        return keys[int(np.argmax((one - w) * rank + w * (one - activity)))]

    def _priorities(self, keys: list[int]) -> NDArray[np.float64]:
        """Return what the policy ranks `keys` by."""
        table = self._policy.arrays.table
        if self._policy.policy_id == eviction.ADAPTIVE:
            counts = table[eviction.COUNT, keys]
            if counts.min() > 0 and counts.max() >= 3 * counts.min():
                return counts
        return table[eviction.PRIORITY, keys]

    def _checked(self, key: int) -> int:
        if not 0 <= key < self._policy.num_keys:
            raise ValueError(f"key {key} of {self._policy.num_keys}")
        return key
