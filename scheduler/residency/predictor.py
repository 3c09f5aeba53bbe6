"""ExpertPredictor: which experts the next layer will select, from what this one did and from habit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ...shm.errors import ConfigError
from ...workers.kernels.routing.prediction import observe_transitions, predict_next, score_next
from ..arrays import zeros
from . import buffers

Ids = npt.NDArray[np.int32]


class ExpertPredictor:
    """Counts of transitions into each layer, and how lately each expert was selected there.

    `layer` is always the layer predicted. `previous` is what led to it: for the same token the selection of
    the layer before; for the first MoE layer what the caller has, e.g. its own selection for the token
    before. Arrays are int32 (tokens, k), or (k,) for one token, -1 for none.
    """

    def __init__(
        self,
        *,
        num_layers: int = 1,
        num_experts: int = 64,
        recency_decay: float = 0.95,
        recency_weight: float = 0.3,
        row_cap: int = 4096,
    ) -> None:
        """Raise ConfigError for a decay outside 0..1, a weight below 0 or a cap below 2."""
        if not 0.0 <= recency_decay <= 1.0:
            raise ConfigError(f"recency_decay {recency_decay}: 0 to 1")
        if not 0.0 <= recency_weight < np.inf:
            raise ConfigError(f"recency_weight {recency_weight}: 0 or more")
        if not 2 <= row_cap <= 1 << 30:
            raise ConfigError(f"row_cap {row_cap}: 2 to 2**30")
        self.num_experts = num_experts
        made = zeros(buffers.predictor(num_layers, num_experts))
        self._table, self._rows, self._recency = made["table"], made["rows"], made["recency"]
        self._scratch, self._nobody, self._none = made["scratch"], made["nobody"], made["none"]
        self._decay, self._weight = np.float32(recency_decay), np.float32(recency_weight)
        self._cap = row_cap

    @classmethod
    def from_history(cls, history: Sequence[Iterable[int]], num_experts: int = 64) -> Self:
        """Return a predictor of one layer that has seen consecutive selections, as ruvllm's (ADR-092) has."""
        predictor = cls(num_experts=num_experts)
        for previous, selected in pairwise(history):
            predictor.observe(0, np.array([*previous], np.int32), np.array([*selected], np.int32))
        return predictor

    def observe(self, layer: int, previous: Ids, selected: Ids) -> None:
        """Learn that `selected` followed `previous` at `layer`, token by token."""
        observe_transitions(
            self._table, self._rows, self._recency, layer, _rows(previous), _rows(selected), self._decay,
            self._cap,
        )  # fmt: skip

    def predict(
        self, layer: int, current: Ids, k: int, exclude: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.int32]:
        """Return at most `k` ids of `layer` that `current` makes likely, best first.

        exclude: bool (experts,), e.g. the residents; so are experts never seen at that layer.
        """
        ids = np.empty(min(k, self.num_experts), np.int32)
        excluded = self._nobody if exclude is None else exclude
        found = predict_next(
            self._table, self._rows, self._recency, layer, _rows(current), self._weight, excluded,
            self._scratch, ids,
        )  # fmt: skip
        return ids[:found]

    def scores(self, layer: int, current: Ids) -> npt.NDArray[np.float64]:
        """Return for each expert of `layer` how likely `current` makes it, -inf for one never seen there.

        A mean of log-probabilities plus the weighted recency; valid until the next call.
        """
        predict_next(
            self._table, self._rows, self._recency, layer, _rows(current), self._weight, self._nobody,
            self._scratch, self._none,
        )  # fmt: skip
        scores: npt.NDArray[np.float64] = self._scratch[0]
        return scores

    def predict_next(self, current: Sequence[int], k: int, layer: int = 0) -> list[int]:
        """Return `k` ids by ruvllm's rule: the sum of `probability` over `current`, none of those."""
        scores = np.zeros(self.num_experts, np.float64)
        score_next(self._table, self._rows, layer, np.array([current], np.int32), scores)
        scores[[i for i in current if 0 <= i < self.num_experts]] = 0
        ids: list[int] = np.argsort(-scores, kind="stable")[:k].tolist()
        return ids

    def probability(self, before: int, after: int, layer: int = 0) -> float:
        """Return (count + 1) / (row + experts) of a transition, 0 if an id is out of range."""
        n = self.num_experts
        if not (0 <= before < n and 0 <= after < n):
            return 0.0
        return (int(self._table[layer, before, after]) + 1) / (int(self._rows[layer, before]) + n)

    def observations(self, layer: int = 0) -> int:
        """Return how many transitions the table of `layer` holds (halved rows count what is left)."""
        return int(self._rows[layer].sum())

    def save(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the state, for `load`."""
        return {"table": self._table.copy(), "recency": self._recency.copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what `save` returned; raise ConfigError if it is of another shape or type."""
        for name, mine in (("table", self._table), ("recency", self._recency)):
            saved = state.get(name)
            if saved is None or saved.shape != mine.shape or saved.dtype != mine.dtype:
                raise ConfigError(f"saved predictor: {name} is not {mine.dtype} {mine.shape}")
        table, recency = state["table"], state["recency"]
        sums = table.sum(axis=2, dtype=np.int64)
        if (table < 0).any() or (sums >= self._cap).any() or not ((recency >= 0) & (recency <= 1)).all():
            raise ConfigError("saved predictor: table or recency out of range")
        self._table[:], self._recency[:], self._rows[:] = table, recency, sums


def _rows(ids: Ids) -> Ids:
    """Return int32 (tokens, k), whatever the caller's dimensions."""
    return np.atleast_2d(np.ascontiguousarray(ids, np.int32))
