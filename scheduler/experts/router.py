"""Routing: which experts a token goes to, with which weights. Exact top-k, or within a quality budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...shm.errors import InternalError
from ...workers.gating import SIGMOID
from ...workers.kernels.routing.top_k import route_resident, route_top_k
from ..arrays import zeros
from . import buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How scores become experts and weights, and what a budget may trade."""

    num_experts: int
    top_k: int
    gating: int
    """See `workers.gating`."""
    normalise: bool
    scale: float
    groups: int = 1
    """Experts come in groups of one size (DeepSeek-V2 and -V3); 1: no groups."""
    groups_used: int = 1
    """Only the best groups count."""
    window: int = 0
    """How many experts are ranked, at least top_k: those that may be traded for."""
    keep: int = 1
    """The best ranks, which are never traded."""
    bonus: float = 1.0
    """The most that a trade may cost, as a share of the spread of the token's scores."""
    share: float = 1 / 32
    """The most that the lost mass times the expert's weight may be, as a share of the credit."""
    limit: float = 256.0
    """The most credit saved up, in tokens' shares."""

    def __post_init__(self) -> None:
        """Raises InternalError for groups that the kernels cannot take, or with too few experts."""
        divided = self.groups > 0 and self.num_experts % self.groups == 0
        if not (divided and self.top_k <= self.num_experts // self.groups * self.groups_used):
            raise InternalError(
                f"{self.num_experts} experts in {self.groups} groups, {self.groups_used} of them used, cannot"
                f" give {self.top_k}"
            )
        if not 0 < self.groups_used <= self.groups:
            raise InternalError(f"{self.groups_used} of {self.groups} groups of experts cannot be used")


def probabilities(logits: npt.NDArray[np.float32], gating: int) -> npt.NDArray[np.float64]:
    """Return the gate's probabilities of rows of logits (tokens, experts).

    SOFTMAX_SELECTED: over all experts, as trades are counted; the same shares among those selected.
    """
    values = logits.astype(np.float64)
    p: npt.NDArray[np.float64]
    if gating == SIGMOID:
        p = 1.0 / (1.0 + np.exp(-values))
    else:
        p = np.exp(values - values.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
    return p


class Router:
    """Selects experts for a batch into buffers of its own; ties go to the lower expert id.

    selected: int32 (tokens, top_k) best first; weights: float32 of that shape; ranked: int32 (tokens,
    window), the best ones before any trade.
    """

    def __init__(self, config: RouterConfig, max_tokens: int) -> None:
        self._config = config
        window = min(max(config.window, config.top_k), config.num_experts)
        made = zeros(buffers.router(config.num_experts, config.top_k, window, max_tokens))
        self._work, self._present, self._best = made["work"], made["present"], made["best"]
        self.selected, self.weights, self.ranked = made["selected"], made["weights"], made["ranked"]

    def route(
        self,
        logits: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
        count: int,
        layer: int,
        *,
        runner_ups: bool = False,
    ) -> None:
        """Fill `selected` and `weights` for `count` rows of `logits` (tokens, >= experts).

        With runner_ups `ranked` is filled, too.

        `bias` (experts,) counts for the selection only. Raises InternalError naming the layer when a
        token has fewer finite scores than experts to select: the weights hold a NaN or infinity.
        """
        c = self._config
        bad = route_top_k(
            logits, bias, count, c.num_experts, c.gating, c.groups, c.groups_used, c.normalise,
            np.float32(c.scale), self._work, self.ranked if runner_ups else self._best,
            self.selected, self.weights,
        )  # fmt: skip
        if bad >= 0:
            raise InternalError(f"layer {layer}: the router's scores are not finite")

    def route_within(
        self,
        logits: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
        count: int,
        layer: int,
        streams: npt.NDArray[np.int32],
        epsilon: npt.NDArray[np.float64],
        resident: npt.NDArray[np.uint8],
        accounts: npt.NDArray[np.float64],
    ) -> None:
        """As `route`, trading experts for resident ones; see `kernels.routing.route_resident`."""
        c = self._config
        bad = route_resident(
            logits, bias, count, c.num_experts, c.gating, c.groups, c.groups_used, c.normalise,
            np.float32(c.scale), self._work, self.ranked, self.selected, self.weights, streams, epsilon,
            c.limit, c.keep, c.bonus, c.share, resident, self._present, accounts,
        )  # fmt: skip
        if bad >= 0:
            raise InternalError(f"layer {layer}: the router's scores are not finite")
