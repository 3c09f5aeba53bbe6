"""What a daemon counts of its requests, and the rates of the last seconds. Times are arguments."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

RATE_WINDOW_S = 10.0


@dataclass(slots=True)
class Totals:
    """Counters since the start, and the last seconds' tokens as (time, prompt, generated)."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    steps: int = 0
    last_step_s: float | None = None
    recent: deque[tuple[float, int, int]] = field(default_factory=deque)
    ends: deque[float] = field(default_factory=deque)
    """When requests ended, of the last seconds."""

    def add(self, now_s: float, prompt: int, generated: int) -> None:
        """Count one step's tokens."""
        self.steps += 1
        self.last_step_s = now_s
        self.prompt_tokens += prompt
        self.generated_tokens += generated
        self.recent.append((now_s, prompt, generated))

    def end(self, now_s: float) -> None:
        """Note that a request ended: the next in the queue takes its place."""
        self.ends.append(now_s)
        self._drop_old(now_s)

    def seconds_per_end(self, now_s: float) -> float | None:
        """Return the mean time between two ends over the last ten seconds, None if there was none."""
        self._drop_old(now_s)
        return RATE_WINDOW_S / len(self.ends) if self.ends else None

    def _drop_old(self, now_s: float) -> None:
        while self.ends and self.ends[0] < now_s - RATE_WINDOW_S:
            self.ends.popleft()

    def rates(self, now_s: float) -> tuple[float, float]:
        """Return (prompt, generated) tokens per second over the last ten seconds."""
        while self.recent and self.recent[0][0] < now_s - RATE_WINDOW_S:
            self.recent.popleft()
        prompt = sum(item[1] for item in self.recent)
        generated = sum(item[2] for item in self.recent)
        return prompt / RATE_WINDOW_S, generated / RATE_WINDOW_S
