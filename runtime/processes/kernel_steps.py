"""The nursery's warm-up: kernels come from the cache; what is missing is compiled by a process that ends.

A process that has compiled keeps the compiler's heap, some 125 MB, and everything forked from it would, too.
In here: `steps`, which the nursery runs, and the waiting for that process. What is compiled is
`scheduler.warm`'s to say; the process itself is `kernel_compiler`. Imports numba: the nursery loads this
module only when its environment is set.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import time
from collections.abc import Callable
from functools import partial

from ...scheduler import warm
from ...shm.errors import StartFailed
from ...workers.kernels import late
from ..memory.room import read_room
from ..python_command import python_command

log = logging.getLogger("sterna.kernels")

COMPILER = "sterna.runtime.processes.kernel_compiler"
# A step takes some 10 s; a board without a fan, and busy, ten times that.
STEP_TIMEOUT_S = 600.0
MOST_COMPILERS = 2
COMPILER_NBYTES = 256 * 2**20  # what each takes while it runs
END_TIMEOUT_S = 10.0


def steps(**arguments: object) -> list[tuple[str, Callable[[], None]]]:
    """Return the steps of `scheduler.warm.steps(**arguments)` for a process that must stay small.

    After the last one, no kernel is missing: see `workers.kernels.late.seal`.
    """
    found = warm.steps(**arguments)  # type: ignore[arg-type]
    loader = Loader([step for _, step in found], arguments)
    return [
        *((name, partial(loader.run, number)) for number, (name, _) in enumerate(found)),
        ("all kernels", loader.finish),
    ]


class Loader:
    """Runs steps without compiling; the first that cannot starts compilers for it and all after it."""

    def __init__(self, steps: list[Callable[[], None]], arguments: dict[str, object]) -> None:
        self._steps = steps
        self._arguments = arguments
        self._first = 0
        self._compilers: list[Compiler] = []

    def run(self, number: int) -> None:
        """Run one step. Raises what it raises, or StartFailed when it cannot be compiled."""
        if not self._compilers:
            if self._loaded(number):
                return
            self._start_compilers(number)
        self._compilers[(number - self._first) % len(self._compilers)].wait_for(number)
        if not self._loaded(number):
            # The disk is full, say. The plan of the memory does not hold then: better than no answer at all.
            log.warning("kernel.not_kept step=%d", number)
            self._steps[number]()

    def finish(self) -> None:
        """Wait until the compilers have ended, and say that nothing is missing."""
        for compiler in self._compilers:
            compiler.close()
        late.seal()

    def _start_compilers(self, first: int) -> None:
        """Have the steps from `first` on compiled, in turn by as many compilers as cores and memory allow."""
        numbers = list(range(first, len(self._steps)))
        in_memory = max(1, read_room().usable // COMPILER_NBYTES)
        count = min(MOST_COMPILERS, len(os.sched_getaffinity(0)), len(numbers), in_memory)
        self._first = first
        self._compilers = [Compiler(self._arguments, numbers[i::count]) for i in range(count)]

    def _loaded(self, number: int) -> bool:
        """Run a step unless something would have to be compiled; return whether it ran."""
        late.refuse(True)
        try:
            self._steps[number]()
        except late.NotCompiled:
            return False
        finally:
            late.refuse(False)
        return True


class Compiler:
    """A process that compiles steps; it says when each is done. It ends with us."""

    def __init__(self, arguments: dict[str, object], numbers: list[int]) -> None:
        self._done = -1
        self._process = subprocess.Popen(
            python_command("-m", COMPILER, json.dumps(arguments), json.dumps(numbers), str(os.getpid())),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self._fd = self._process.stdout.fileno()  # type: ignore[union-attr]
        self._read = b""
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def wait_for(self, number: int) -> None:
        """Return when step `number` is done. Raises StartFailed with what the process said last."""
        while self._done < number:
            line = self._line(STEP_TIMEOUT_S, number)
            if line.startswith("done "):
                self._done = int(line.split()[1])
            else:
                self._process.kill()
                status = self._process.wait(END_TIMEOUT_S)
                raise StartFailed(line.strip() or f"the process that compiles kernels ended with {status}")

    def close(self) -> None:
        """Wait until the process has ended; kill one that does not end."""
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_TIMEOUT_S)

    def _line(self, timeout_s: float, number: int) -> str:
        """Return the next line, at the end what is left. Raises StartFailed after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._read:
            if self._poll.poll(1000):
                part = os.read(self._fd, 4096)
                if not part:
                    break
                self._read += part
            elif time.monotonic() > deadline:
                self._process.kill()
                raise StartFailed(f"kernels of step {number} not compiled after {timeout_s:.0f} s")
        line, _, self._read = self._read.partition(b"\n")
        return line.decode(errors="replace")
