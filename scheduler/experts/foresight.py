"""Foresight: which experts the next layer will want, asked for before it is known that it does.

Two predictions are added: the next layer's own gate on the present state, and what usually follows this
layer's selection (`residency.predictor`). At most two experts per layer are asked for, at the lowest
priority, and only as long as the meter says that they are used and the trial that steps are shorter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...workers.kernels.layers.norms import rms_rows
from ..arrays import zeros
from ..decoder.dense import DenseWeights, Rows
from ..model.plan import ModelPlan
from ..residency.predictor import ExpertPredictor
from ..residency.prefetch_meter import PrefetchMeter
from ..residency.prefetch_trial import PrefetchTrial
from . import buffers
from .buffers import LOOK_AHEAD_TOKENS
from .gate import Gate
from .router import probabilities
from .runner import ExpertRunner

MOST = 2
HABIT_WEIGHT = 0.1


class Foresight:
    """Prefetches for one engine. `mode` is "auto", "on" (no meter) or "off"."""

    def __init__(
        self,
        plan: ModelPlan,
        dense: DenseWeights,
        gates: dict[int, Gate],
        biases: dict[int, npt.NDArray[np.float32]],
        runner: ExpertRunner,
        mode: str,
    ) -> None:
        h = plan.hyper
        self._h = h
        self._plan = plan
        self._runner = runner
        self._gates, self._biases = gates, biases
        self._norms = {layer: dense.vector(f"{layer}.ffn_norm") for layer in h.moe_layers}
        self._mode = mode
        self._predictor = ExpertPredictor(num_layers=len(h.moe_layers), num_experts=h.experts)
        self.meter = PrefetchMeter()
        self._trial = PrefetchTrial()
        self._rows = Rows(LOOK_AHEAD_TOKENS, h.d_model)
        made = zeros(buffers.foresight(h))
        self._logits, self._index = made["logits"], made["index"]
        self._index[0] = np.arange(LOOK_AHEAD_TOKENS)
        self._first: npt.NDArray[np.int32] | None = None  # the first layer's selection of the step before
        self._issued: dict[int, list[int]] = {}  # layer: keys

    def step_took(self, tokens: int, busy_ns: int) -> None:
        """Note that a step of `tokens` tokens took `busy_ns`."""
        if self._mode == "auto" and tokens <= LOOK_AHEAD_TOKENS and not self._runner.memory.holds_all:
            self._trial.step(busy_ns)

    def routed(
        self, layer: int, selected: npt.NDArray[np.int32], previous: npt.NDArray[np.int32] | None
    ) -> None:
        """Learn what a layer selected (int32 (tokens, k)), after `previous` in the layer before."""
        if self._off:
            return
        issued = self._issued.pop(layer, [])
        keys = {self._plan.key_of(layer, int(expert)) for expert in np.unique(selected)}
        useful = [key for key in issued if key in keys]
        late = [key for key in useful if not self._runner.memory.ready(key)]
        self.meter.record(len(issued), len(useful), len(late))
        if len(selected) > LOOK_AHEAD_TOKENS:
            self._first = None
            return
        if layer == self._h.moe_layers[0]:
            previous, self._first = self._first, selected.copy()
            if previous is None or len(previous) != len(selected):
                return
        if previous is not None:
            self._predictor.observe(layer - self._h.dense_layers, previous, selected)

    def look_ahead(
        self, layer: int, x: npt.NDArray[np.float32], count: int, selected: npt.NDArray[np.int32], exact: bool
    ) -> None:
        """Ask for experts of the layer after `layer`, from the state `x` (tokens, d_model) before its sum.

        Called while the experts of `layer` are read and computed. exact: nobody may lose quality in this
        step; otherwise times must not decide what is resident. Raises WorkerLost.
        """
        if self._off or count > LOOK_AHEAD_TOKENS or not self._allowed(exact):
            return
        following = layer + 1
        if following in self._gates:
            scores = self._gate_scores(following, x, count)
        elif self._first is not None and len(self._first) == count:
            following, selected = self._h.moe_layers[0], self._first
            scores = np.zeros(self._h.experts)
        else:
            return
        first = self._plan.key_of(following, 0)
        resident = self._runner.memory.resident[first : first + self._h.experts] > 0
        scores += HABIT_WEIGHT * self._predictor.scores(following - self._h.dense_layers, selected)
        scores[resident] = -np.inf
        best = np.argsort(-scores, kind="stable")[:MOST]
        wanted = [first + int(expert) for expert in best if np.isfinite(scores[expert])]
        self._issued[following] = self._runner.prefetch(wanted)

    @property
    def _off(self) -> bool:
        return self._mode == "off" or self._runner.memory.holds_all

    def _allowed(self, exact: bool) -> bool:
        if self._mode == "on":
            return True
        return self.meter.allowed and (self._trial.allowed or not exact)

    def _gate_scores(self, layer: int, x: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float64]:
        """Return the logarithm of each expert's best share of a token's mass; -inf outside its top k."""
        h = self._h
        rms_rows(x, h.d_model, self._norms[layer], np.float32(h.eps), count, h.d_model, self._rows.x)
        self._rows.changed()
        self._gates[layer].apply(self._rows, self._index, count, self._logits)
        p = probabilities(self._logits[:count, : h.experts], h.gating)
        ranked = p + self._biases[layer]
        kept = np.sort(ranked, axis=1)[:, -h.experts_used, None]
        mass = np.where(ranked >= kept, p, 0.0)
        with np.errstate(divide="ignore"):
            best: npt.NDArray[np.float64] = np.log((mass / mass.sum(axis=1, keepdims=True)).max(axis=0))
        return best
