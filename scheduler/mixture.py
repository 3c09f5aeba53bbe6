"""The mixture of experts of one layer: router, batches for the workers, reduction in fixed order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..workers.checkpoint.formats import ActivationKind
from ..workers.kernels.routing import combine, scatter_pairs
from .batch import ExpertGroups, MoeBatchScheduler
from .dense import DenseWeights, Linear, Rows
from .lane import Lane, WorkerBatch
from .model.plan import ModelPlan
from .router import Router, RouterConfig

# Below this many tokens all rows go to every worker: finding out which it needs costs more.
FEW_TOKENS = 4


class Mixture:
    """Computes routed experts through the lane; callable as `Deepseek2.forward` expects."""

    def __init__(
        self,
        plan: ModelPlan,
        dense: DenseWeights,
        lane: Lane,
        owners: dict[tuple[int, int], int],
        capacity: int,
    ) -> None:
        h = plan.hyper
        self._plan = plan
        self._lane = lane
        self._owners = owners
        self._gates: dict[int, Linear] = {
            layer: dense.linear(f"{layer}.ffn_gate_inp") for layer in h.moe_layers
        }
        none = np.zeros(h.experts, np.float32)
        self._biases = {
            layer: dense.vector(f"{layer}.exp_probs_b") if dense.has(f"{layer}.exp_probs_b") else none
            for layer in h.moe_layers
        }
        self._router = Router(
            RouterConfig(
                num_experts=h.experts,
                top_k=h.experts_used,
                gating=h.gating,
                normalise=h.weights_norm,
                scale=h.weights_scale,
            ),
            capacity,
        )
        self._scheduler = MoeBatchScheduler(h.experts, h.experts_used, capacity)
        self._logits = np.zeros((capacity, -(-h.experts // 16) * 16), np.float32)
        self._y = np.zeros((capacity, h.experts_used, h.d_model), np.float32)
        self._index = np.arange(capacity, dtype=np.int32)

    def __call__(
        self,
        layer: int,
        rows: Rows,
        count: int,
        x: npt.NDArray[np.float32],
        shared: Callable[[], npt.NDArray[np.float32]],
    ) -> None:
        """x[t] += sum of the selected experts of rows[t], weighted, in rank order, + shared()[t].

        The shared experts are computed here while the workers compute the routed ones. Raises
        WorkerLost or InternalError; `x` is then not to be used.
        """
        self._gates[layer].apply(rows, self._index, count, self._logits)
        self._router.route(self._logits, self._biases[layer], count, layer)
        groups = self._scheduler.schedule(self._router.selected, count)
        batches, pairs = self._batches(layer, rows, count, groups)
        result: list[npt.NDArray[np.float32]] = []
        outputs = self._lane.exchange_all(batches, lambda: result.append(shared()))
        for output, mine in zip(outputs, pairs, strict=True):
            scatter_pairs(output, groups.tokens[mine], groups.ranks[mine], 0, len(mine), self._y)
        combine(x, self._y, self._router.weights, result[0], count)

    def _batches(
        self, layer: int, rows: Rows, count: int, groups: ExpertGroups
    ) -> tuple[list[WorkerBatch], list[npt.NDArray[np.intp]]]:
        """Split the layer's groups by owner; also return each batch's pair numbers."""
        by_worker: dict[int, list[int]] = {}
        for expert in groups.experts.tolist():
            by_worker.setdefault(self._owners[layer, expert], []).append(expert)
        kind = self._plan.expert_activation(layer)
        batches, pairs = [], []
        for worker, experts in sorted(by_worker.items()):
            spans = [np.arange(groups.ends[e], groups.ends[e + 1]) for e in experts]
            mine = np.concatenate(spans)
            starts = np.concatenate(([0], np.cumsum([len(span) for span in spans]))).tolist()
            needed, index = self._needed(groups.tokens[mine], count)
            batches.append(
                WorkerBatch(
                    worker=worker,
                    layer=layer,
                    kind=int(kind),
                    experts=experts,
                    slots=[self._plan.slot_of(layer, expert) for expert in experts],
                    starts=starts,
                    rows=index,
                    activations=_take(rows, kind, needed, count),
                )
            )
            pairs.append(mine)
        return batches, pairs

    def _needed(
        self, tokens: npt.NDArray[np.int32], count: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return the rows a batch needs and, for each pair, its place among them."""
        if count <= FEW_TOKENS:
            return self._index[:count], tokens
        needed, places = np.unique(tokens, return_inverse=True)
        return needed, places.astype(np.int32)


def _take(
    rows: Rows, kind: ActivationKind, needed: npt.NDArray[np.int32], count: int
) -> tuple[npt.NDArray[np.generic], ...]:
    """Return copies of the `needed` rows in the form that `kind` asks for."""
    if kind is ActivationKind.FLOAT:
        return (rows.x[needed],)
    q = rows.as_kind(kind, count)
    return q.q[needed], q.scales[needed], q.sums[needed]
