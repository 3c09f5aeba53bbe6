"""Showing how a daemon starts: bars on a terminal, a line per phase elsewhere. Only stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

COMPILING = "compiling kernels (kept for the next start)"
PHASES = {
    "kernels": "loading kernels",
    "weights": "loading dense weights",
    "experts": "loading experts",
    "calibrating": "running the calibration text",
    "converting": "converting tensors",
    "checking": "reading back what was written",
}


class StartProgress:
    """A context in which `update` may be called with (what, done, total)."""

    def __init__(self) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._said: set[str] = set()
        self._bars: Progress | None = None
        # Read once: `prepare` points the variable to a folder below it.
        self._kernels = os.environ.get("NUMBA_CACHE_DIR")
        self._compiled = _count_kernels(self._kernels)

    def __enter__(self) -> StartProgress:
        if sys.stderr.isatty():
            # Only here: rich costs 80 ms, and most commands show no progress.
            from rich.console import Console
            from rich.progress import Progress

            self._bars = Progress(console=Console(stderr=True), transient=True)
            self._bars.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bars away; nothing is shown from then on."""
        if self._bars is not None:
            self._bars.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of phase `what` are done."""
        text = self._text(what)
        if self._bars is None:
            if text not in self._said:
                self._said.add(text)
                print(f"sterna: {text}", file=sys.stderr, flush=True)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(text, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total, description=text)

    def _text(self, what: str) -> str:
        # A kernel that was compiled has been stored, whichever process did it.
        if what == "kernels" and _count_kernels(self._kernels) > self._compiled:
            return COMPILING
        return PHASES.get(what, what)


def _count_kernels(chosen: str | None) -> int:
    """Return how many compiled kernels are kept in the folder `chosen`, by default the user's cache.

    All of them are counted: to name the folder of this version would load the compiler.
    """
    from ...workers.user_cache import user_cache  # here: it costs time that --version does not have

    root = Path(chosen or user_cache())
    return sum(1 for pattern in ("kernels-*/*/*.nbc", "*/*.nbc") for _ in root.glob(pattern))
