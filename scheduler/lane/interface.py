"""The lane: how a batch of experts reaches the workers. The interfaces and what they carry.

`Lane` is what a step needs, `ServedLane` what the scheduler process needs in addition. Who is there and who
owes what is decided in `roster`, how a worker's end is noticed in `presence`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...shm.errors import SternaError
from ...workers.messages import Compute, ExpertPage
from .roster import AnswersOverdue, Change, SlotsFilled


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBatch:
    """The part of one layer's work that one worker does."""

    worker: int
    layer: int
    precision: int
    """Of all these experts; see `workers.messages.Compute`."""
    activation_kind: int
    """Of the activations; see `workers.messages.Compute`."""
    experts: list[int]
    """Their ids in the layer."""
    slots: list[int]
    """Where each of them lies."""
    starts: list[int]
    """The pairs of expert i are starts[i]:starts[i + 1] of `rows`."""
    rows: npt.NDArray[np.int32]
    """The activation row of each pair."""
    activations: tuple[npt.NDArray[np.generic], ...]
    """float32 rows, or int8 rows with their float32 scales and int32 sums."""

    def request(self, seq: int) -> Compute:
        """Return the message that asks for this batch under the number `seq`."""
        return Compute(
            seq=seq,
            layer=self.layer,
            precision=self.precision,
            activation_kind=self.activation_kind,
            tokens=len(self.activations[0]),
            experts=self.experts,
            slots=self.slots,
            starts=self.starts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A batch is done: `rows` are float32 (pairs, d_model), in the order of its pairs."""

    seq: int
    rows: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An expert is complete in its slot, or could not be read: then `error` says why."""

    seq: int
    nbytes: int = 0
    read_ns: int = 0
    busy_ns: int = 0
    error: SternaError | None = None


class Lane(Protocol):
    """A transport. Every transport carries the same batch and gives the same bits."""

    waited_ns: int
    """Time spent waiting for experts to be read and for nothing else, since the lane was made."""

    def compute(self, batch: WorkerBatch) -> int:
        """Send `batch` to its worker and return the number under which the answer comes.

        Raises WorkerLost when the worker is not there.
        """

    def page_in(self, worker: int, page: ExpertPage, *, urgent: bool) -> int:
        """Have `worker` read an expert into its slot; returns as `compute`. Failed steps do not stop it."""

    def collect(self, computing: Collection[int], loading: Collection[int], what: str) -> Computed | Loaded:
        """Return the next answer of any request, waiting for one of `computing` and `loading`.

        A `Loaded` may be of a request that is not waited for. Raises WorkerLost when a worker that owes an
        answer dies or gives none in time (it is killed), and what a worker reports as trouble with a batch.
        """

    def give_up(self) -> None:
        """Forget the batches that have no answer yet: their step failed. Reading goes on."""


class ServedLane(Lane, Protocol):
    """A lane whose workers come and go while the scheduler process serves."""

    def sources(self) -> list[Any]:
        """Return the sockets and descriptors that become readable when there is something to `receive`."""

    def receive(self) -> None:
        """Take what has arrived and look who has gone, without waiting. Raises ProtocolError."""

    def changes(self) -> list[Change]:
        """Return once, in their order, what became of the workers, also what was met inside a step."""

    def reads(self) -> list[Loaded]:
        """Return once what was read without anybody waiting for it."""

    def tell(self, event: SlotsFilled | AnswersOverdue) -> None:
        """Hand the roster what only the scheduler knows; what follows from it is in `changes`."""

    def close(self) -> None:
        """Give sockets and descriptors back; again is harmless."""
