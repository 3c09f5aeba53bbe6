"""PrefetchMeter: whether prefetching pays, from what became of the last prefetches. No clock."""

from __future__ import annotations

from collections import deque

from ...shm.errors import ConfigError

_LONGEST_PAUSE = 64  # times the first


class PrefetchMeter:
    """Off when fewer than `least_useful` of the last `window` prefetches were used; tries again, rarely.

    The caller reports each layer event once, when it is known what became of the prefetches made for it.
    After being turned off the meter allows prefetches again when `pause` events have passed, forgets the
    window and judges the next `window` prefetches; each failure in a row doubles the pause, up to 64 times.
    Same reports, same answers.
    """

    def __init__(self, *, window: int = 64, least_useful: float = 0.5, pause: int = 2048) -> None:
        """Raise ConfigError for a window below 32, a share outside 0..1 or a pause below 1."""
        if window < 32:
            raise ConfigError(f"prefetch window {window}: at least 32")
        if not 0.0 <= least_useful <= 1.0:
            raise ConfigError(f"least useful share of prefetches {least_useful}: 0 to 1")
        if pause < 1:
            raise ConfigError(f"prefetch pause {pause}: at least 1 event")
        self._window, self._least, self._pause = window, least_useful, pause
        self._recent: deque[tuple[int, int]] = deque()
        self._in_window = self._useful_in_window = 0
        self._waiting = 0
        self._next_pause = pause
        self.issued = self.useful = self.late = 0

    @property
    def allowed(self) -> bool:
        """Whether prefetches may be made now."""
        return self._waiting == 0

    @property
    def useful_share(self) -> float:
        """Useful prefetches of those in the window, 1 if there are none."""
        return self._useful_in_window / self._in_window if self._in_window else 1.0

    def record(self, issued: int = 0, useful: int = 0, late: int = 0) -> None:
        """Add an event: what was prefetched for it, how much of that was used, how much came too late.

        What came late but was used is useful and late. Raises ConfigError if more were used than issued.
        """
        if not (0 <= useful <= issued and 0 <= late <= issued):
            raise ConfigError(f"prefetches: {useful} useful and {late} late of {issued}")
        self.issued += issued
        self.useful += useful
        self.late += late
        if self._waiting:
            self._waiting -= 1
            return
        if issued:
            self._count(issued, useful)
        if self._in_window < self._window:
            return
        if self.useful_share < self._least:
            self._waiting = self._next_pause
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE * self._pause)
            self._recent.clear()
            self._in_window = self._useful_in_window = 0
        else:
            self._next_pause = self._pause

    def _count(self, issued: int, useful: int) -> None:
        """Add to the window and drop what it need not hold."""
        self._recent.append((issued, useful))
        self._in_window += issued
        self._useful_in_window += useful
        while self._in_window - self._recent[0][0] >= self._window:
            gone_issued, gone_useful = self._recent.popleft()
            self._in_window -= gone_issued
            self._useful_in_window -= gone_useful
