"""MoeBatchScheduler: which experts a batch needs, and for which tokens, without allocating."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...workers.kernels.routing.top_k import group_by_expert
from ..arrays import zeros
from . import buffers


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """All (token, rank) pairs of a batch, sorted by expert.

    Views: valid until the next `schedule`.
    """

    ends: npt.NDArray[np.int32]
    """Pairs of expert e are ends[e]:ends[e + 1] of `tokens` and `ranks`."""
    tokens: npt.NDArray[np.int32]
    """int32 (pairs,); an expert's tokens are in input order."""
    ranks: npt.NDArray[np.int32]
    """int32 (pairs,)."""
    experts: npt.NDArray[np.intp]
    """The experts that have any pair, ascending."""


class MoeBatchScheduler:
    """Counting sort of routed tokens by expert, on buffers allocated once."""

    def __init__(self, num_experts: int, top_k: int, max_tokens: int) -> None:
        made = zeros(buffers.groups(num_experts, top_k, max_tokens))
        self._ends, self._tokens, self._ranks = made["ends"], made["tokens"], made["ranks"]

    def schedule(self, selected: npt.NDArray[np.int32], count: int) -> ExpertGroups:
        """Group the first `count` rows of `selected` (int32 (tokens, top_k)) by expert."""
        group_by_expert(selected, count, self._ends, self._tokens, self._ranks)
        pairs = count * selected.shape[1]
        experts = np.flatnonzero(self._ends[1:] > self._ends[:-1])
        return ExpertGroups(self._ends, self._tokens[:pairs], self._ranks[:pairs], experts)
