"""The threads that share the dense part of a step: how many, their start and their end.

What they do is in `workers.kernels.crew`: they run kernels only and hold no Python lock meanwhile. Made
after the fork, by the scheduler process.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import numpy.typing as npt

from ...workers.kernels import crew as kernels
from ...workers.kernels.layers.shared_dense import heads_chunk, middle_chunk

MAX_THREADS = 64
STOP_TIMEOUT_S = 2.0
# Fewer multiply-adds than this take less time than waking a helper (some 20 us).
LEAST_WORK = 1 << 21


def usable_cores() -> int:
    """Return how many CPUs this process may run on, at most MAX_THREADS."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


class Crew:
    """`threads` in all, the caller included, of which `streaming` are used when weights stream.

    board: what kernels take to share work; heads_job, middle_job: addresses of the jobs in
    `workers.kernels.layers.shared_dense`. One thread alone shares nothing and starts nothing.
    """

    def __init__(self, threads: int, streaming: int | None = None, least_work: int = LEAST_WORK) -> None:
        self.threads = threads
        self.streaming_threads = streaming or threads
        self.board = _aligned(kernels.BOARD_WORDS)
        self.board[kernels.THREADS] = threads
        self.board[kernels.STREAMING] = streaming or threads
        self.board[kernels.LEAST_WORK] = least_work
        self.heads_job = kernels.job_address(heads_chunk)
        self.middle_job = kernels.job_address(middle_chunk)
        self._helpers = [
            threading.Thread(
                target=kernels.help_out, args=(self.board, number), name=f"crew {number}", daemon=True
            )
            for number in range(1, threads)
        ]
        for helper in self._helpers:
            helper.start()

    def close(self) -> None:
        """Send the helpers home; none is inside a job when nobody runs one."""
        kernels.stop(self.board)
        for helper in self._helpers:
            helper.join(STOP_TIMEOUT_S)


def _aligned(words: int) -> npt.NDArray[np.int64]:
    """Return zeroed int64 on a cache line's boundary."""
    raw = np.zeros(words + 8, np.int64)
    skip = -raw.ctypes.data % 64 // 8
    return raw[skip : skip + words]
