"""The mixture of experts of one layer: router, batches for the workers, reduction in fixed order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ..shm.errors import InternalError
from ..workers.checkpoint.formats import ActivationKind
from ..workers.kernels.norms import first_bad_row
from ..workers.kernels.routing import combine, scatter_pairs
from .batch import ExpertGroups, MoeBatchScheduler
from .dense import DenseWeights, Linear, Rows
from .lane import Lane, WorkerBatch
from .model.plan import ModelPlan
from .router import Router, RouterConfig

# Below this many tokens all rows go to every worker: finding out which it needs costs more.
FEW_TOKENS = 4


class _Division:
    """The experts of one layer in the order (owner, id): each worker's are neighbours.

    place: int32 (experts,), an expert's place in that order; experts: the inverse; spans: for each
    worker that owns any (worker, first place, last place + 1).
    """

    def __init__(self, layer: int, num_experts: int, owners: Mapping[tuple[int, int], int]) -> None:
        owner = [owners[layer, expert] for expert in range(num_experts)]
        self.experts = sorted(range(num_experts), key=lambda expert: (owner[expert], expert))
        self.place = np.empty(num_experts, np.int32)
        self.place[self.experts] = np.arange(num_experts)
        self.spans = []
        for worker in sorted(set(owner)):
            places = self.place[[expert for expert in range(num_experts) if owner[expert] == worker]]
            self.spans.append((worker, int(places.min()), int(places.max()) + 1))


class Mixture:
    """Computes routed experts through the lane; callable as `Deepseek2.forward` expects."""

    def __init__(
        self,
        plan: ModelPlan,
        dense: DenseWeights,
        lane: Lane,
        owners: Mapping[tuple[int, int], int],
        capacity: int,
    ) -> None:
        h = plan.hyper
        self._plan = plan
        self._lane = lane
        self._divisions = {layer: _Division(layer, h.experts, owners) for layer in h.moe_layers}
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
        self._index = np.arange(capacity, dtype=np.int32).reshape(1, capacity)

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
        if first_bad_row(self._logits, count, self._logits.shape[1]) >= 0:
            raise InternalError(f"layer {layer}: the router's scores are not finite")
        self._router.route(self._logits, self._biases[layer], count, layer)
        division = self._divisions[layer]
        groups = self._scheduler.schedule(division.place[self._router.selected[:count]], count)
        batches, firsts = self._batches(layer, rows, count, groups)
        result: list[npt.NDArray[np.float32]] = []
        outputs = self._lane.exchange_all(batches, lambda: result.append(shared()))
        for output, first in zip(outputs, firsts, strict=True):
            scatter_pairs(output, groups.tokens, groups.ranks, first, len(output), self._y)
        combine(x, self._y, self._router.weights, result[0], count)

    def _batches(
        self, layer: int, rows: Rows, count: int, groups: ExpertGroups
    ) -> tuple[list[WorkerBatch], list[int]]:
        """Split the layer's groups by owner; also return the number of each batch's first pair."""
        division = self._divisions[layer]
        kind = self._plan.expert_activation(layer)
        ends: list[int] = groups.ends.tolist()
        batches, firsts = [], []
        for worker, begin, end in division.spans:
            first, last = ends[begin], ends[end]
            if first == last:
                continue
            places = [place for place in range(begin, end) if ends[place + 1] > ends[place]]
            experts = [division.experts[place] for place in places]
            needed, index = self._needed(groups.tokens[first:last], count)
            batches.append(
                WorkerBatch(
                    worker=worker,
                    layer=layer,
                    kind=int(kind),
                    experts=experts,
                    slots=[self._plan.slot_of(layer, expert) for expert in experts],
                    starts=[ends[place] - first for place in places] + [last - first],
                    rows=index,
                    activations=_take(rows, kind, needed, count),
                )
            )
            firsts.append(first)
        return batches, firsts

    def _needed(
        self, tokens: npt.NDArray[np.int32], count: int
    ) -> tuple[npt.NDArray[np.int32] | slice, npt.NDArray[np.int32]]:
        """Return the rows a batch needs and, for each pair, its place among them."""
        if count <= FEW_TOKENS:
            return slice(count), tokens
        needed, places = np.unique(tokens, return_inverse=True)
        return needed, places.astype(np.int32)


def _take(
    rows: Rows, kind: ActivationKind, needed: npt.NDArray[np.int32] | slice, count: int
) -> tuple[npt.NDArray[np.generic], ...]:
    """Return the `needed` rows in the form that `kind` asks for."""
    if kind is ActivationKind.FLOAT:
        return (rows.x[needed],)
    q = rows.as_kind(kind, count)
    return q.q[needed], q.scales[needed], q.sums[needed]
