"""StallTrial: whether prefetching has made the wait for experts shorter. No clock: it is told the times."""

from __future__ import annotations

PHASE = 512  # events without, then with prefetching
LONGEST = 64  # phases of use between two trials


class StallTrial:
    """Compares the wait of two phases of events, one without and one with prefetching; then abides by that.

    After a trial that was won prefetching goes on, after one that was lost it stays off, for a number of
    phases that doubles each time the answer is the same.
    """

    def __init__(self) -> None:
        self._phase = 0  # 0: without, 1: with, 2: abiding
        self._events = 0
        self._begin_ns = 0
        self._without_ns = 0
        self._won = False
        self._abide = 1

    @property
    def allowed(self) -> bool:
        """Whether to prefetch for the next event."""
        return self._phase == 1 or (self._phase == 2 and self._won)

    def event(self, waited_ns: int) -> None:
        """Note the end of an event; `waited_ns` is the wait since the start, of all events together."""
        self._events += 1
        if self._events < PHASE * (self._abide if self._phase == 2 else 1):
            return
        spent_ns, self._begin_ns = waited_ns - self._begin_ns, waited_ns
        self._events = 0
        if self._phase == 0:
            self._without_ns = spent_ns
        elif self._phase == 1:
            won = spent_ns < self._without_ns
            self._abide = min(2 * self._abide, LONGEST) if won == self._won else 2
            self._won = won
        self._phase = (self._phase + 1) % 3
