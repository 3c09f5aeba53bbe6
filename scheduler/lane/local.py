"""A lane to workers in this process: each batch is computed while it is sent. Not for serving."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ...shm.errors import InternalError, SternaError
from ...workers.messages import ExpertPage, PageIn
from ...workers.serve import ExpertWorker
from .interface import Computed, Loaded, WorkerBatch


class LocalLane:
    """See `lane.Lane`; answers come in the order of the requests."""

    def __init__(self, workers: Sequence[ExpertWorker]) -> None:
        self.waited_ns = 0
        self._workers = workers
        self._answers: list[Computed | Loaded] = []
        self._seq = 0

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
            self._answers.append(Loaded(seq=self._seq, nbytes=paged.nbytes))
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
