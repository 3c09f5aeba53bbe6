"""The mixture of experts of one layer: router, batches for the workers, reduction in fixed order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ...shm.errors import InternalError
from ...workers.kernels.layers.norms import first_bad_row
from ...workers.kernels.routing.top_k import combine
from ..arrays import zeros
from ..decoder.dense import DenseWeights, Rows
from ..model.plan import ModelPlan
from ..residency.quality import QualityLedger
from . import buffers
from .foresight import Foresight
from .gate import Gate
from .groups import MoeBatchScheduler
from .router import Router, RouterConfig
from .routing_log import RoutingLog
from .runner import ExpertRunner

# One layer in this number, the first ones, is always exact: there reuse is low and harm is high in deep
# models.
EXACT_LAYERS = 16


class Mixture:
    """Computes routed experts through the lane; callable as `Decoder.forward` expects."""

    def __init__(
        self,
        plan: ModelPlan,
        dense: DenseWeights,
        runner: ExpertRunner,
        ledger: QualityLedger,
        capacity: int,
        prefetch: str = "auto",
        log: RoutingLog | None = None,
    ) -> None:
        h = plan.hyper
        self._runner = runner
        self._ledger = ledger
        self._log = log
        self._gates = {layer: Gate(dense, layer) for layer in h.moe_layers}
        made = zeros(buffers.mixture(h, capacity))
        self._biases = {
            layer: dense.vector(f"{layer}.exp_probs_b") if h.selection_biased else made["no_bias"]
            for layer in h.moe_layers
        }
        self._router = Router(
            RouterConfig(
                num_experts=h.experts,
                top_k=h.experts_used,
                gating=h.gating,
                normalise=h.weights_norm,
                # What a layer adds is scaled in some models: the weights take that on, too.
                scale=h.weights_scale * h.residual_scale,
                groups=h.groups,
                groups_used=h.groups_used,
                window=buffers.router_window(h),
                keep=1 if h.experts_used <= 2 else 2,
            ),
            capacity,
        )
        self._num_experts = h.experts
        self.foresight = Foresight(plan, dense, self._gates, self._biases, runner, prefetch)
        self._previous: npt.NDArray[np.int32] | None = None
        self._exact_layers = h.moe_layers[: len(h.moe_layers) // EXACT_LAYERS]
        self._streams: npt.NDArray[np.int32] | None = None
        self._scheduler = MoeBatchScheduler(h.experts, h.experts_used, capacity)
        self._logits, self._y, self._index = made["logits"], made["y"], made["index"]
        self._kept = made["previous"]
        self._index[0] = np.arange(capacity)

    def begin(self, streams: npt.NDArray[np.int32] | None) -> None:
        """Start a step: `streams` are the accounts of its rows, None when all are exact."""
        self._runner.memory.step()
        self._previous = None
        self._streams = None if self._runner.memory.holds_all else streams

    def _route(self, layer: int, count: int) -> None:
        r, bias = self._router, self._biases[layer]
        first = self._runner.plan.key_of(layer, 0)
        # The snapshot: nothing is read in or gives way before the whole layer is routed.
        resident = self._runner.memory.resident[first : first + self._num_experts]
        if self._streams is None or layer in self._exact_layers:
            r.route(self._logits, bias, count, layer, runner_ups=self._log is not None)
        else:
            r.route_within(
                self._logits, bias, count, layer, self._streams, self._ledger.epsilon, resident,
                self._ledger.accounts,
            )  # fmt: skip
        if self._log is not None:
            logits = self._logits[:count, : self._num_experts]
            chosen = (r.ranked[:count], r.selected[:count], r.weights[:count])
            self._log.add(layer, logits, bias, *chosen, resident)

    def __call__(
        self,
        layer: int,
        rows: Rows,
        count: int,
        x: npt.NDArray[np.float32],
        shared: Callable[[], npt.NDArray[np.float32]],
    ) -> None:
        """x[t] += sum of the selected experts of rows[t], weighted, in rank order, + shared()[t].

        The shared experts are computed here while the workers compute the routed ones. Raises what
        `ExpertRunner.run` does; `x` is then not to be used.
        """
        self._gates[layer].apply(rows, self._index, count, self._logits)
        if first_bad_row(self._logits, count, self._logits.shape[1]) >= 0:
            raise InternalError(f"layer {layer}: the router's scores are not finite")
        self._route(layer, count)
        ordinal_of = self._runner.orders[layer].ordinal_of
        selected = self._router.selected[:count]
        self.foresight.routed(layer, selected, self._previous)
        groups = self._scheduler.schedule(ordinal_of[selected], count)
        result: list[npt.NDArray[np.float32]] = []

        def meanwhile() -> None:
            result.append(shared())
            self.foresight.look_ahead(layer, x, count, selected, self._streams is None)

        self._runner.run(layer, rows, count, groups, self._y, meanwhile)
        self._kept[:count] = selected
        self._previous = self._kept[:count]
        combine(x, self._y, self._router.weights, result[0], count)
