"""Threads that each stay on one CPU, for kernels that release the GIL.

Not in here: what they compute, and clocks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

Result = TypeVar("Result")

RUN_TIMEOUT_S = 600.0
_CPUS = Path("/sys/devices/system/cpu")


def cpu_numbers(text: str) -> list[int]:
    """Return the numbers that a list of the kernel's names: "0-2,8" is 0, 1, 2, 8."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def cpus_by_core(allowed: Iterable[int] | None = None, folder: Path = _CPUS) -> list[int]:
    """Return the CPUs that this process may use: one of each core, then the second ones, and so on."""
    cpus = sorted(os.sched_getaffinity(0) if allowed is None else allowed)
    rank = {}
    for cpu in cpus:
        try:
            siblings = cpu_numbers((folder / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except (OSError, ValueError):
            siblings = [cpu]
        rank[cpu] = len([sibling for sibling in siblings if sibling < cpu and sibling in cpus])
    return sorted(cpus, key=lambda cpu: (rank[cpu], cpu))


class PinnedThreads:
    """`count` threads, thread i on the i-th CPU of `cpus_by_core`; a context, they end with it.

    Where the system forbids pinning they run unpinned. More threads than CPUs share these.
    """

    def __init__(self, count: int) -> None:
        cpus = cpus_by_core()
        # A pool for each: a task then runs on the thread, and so the CPU, that it was given to.
        self._pools = [
            ThreadPoolExecutor(1, initializer=_pin, initargs=(cpus[i % len(cpus)],)) for i in range(count)
        ]

    def __len__(self) -> int:
        return len(self._pools)

    def __enter__(self) -> PinnedThreads:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run task i on thread i, all at once, and return their results.

        Raises what the first task that failed raised, TimeoutError when one took RUN_TIMEOUT_S,
        ValueError for more tasks than threads.
        """
        futures = [pool.submit(task) for pool, task in zip(self._pools, tasks, strict=False)]
        if len(futures) < len(tasks):
            raise ValueError(f"{len(tasks)} tasks for {len(self._pools)} threads")
        return [future.result(RUN_TIMEOUT_S) for future in futures]


def _pin(cpu: int) -> None:
    with contextlib.suppress(OSError):  # a wish: a container may forbid it
        os.sched_setaffinity(0, {cpu})  # 0 is the calling thread
