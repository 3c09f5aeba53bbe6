"""What each stream may still lose by routing to experts that are in memory, and what it has lost.

Not in here: the trades (`workers.kernels.routing.top_k.route_resident`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...workers.kernels.routing.top_k import CREDIT
from ..arrays import zeros
from ..messages import RoutingReport, Submit
from ..state import Work
from . import buffers

EXACT = -1


class QualityLedger:
    """One account for each stream record; a step works on a copy, which counts when the step has succeeded.

    accounts: float64 (streams, 5), see `kernels.routing.CREDIT` and those after it; epsilon: float64
    (streams,).
    """

    def __init__(self, streams: int) -> None:
        made = zeros(buffers.ledger(streams))
        self.epsilon, self.accounts = made["epsilon"], made["accounts"]
        self._kept, self._before = made["kept"], made["before"]

    def admit(self, request: Submit) -> None:
        """Open the account of a stream, with the credit that it had under a predecessor."""
        self.epsilon[request.stream] = request.epsilon
        self._kept[request.stream] = 0.0
        self._kept[request.stream, CREDIT] = request.credit

    def begin(self, work: Sequence[Work]) -> npt.NDArray[np.int32] | None:
        """Return for each row of a step its account, or EXACT; None when all are.

        Only tokens computed one at a time may lose anything: a prompt is always exact.
        """
        self.accounts[:] = self._before[:] = self._kept
        lossy = [w.request.epsilon > 0 and w.segment.start >= w.request.lossy_from for w in work]
        if not any(lossy):
            return None
        counts = [w.segment.count for w in work]
        streams = [w.segment.stream if ok else EXACT for w, ok in zip(work, lossy, strict=True)]
        return np.repeat(np.array(streams, np.int32), counts)

    def commit(self) -> None:
        """Make the step count."""
        self._kept[:] = self.accounts

    def report(self, stream: int) -> RoutingReport | None:
        """Return what the step did to one stream's account; None for a stream that is exact."""
        if self.epsilon[stream] <= 0:
            return None
        _, events, changed, swaps, lost = (self.accounts[stream] - self._before[stream]).tolist()
        return RoutingReport(
            credit=float(self.accounts[stream, CREDIT]),
            events=int(events),
            changed=int(changed),
            swaps=int(swaps),
            lost=lost,
        )
