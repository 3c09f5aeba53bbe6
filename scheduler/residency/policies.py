"""Which expert leaves memory first: one policy for the live runtime, the `ExpertCache` and the simulator.

`DEFAULT_POLICY` is LRFU: every use adds to a score that halves every 1/decay passes through the layers (10
with the default). Misses in decode on a Qwen3-30B-A3B trace (48 layers of 128 experts, 6 used; 156 tokens),
event-atomic, with 12.5, 25 and 50 % of the experts:

                one global pool          a cap per layer
    LRU       15525   6505   1363      14259   6641   1576
    LFU       14749   6596   1363      12986   6084   1558
    LFUDA     13803   5927   1276      13358   6111   1511
    LRFU      13835   5888   1278      12925   6057   1503
    Belady     7235   2469   1071       9040   3525   1143

In a pool LFUDA is as good, but it falls behind LRU at 6 %, where LRFU gains 4.7 points. A slower decay (0.06)
is as good on the whole trace and worse in its first 30 tokens. Uses by several tokens in one event (a
prompt) count as their square root: counted in full they fill the memory with the prompt's experts (LRFU 6100
at 25 %), counted once, nothing tells at 50 % what to keep (1363 misses for all). Admission bypass gains
nothing here and loses 25 points on cyclic use, so it is off.

Not in here: budgets and who may be evicted at all, which the caller says by `candidates`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...shm.errors import ConfigError
from ...workers.kernels.routing import eviction

POLICY_IDS: Final = {
    "lru": eviction.LRU,
    "lfu": eviction.LFU,
    "adaptive": eviction.ADAPTIVE,
    "lrfu": eviction.LRFU,
    "lfuda": eviction.LFUDA,
}
DEFAULT_POLICY: Final = "lrfu"
DEFAULT_DECAY = 0.1
DEFAULT_CAP = 12.0


class PolicyArrays(NamedTuple):
    """The state of a policy; `workers/kernels/routing/eviction.py` says what is where."""

    scalars: NDArray[np.float64]
    table: NDArray[np.float64]
    resident: NDArray[np.uint8]

    @classmethod
    def empty(cls, num_keys: int, groups: int, decay: float, cap: float) -> PolicyArrays:
        """Return the state of a policy that has seen nothing; `decay` per event."""
        scalars = np.zeros(eviction.AGE + groups)
        scalars[eviction.UNIT] = 1.0
        scalars[eviction.GROWTH], scalars[eviction.CAP] = 2.0**decay, cap
        return cls(scalars, np.zeros((3, num_keys)), np.zeros(num_keys, dtype=np.uint8))


class Policy:
    """Priorities of `num_keys` experts, key = layer * experts + expert.

    `layers` events make one pass (a token); `decay` is LRFU's per pass: a score is worth half after 1/decay
    passes. `cap` bounds the count in LFUDA's key (age + count). `span` keys share one age, all of them by
    default. With `bypass` the caller asks `prefers` before it admits. Raises ConfigError for an unknown name
    or a value out of range. One thread at a time.
    """

    def __init__(
        self,
        name: str,
        num_keys: int,
        *,
        layers: int = 1,
        decay: float = DEFAULT_DECAY,
        cap: float = DEFAULT_CAP,
        span: int | None = None,
        bypass: bool = False,
    ) -> None:
        if name not in POLICY_IDS:
            raise ConfigError(f"policy: expected one of {', '.join(POLICY_IDS)}, found {name}")
        span = num_keys if span is None else span
        if num_keys < 1 or span < 1 or num_keys % span or layers < 1:
            raise ConfigError(f"policy {name}: {num_keys} keys in groups of {span}, {layers} layers")
        if not (0.0 <= decay <= 64.0 and 1.0 <= cap <= 1e9):
            raise ConfigError(f"policy {name}: decay {decay:g} (0 to 64), cap {cap:g} (1 to 1e9)")
        self.name, self.num_keys, self.span, self.bypass = name, num_keys, span, bypass
        self.policy_id = POLICY_IDS[name]
        self.arrays = PolicyArrays.empty(num_keys, num_keys // span, decay / layers, cap)
        self._once = np.ones(num_keys, dtype=np.float32)

    def touch(self, keys: NDArray[np.int32], tokens: NDArray[np.float32] | None = None) -> None:
        """Count one event in which `keys`, int32 (n,) and distinct, are used, each by `tokens` of its tokens.

        The clock advances once. Raises ValueError for a key out of range or a number of tokens below 1.
        """
        # Another dtype would compile another kernel in the middle of a step.
        keys = np.ascontiguousarray(keys, dtype=np.int32)
        tokens = self._once[: len(keys)] if tokens is None else np.ascontiguousarray(tokens, np.float32)
        if len(tokens) != len(keys):
            raise ValueError(f"{len(keys)} keys with {len(tokens)} numbers of tokens")
        bad = int(eviction.touch(self.policy_id, keys, tokens, *self.arrays, self.span))
        if bad >= 0:
            raise ValueError(f"key {keys[bad]} of {self.num_keys} used by {tokens[bad]:g} tokens")

    def victim(self, candidates: NDArray[np.uint8] | NDArray[np.bool_]) -> int:
        """Return the key of lowest priority where `candidates` (num_keys,) is set; -1 if it is nowhere.

        Ties go to the least recently used, then to the lower key.
        """
        if candidates.shape != (self.num_keys,):
            raise ValueError(f"candidates of shape {candidates.shape} for {self.num_keys} keys")
        return int(eviction.find_victim(self.policy_id, candidates.view(np.uint8), self.arrays.table))

    def prefers(self, key: int, victim: int) -> bool:
        """Whether `key` is worth at least as much as `victim`: what a caller asks that may bypass."""
        self._check(key)
        self._check(victim)
        priority = self.arrays.table[eviction.PRIORITY]
        return bool(priority[key] >= priority[victim])

    def evicted(self, key: int) -> None:
        """Note that `key` left memory; LFUDA halves its count and takes its priority as the age."""
        self._check(key)
        eviction.note_evicted(self.policy_id, key, *self.arrays, self.span)

    def admitted(self, key: int) -> None:
        """Note that `key` is in memory; a prefetched one starts as if used now, without counting a use."""
        self._check(key)
        eviction.note_admitted(self.policy_id, key, *self.arrays, self.span)

    def hottest(self, limit: int) -> NDArray[np.int64]:
        """Return up to `limit` keys that were ever used, highest priority first: what a cold start reads."""
        last, count, priority = self.arrays.table
        order = np.lexsort((np.arange(self.num_keys), -last, -priority))
        found: NDArray[np.int64] = order[count[order] > 0.0][:limit].astype(np.int64)
        return found

    def save(self) -> dict[str, NDArray[np.generic]]:
        """Return copies of all arrays that `load` takes."""
        return {name: array.copy() for name, array in self.arrays._asdict().items()}

    def load(self, saved: dict[str, NDArray[np.generic]]) -> None:
        """Go on from what `save` returned; ValueError if an array is missing or of another shape."""
        for name, mine in self.arrays._asdict().items():
            found = saved.get(name)
            if found is None or found.shape != mine.shape or found.dtype != mine.dtype:
                what = "nothing" if found is None else f"{found.dtype} {found.shape}"
                raise ValueError(f"saved {name}: expected {mine.dtype} {mine.shape}, found {what}")
        growth, cap = self.arrays.scalars[[eviction.GROWTH, eviction.CAP]]
        for name, mine in self.arrays._asdict().items():
            mine[:] = saved[name]
        self.arrays.scalars[[eviction.GROWTH, eviction.CAP]] = growth, cap

    def _check(self, key: int) -> None:
        if not 0 <= key < self.num_keys:
            raise ValueError(f"key {key} of {self.num_keys}")


def new_policy(num_experts: int, layers: int) -> Policy:
    """Return the default policy of a model with `num_experts` routed experts in `layers` layers."""
    return Policy(DEFAULT_POLICY, num_experts, layers=layers)


def with_floor(
    resident: NDArray[np.uint8],
    layer_counts: NDArray[np.int64],
    floor: int,
    layer_of_key: NDArray[np.int32],
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Return the residents (keys,) whose layer holds more than `floor` experts, in `out` if given."""
    out = np.empty_like(resident) if out is None else out
    eviction.with_floor(resident, layer_counts, floor, layer_of_key, out)
    return out
