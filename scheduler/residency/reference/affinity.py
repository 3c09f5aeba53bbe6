"""ExpertAffinity: how active each expert of each layer has been, lately and in all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ....shm.errors import ConfigError
from ....workers.kernels.routing.activity import mark_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class AffinityConfig:
    """How activity rises and fades; the `with_` methods clamp, the fields do not."""

    num_experts: int = 8
    num_layers: int = 1
    decay: float = 0.99
    activation_boost: float = 1.0
    max_score: float = 1.0

    def with_decay(self, decay: float) -> Self:
        """Return a copy with `decay`, clamped to 0..1."""
        return replace(self, decay=min(max(decay, 0.0), 1.0))

    def with_activation_boost(self, boost: float) -> Self:
        """Return a copy with `boost`, at least 0."""
        return replace(self, activation_boost=max(boost, 0.0))

    def with_max_score(self, max_score: float) -> Self:
        """Return a copy with `max_score`, at least 0."""
        return replace(self, max_score=max(max_score, 0.0))


class ExpertAffinity:
    """Scores and lifetime totals per (layer, expert), advanced by every token.

    A token multiplies all scores of its layer by the decay and adds to those it activates
    (1 - decay) * boost, once each: an exponential moving average of how often an expert is used.
    `compat` adds the boost itself and counts an id named twice twice: with the default numbers that is
    recency alone. A score never rises without activation (INV-2, docs/invariants.md), whatever the mode.

    `scores`: float32, `totals`: int64, both (layers, experts); the arrays stay the same objects.
    """

    def __init__(self, config: AffinityConfig, *, compat: bool = False) -> None:
        """Raise ConfigError for a decay outside 0..1 or a boost or maximum below 0 (also NaN)."""
        if not 0.0 <= config.decay <= 1.0:
            raise ConfigError(f"affinity decay {config.decay}: 0 to 1")
        if not (config.activation_boost >= 0.0 and config.max_score >= 0.0):
            raise ConfigError("affinity activation_boost and max_score: 0 or more")
        self.config = config
        self.compat = compat
        self.scores = np.zeros((config.num_layers, config.num_experts), np.float32)
        self.totals = np.zeros((config.num_layers, config.num_experts), np.int64)
        decay = np.float32(config.decay)
        gain = np.float32(1.0) if compat else np.float32(1.0) - decay
        floor = 0.0 if compat else np.finfo(np.float32).tiny
        rates = [decay, gain * np.float32(config.activation_boost), config.max_score, compat, floor]
        self.rates = np.array(rates, np.float32)

    def update(self, expert_ids: Iterable[int], layer: int = 0) -> None:
        """Advance `layer` by a token that activated `expert_ids`; none is a pure decay."""
        inside = [i for i in expert_ids if 0 <= i < self.config.num_experts]
        self.update_batch(np.array([inside], np.int32), 1, layer)

    def update_batch(self, selected: npt.NDArray[np.int32], count: int, layer: int = 0) -> None:
        """Advance `layer` by the first `count` rows of `selected` (tokens, k), in order; -1 is nobody."""
        mark_tokens(self.scores, self.totals, layer, selected, count, self.rates)

    def score(self, expert_id: int, layer: int = 0) -> float:
        """Return the score, 0 for an id out of range."""
        return float(self.scores[layer, expert_id]) if 0 <= expert_id < self.config.num_experts else 0.0

    def activation_count(self, expert_id: int, layer: int = 0) -> int:
        """Return how often the expert was activated since `reset`, 0 for an id out of range."""
        return int(self.totals[layer, expert_id]) if 0 <= expert_id < self.config.num_experts else 0

    def top_k_by_affinity(self, k: int, layer: int = 0) -> list[int]:
        """Return the min(k, experts) ids of the highest scores, best first, ties to the lower id."""
        scores = self.scores[layer]
        order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
        ids: list[int] = order[: max(k, 0)].tolist()
        return ids

    def top_k_by_frequency(self, k: int, layer: int = 0) -> list[int]:
        """Return the min(k, experts) ids most often activated, best first, ties to the lower id."""
        ids: list[int] = np.argsort(-self.totals[layer], kind="stable")[: max(k, 0)].tolist()
        return ids

    def least_affinity(self, candidates: Iterable[int], layer: int = 0) -> int | None:
        """Return the candidate of the lowest score, ties to the lower id; None without candidates."""
        scored = [(self.score(i, layer), i) for i in candidates]
        return min(((s if np.isfinite(s) else -np.inf, i) for s, i in scored), default=(0.0, None))[1]

    def frequency_percentile(self, expert_id: int, layer: int = 0) -> float:
        """Return the share of experts activated less often, those as often counted half; 0.5 if none."""
        totals = self.totals[layer]
        if not len(totals):
            return 0.5
        own = self.activation_count(expert_id, layer)
        return float(((totals < own).sum() + 0.5 * (totals == own).sum()) / len(totals))

    def reset(self) -> None:
        """Forget all scores and totals."""
        self.scores[:] = 0
        self.totals[:] = 0

    def save(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the state, for `load`."""
        return {"scores": self.scores.copy(), "totals": self.totals.copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what `save` returned; raise ConfigError if it is of another shape or type."""
        for name, mine in (("scores", self.scores), ("totals", self.totals)):
            saved = state.get(name)
            if saved is None or saved.shape != mine.shape or saved.dtype != mine.dtype:
                raise ConfigError(f"saved affinity: {name} is not {mine.dtype} {mine.shape}")
        if not np.isfinite(state["scores"]).all() or (state["totals"] < 0).any():
            raise ConfigError("saved affinity: scores or totals out of range")
        self.scores[:] = state["scores"]
        self.totals[:] = state["totals"]
