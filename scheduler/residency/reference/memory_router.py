"""MemoryAwareRouter: selects experts of one MoE layer with a bonus for those in memory.

It says what to page in; it moves nothing and never changes residency by itself. No gating functions and no
mixing weights in here: those must come from the scores as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from ....shm.errors import ConfigError, InternalError
from ....workers.kernels.routing.memory_routing import (
    LEAST_WIDTH,
    SETTINGS,
    STATE_ROWS,
    WANTED,
    WORDS,
    route_residents,
)
from ..latency import RouterMetrics
from .affinity import AffinityConfig, ExpertAffinity
from .cache_mask import CacheMask
from .paging_request import PagingRequest

_FLOAT32 = np.dtype(np.float32)

Route = tuple[list[int], list[PagingRequest]]
BatchRoute = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRouterConfig:
    """How much being resident counts; the `with_` methods clamp, the fields do not."""

    num_experts: int = 8
    top_k: int = 2
    cache_bonus: float = 0.15
    """Added to a resident's score, as a share of the spread (highest - lowest) of the token's finite
    scores; in compat the number itself."""
    keep_top: int = 1
    """This number of the true best is always selected, before any bonus (not in compat)."""
    memory_aware: bool = True
    """False is plain top-k."""
    prefetch_threshold: float = 0.1
    """Only experts with at least this share of the layer's highest affinity are prefetched
    (compat: all)."""

    def with_cache_bonus(self, bonus: float) -> Self:
        """Return a copy with `bonus`, clamped to 0..1."""
        return replace(self, cache_bonus=min(max(bonus, 0.0), 1.0))

    def with_prefetch_threshold(self, threshold: float) -> Self:
        """Return a copy with `threshold`, clamped to 0..1."""
        return replace(self, prefetch_threshold=min(max(threshold, 0.0), 1.0))

    def validate(self) -> None:
        """Raise ConfigError naming the first field that is out of range."""
        if self.top_k <= 0:
            raise ConfigError(f"top_k {self.top_k}: at least 1")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k {self.top_k}: more than num_experts {self.num_experts}")
        for name, value in (("cache_bonus", self.cache_bonus), ("threshold", self.prefetch_threshold)):
            if not (value >= 0.0 and np.isfinite(value)):
                raise ConfigError(f"{name} {value}: 0 or more, and finite")
        if self.keep_top < 0:
            raise ConfigError(f"keep_top {self.keep_top}: 0 or more")


class MemoryAwareRouter:
    """Selection for one layer as a pure function of scores, residency and config (INV-6, docs/invariants.md).

    Default: scores that are not finite are never selected (fewer ids then), a wrong number of scores
    raises. `compat` replays ruvllm's (ADR-092): its bonus on raw scores, NaN as 0 when memory-aware, ids
    0..k-1 for a wrong number of scores, its scan for two maxima that can name expert 0 twice.
    `affinity` is shared by the routers of all layers and advanced by every token routed.
    """

    def __init__(
        self,
        config: MemoryRouterConfig,
        affinity: ExpertAffinity | None = None,
        *,
        layer: int = 0,
        max_tokens: int = 64,
        compat: bool = False,
    ) -> None:
        """Raise ConfigError for a config that does not validate or an affinity of another model."""
        config.validate()
        n = config.num_experts
        if affinity is None:
            shape = AffinityConfig(num_experts=n, num_layers=layer + 1)
            affinity = ExpertAffinity(shape, compat=compat)
        if affinity.config.num_experts != n or layer >= affinity.config.num_layers:
            raise ConfigError(
                f"affinity of {affinity.config.num_layers} layers of {affinity.config.num_experts} experts "
                f"for layer {layer} of {n} experts"
            )
        self.config = config
        self.affinity = affinity
        self.layer = layer
        self.compat = compat
        self.version = 0
        self.metrics = RouterMetrics()
        self._num_experts, self._max_tokens = n, max_tokens
        self._state = np.zeros((STATE_ROWS, max(n, LEAST_WIDTH)), np.int64)
        keep_top = 0 if compat else config.keep_top
        own = [config.cache_bonus, keep_top, config.memory_aware, compat]
        settings = np.concatenate((affinity.rates, np.array(own, np.float32)))
        self._state[SETTINGS].view(np.float32)[: len(settings)] = settings
        self.mask = CacheMask(n, self._state[WORDS].view(np.uint64))
        self._scores, self._totals = affinity.scores[layer], affinity.totals[layer]
        # Views of every length made once: making two costs a call as much as selecting for two tokens.
        selected = np.zeros((max_tokens, config.top_k), np.int32)
        self._selected = [selected[:tokens] for tokens in range(max_tokens + 1)]
        self._wanted = [self._state[WANTED, :number] for number in range(n + 1)]

    def route_batch(self, logits: npt.NDArray[np.float32]) -> BatchRoute:
        """Route the rows of `logits` (float32 (tokens, experts), C order), token by token.

        Returns two views, valid until the router routes again: selected, int32 (tokens, k), best first, -1
        where a token has fewer finite scores than k; and wanted, int64, the ids selected that are not
        resident, once each, in the order of first need. Residency stays as it is during the batch.
        Raises InternalError for another shape, type or order.
        """
        tokens, experts = logits.shape
        if experts != self._num_experts or tokens > self._max_tokens:
            raise InternalError(
                f"layer {self.layer}: {tokens} rows of {experts} scores for "
                f"<= {self._max_tokens} rows of {self._num_experts}"
            )
        if logits.dtype != _FLOAT32 or not logits.flags.c_contiguous:
            raise InternalError(f"layer {self.layer}: scores must be float32 in C order")
        selected = self._selected[tokens]
        hits, misses, wanted = route_residents(logits, self._scores, self._totals, self._state, selected)
        metrics = self.metrics
        metrics.hits += hits
        metrics.misses += misses
        return selected, self._wanted[wanted]

    def route(self, logits: npt.ArrayLike) -> Route:
        """Return the ids selected for one token, best first, and an urgent request per id not resident."""
        row = np.ascontiguousarray(logits, np.float32).reshape(1, -1)
        if self.compat and row.shape[1] != self.config.num_experts:
            return list(range(self.config.top_k)), []
        selected = [i for i in self.route_batch(row)[0][0].tolist() if i >= 0]
        return selected, self.generate_paging_requests(selected)

    def route_each(self, rows: Sequence[npt.ArrayLike]) -> list[Route]:
        """Return `route` of every row: requests are repeated per token, as ruvllm's batch does."""
        return [self.route(row) for row in rows]

    def apply_cache_bonus(
        self, logits: npt.NDArray[np.float32], out: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the scores of one token with the bonus of residents, whatever memory_aware says.

        Not finite becomes -inf (0 in compat). `out` may be `logits` itself.
        """
        scores = np.asarray(logits, np.float32)
        finite = np.isfinite(scores)
        lift = np.float32(self.config.cache_bonus)
        if not self.compat and finite.any():
            with np.errstate(over="ignore"):
                spread = scores[finite].max() - scores[finite].min()
            lift *= min(spread, np.finfo(np.float32).max)
        resident = self.mask.flags()
        adjusted = np.where(finite, scores, np.float32(0.0 if self.compat else -np.inf))
        if out is None:
            out = np.empty_like(adjusted)
        np.copyto(out, adjusted)
        np.add(adjusted, lift, out=out, where=finite & resident)
        return out

    def select_top_k(self, scores: npt.NDArray[np.float32]) -> list[int]:
        """Return the ids of the top_k highest scores, best first, ties to the lower id, never twice.

        Not finite is left out (in compat: taken last, lower ids first).
        """
        scores = np.asarray(scores, np.float32)
        finite = np.isfinite(scores)
        order = np.argsort(-np.where(finite, scores, np.float32(-np.inf)), kind="stable")
        chosen = order[: self.config.top_k]
        ids: list[int] = (chosen if self.compat else chosen[finite[chosen]]).tolist()
        return ids

    def generate_paging_requests(self, selected: Iterable[int]) -> list[PagingRequest]:
        """Return an urgent request per id that is not resident, once each (compat: each time).

        Give it the ids of one token, or what a batch wants.
        """
        ids = selected if self.compat else dict.fromkeys(selected)
        return [PagingRequest.urgent_in(i, self.layer) for i in ids if not self.mask.is_set(i)]

    def generate_prefetch_requests(self, budget: int) -> list[PagingRequest]:
        """Return at most `budget` requests for absent experts among the 2 * budget of highest affinity.

        An expert of zero affinity, or below the config's threshold, is left out (compat: never).
        """
        ids = self.affinity.top_k_by_affinity(2 * budget, self.layer)
        if not self.compat and ids:
            least = self.config.prefetch_threshold * self.affinity.score(ids[0], self.layer)
            scored = [(i, self.affinity.score(i, self.layer)) for i in ids]
            ids = [i for i, score in scored if score > 0.0 and score >= least]
        absent = [i for i in ids if not self.mask.is_set(i)]
        return [PagingRequest.prefetch(i, self.layer) for i in absent[:budget]]

    def update_cache_state(self, expert_ids: Iterable[int]) -> None:
        """Make `expert_ids` the residents; `version` rises."""
        self.mask.replace(expert_ids)
        self.version += 1

    def set_resident(self, expert_id: int, resident: bool) -> None:
        """Say whether one expert is resident; `version` rises."""
        self.mask.set(expert_id, resident)
        self.version += 1

    def is_resident(self, expert_id: int) -> bool:
        """Return whether the expert is resident, as far as the router was told."""
        return self.mask.is_set(expert_id)

    def resident_experts(self) -> list[int]:
        """Return the residents in ascending order."""
        return self.mask.ids()

    @property
    def hit_rate(self) -> float:
        """The share of all experts selected since `reset_metrics` that were resident, 0 if none."""
        return self.metrics.hit_rate

    def reset_metrics(self) -> None:
        """Set the metrics to zero; the affinity stays."""
        self.metrics.reset()
