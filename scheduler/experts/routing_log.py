"""Writes what the router did to a trace file, with the experts that came next; see `residency.trace`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...shm.errors import NotPermitted
from ..model.plan import ModelPlan
from ..residency.replay.trace import Routes
from ..residency.replay.writer import RoutedEvent, TraceHead, TraceWriter
from .router import probabilities


class RoutingLog:
    """One trace file of one model; `step` counts the engine's steps."""

    def __init__(self, path: Path, plan: ModelPlan, name: str) -> None:
        """Create the file; raises NotPermitted when it exists or cannot be made."""
        h = plan.hyper
        self._h = h
        self._step = -1
        self._turns: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._prefill = False
        sizes = [plan.expert_nbytes.get(layer, 0) for layer in range(h.layers)]
        head = TraceHead(
            model=name,
            architecture=h.architecture,
            num_experts=h.experts,
            top_k=h.experts_used,
            expert_bytes=sizes,
        )
        try:
            self._writer = TraceWriter(path, head, runner_ups=True)
        except OSError as error:
            raise NotPermitted(f"{path}: the trace cannot be made: {error.strerror}") from error

    def begin(self, turns: npt.NDArray[np.int32], prefill: bool) -> None:
        """Start a step: `turns` tells the requests of its rows apart; prefill: some rows are of a prompt."""
        self._step += 1
        self._turns, self._prefill = turns, prefill

    def flush(self) -> None:
        """Write what is buffered: the process may be killed at any time."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()

    def add(
        self,
        layer: int,
        logits: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
        ranked: npt.NDArray[np.int32],
        selected: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
        resident: npt.NDArray[np.uint8],
    ) -> None:
        """Append one layer of the step: what was selected of `ranked`, and what was resident before.

        logits: float32 (tokens, experts); ranked: int32 (tokens, >= k); the scores are those that rank.
        """
        h, k = self._h, self._h.experts_used
        scores = (probabilities(logits, h.gating) + bias).astype(np.float32)
        others = np.full((len(selected), k), -1, np.int32)
        found = ranked[:, k : 2 * k]
        others[:, : found.shape[1]] = found
        self._writer.add(
            RoutedEvent(
                step=self._step,
                layer=layer,
                prefill=self._prefill,
                turns=self._turns.tolist(),
                experts=selected,
                weights=weights,
                resident=resident,
                runner_ups=Routes(
                    scores=np.take_along_axis(scores, selected, axis=1),
                    others=others,
                    other_scores=np.take_along_axis(scores, np.maximum(others, 0), axis=1),
                    spread=scores.max(axis=1) - scores.min(axis=1),
                ),
            )
        )
