"""Routing: which experts a token goes to, with which weights. Plain top-k, deterministic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..shm.errors import InternalError
from ..workers.kernels.routing import route_top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How scores become experts and weights (spec section 4.1, F2 and F3)."""

    num_experts: int
    top_k: int
    gating: int
    normalise: bool
    scale: float


class Router:
    """Selects experts for a batch into buffers of its own; ties go to the lower expert id."""

    def __init__(self, config: RouterConfig, max_tokens: int) -> None:
        self._config = config
        self._p = np.zeros(config.num_experts, np.float32)
        self.selected = np.zeros((max_tokens, config.top_k), np.int32)
        self.weights = np.zeros((max_tokens, config.top_k), np.float32)

    def route(
        self, logits: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], count: int, layer: int
    ) -> None:
        """Fill `selected` (best first) and `weights` for `count` rows of `logits` (tokens, >= experts).

        `bias` (experts,) counts for the selection only. Raises InternalError naming the layer when a
        token has fewer finite scores than experts to select: the weights hold a NaN or infinity.
        """
        c = self._config
        bad = route_top_k(
            logits, bias, count, c.num_experts, c.gating, c.normalise, np.float32(c.scale), self._p,
            self.selected, self.weights,
        )  # fmt: skip
        if bad >= 0:
            raise InternalError(f"layer {layer}: the router's scores are not finite")
