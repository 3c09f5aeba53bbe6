"""The lane: how a batch of experts reaches the workers. An interface and the batch it carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..workers.messages import ExpertPage


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBatch:
    """The part of one layer's work that one worker does.

    experts: ids, lying in `slots`; starts: pairs of expert i are starts[i]:starts[i + 1] of `rows`;
    rows: int32, the activation row of each pair; activations: float32 rows, or int8 rows with their
    float32 scales and int32 sums; kind: see `workers.messages.Compute`.
    """

    worker: int
    layer: int
    kind: int
    experts: list[int]
    slots: list[int]
    starts: list[int]
    rows: npt.NDArray[np.int32]
    activations: tuple[npt.NDArray[np.generic], ...]


class Lane(Protocol):
    """A transport. Every transport carries the same batch and gives the same bits."""

    def exchange_all(
        self, batches: Sequence[WorkerBatch], meanwhile: Callable[[], None]
    ) -> list[npt.NDArray[np.float32]]:
        """Send each batch to its worker, run `meanwhile`, and return the outputs in that order.

        Output i is float32 (pairs, d_model), in the order of the batch's pairs. Raises WorkerLost
        when a worker dies, and InternalError when one reports trouble or answers not in time.
        """

    def page_in(self, experts: Mapping[int, list[ExpertPage]], progress: Callable[[int, int], None]) -> None:
        """Have each worker read its experts into their slots; reports (done, total)."""
