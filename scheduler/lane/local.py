"""A lane to workers in this process: each batch is computed while it is sent.

For debugging (`--lane local`: one process to step through or to profile), for measuring, and for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from ...shm.errors import InternalError, SternaError
from ...shm.slots import SlotTable
from ...workers.messages import Configure, ExpertPage, PageIn
from ...workers.serve import ExpertWorker
from .interface import Computed, Loaded, WorkerBatch
from .roster import AnswersOverdue, Change, FillSlots, HelloSaid, Join, Leave, Roster, ShapesSent, SlotsFilled

MakeWorker = Callable[[SlotTable], ExpertWorker]


class LocalLane:
    """A `ServedLane` whose workers never go; answers come in the order of the requests."""

    def __init__(self, workers: Sequence[ExpertWorker]) -> None:
        self.waited_ns = 0
        self._workers = workers
        self._answers: list[Computed | Loaded] = []
        self._seq = 0
        self._roster = Roster()
        self._changes: list[Change] = []
        for worker in range(len(workers)):
            self._roster.handle(HelloSaid(worker=worker, peer=worker))
            self._note(ShapesSent(peer=worker))

    def sources(self) -> list[Any]:
        """Return nothing: the workers are there from the start."""
        return []

    def receive(self) -> None:
        """Do nothing: answers are there at once."""

    def changes(self) -> list[Change]:
        """See `ServedLane.changes`."""
        changes, self._changes = self._changes, []
        return changes

    def reads(self) -> list[Loaded]:
        """See `ServedLane.reads`."""
        done = [answer for answer in self._answers if isinstance(answer, Loaded)]
        self._answers = [answer for answer in self._answers if not isinstance(answer, Loaded)]
        return done

    def tell(self, event: SlotsFilled | AnswersOverdue) -> None:
        """See `ServedLane.tell`."""
        self._note(event)

    def close(self) -> None:
        """Do nothing: the workers go with this object."""

    def _note(self, event: ShapesSent | SlotsFilled | AnswersOverdue) -> None:
        done = self._roster.handle(event)
        self._changes += [each for each in done if isinstance(each, FillSlots | Join | Leave)]

    def compute(self, batch: WorkerBatch) -> int:
        """Compute `batch`; raises what the worker raises."""
        self._seq += 1
        # Writable copies, and a read-only answer, as from a socket: numba compiles anew for each array type.
        frames = [memoryview(bytearray(array.tobytes())) for array in (*batch.activations, batch.rows)]
        _, rows = self._workers[batch.worker].compute(batch.request(self._seq), frames)
        copied = np.frombuffer(rows.tobytes(), np.float32).reshape(rows.shape)
        self._answers.append(Computed(seq=self._seq, rows=copied))
        return self._seq

    def page_in(self, worker: int, page: ExpertPage, *, urgent: bool) -> int:
        """Read an expert; trouble is in the answer."""
        self._seq += 1
        try:
            paged = self._workers[worker].page_in(PageIn(seq=self._seq, page=page, urgent=urgent))
            self._answers.append(
                Loaded(seq=self._seq, nbytes=paged.nbytes, read_ns=paged.read_ns, busy_ns=paged.busy_ns)
            )
        except SternaError as error:
            self._answers.append(Loaded(seq=self._seq, error=error))
        return self._seq

    def collect(self, computing: Collection[int], loading: Collection[int], what: str) -> Computed | Loaded:
        """Return the next answer."""
        if not self._answers:
            raise InternalError(f"{what}: no answer is owed")
        return self._answers.pop(0)

    def give_up(self) -> None:
        """Drop answers of batches."""
        self._answers = [answer for answer in self._answers if isinstance(answer, Loaded)]


def local_workers(
    make: MakeWorker, slots: SlotTable, configure: Configure, workers: int
) -> list[ExpertWorker]:
    """Return `workers` workers that `make` makes over `slots`, each told the shapes of all layers."""
    made = [make(slots) for _ in range(workers)]
    for worker in made:
        worker.configure(configure)
    return made
