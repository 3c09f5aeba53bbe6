"""PrefetchTrial: whether steps have become shorter by prefetching. No clock: it is told the times."""

from __future__ import annotations

PHASE = 48  # steps without, then with prefetching
LONGEST = 64  # phases of use between two trials


class PrefetchTrial:
    """Compares the time of two phases of steps, one without and one with prefetching; then abides by that.

    The whole step counts, not the wait alone: where the processor is what is short, reading what is not used
    costs more than waiting. After a trial that was won prefetching goes on, after one that was lost it
    stays off, for a number of phases that doubles each time the answer is the same.
    """

    def __init__(self) -> None:
        self._phase = 0  # 0: without, 1: with, 2: abiding
        self._steps = 0
        self._spent_ns = 0
        self._without_ns = 0
        self._won = False
        self._abide = 1

    @property
    def allowed(self) -> bool:
        """Whether to prefetch in the next step."""
        return self._phase == 1 or (self._phase == 2 and self._won)

    def step(self, busy_ns: int) -> None:
        """Note the end of a step of decoding."""
        self._steps += 1
        self._spent_ns += busy_ns
        if self._steps < PHASE * (self._abide if self._phase == 2 else 1):
            return
        spent_ns, self._spent_ns, self._steps = self._spent_ns, 0, 0
        if self._phase == 0:
            self._without_ns = spent_ns
        elif self._phase == 1:
            won = spent_ns < self._without_ns
            self._abide = min(2 * self._abide, LONGEST) if won == self._won else 2
            self._won = won
        self._phase = (self._phase + 1) % 3
