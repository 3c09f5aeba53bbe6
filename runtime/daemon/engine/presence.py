"""Which processes of the engine are there, as its keeper tells it to whoever reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePresence:
    """Which processes of the engine are there."""

    scheduler: bool
    """Whether the scheduler has loaded the model and takes requests."""
    workers_missing: list[int]
    """Workers that are dead, starting, or not yet taken in by the scheduler."""
    workers_missing_since_s: float | None
    """Time on the clock of `time.monotonic` since when at least one is missing."""
    scheduler_restarts: int
    worker_restarts: int
    pids: Mapping[str, int]
    """Live processes by their names."""

    @property
    def can_compute(self) -> bool:
        """Whether all are there: a step needs every worker."""
        return self.scheduler and not self.workers_missing
