"""llama.cpp's dot products, measured by its own program `test-quantize-perf` on one of our CPUs.

It times `vec_dot` of one row with quantised activations, both in the first cache, scale included; a
matrix product of llama.cpp calls that once per row and token. Not measured: its repacked kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...shm.errors import StartFailed, UsageError
from ...workers.pinned import PinnedThreads

PROGRAM = "test-quantize-perf"
_FOLDERS = ("", "bin", "build/bin")
_VALUE_BYTES = 4  # "float32 throughput" counts values of four bytes, and 2^30 of them as a GB
_GIB = 1 << 30
# The program's clock takes about 20 ns, a tenth of a short row: the best of two lengths counts.
LENGTHS = (1, 8)
TIMEOUT_S = 120.0

_ROW = re.compile(
    r"(?P<size>\d+) values.*?min cycles/32 vals\s*:\s*(?P<min>[\d.]+).*?avg cycles/32 vals\s*:\s*"
    r"(?P<avg>[\d.]+).*?float32 throughput\s*:\s*(?P<rate>[\d.]+) GB/s",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A build of llama.cpp: its program, and the types that it can measure."""

    program: Path
    types: frozenset[str]

    @classmethod
    def find(cls, folder: Path) -> LlamaCpp:
        """Return the build in `folder`, `folder`/bin or `folder`/build/bin.

        Raises UsageError, naming the path, without the program; StartFailed when it does not run.
        """
        for subfolder in _FOLDERS:
            program = folder / subfolder / PROGRAM
            if program.is_file():
                return cls(program.resolve(), _types(_run([str(program.resolve()), "--help"], (0, 1))))
        raise UsageError(
            f"--llama-cpp: no {PROGRAM} in {folder} (nor in its bin or build/bin); "
            f"build it with 'cmake --build build --target {PROGRAM}'"
        )

    def measures(self, file_type: str) -> bool:
        """Tell whether the build can measure this type of ours."""
        return their_name(file_type) in self.types

    def weights_per_s(self, file_type: str, columns: int, seconds: float, thread: PinnedThreads) -> float:
        """Return the weights per second of one core, best of many calls, for rows of `columns`.

        Runs on the CPU of `thread`'s first thread, for roughly `seconds`. Raises StartFailed.
        """
        iterations = max(1000, int(seconds * 20e9 / (columns * sum(LENGTHS))))
        sizes = [part for factor in LENGTHS for part in ("--size", str(factor * columns))]
        command = [
            str(self.program), "--op", "vec_dot_q", "--type", their_name(file_type), "-i", str(iterations),
            *sizes,
        ]  # fmt: skip
        (text,) = thread.run([lambda: _run(command)])
        return best_rate(text, str(self.program))


def their_name(file_type: str) -> str:
    """Return ggml's own name of a type: TQ2_0 is tq2_0 there, Q4_K is q4_K."""
    return file_type.lower().replace("_k", "_K")


def best_rate(text: str, program: str) -> float:
    """Return the most weights per second in the program's output, over all lengths.

    It prints least and mean cycles, and the mean rate: the clock's frequency follows from the last two.
    Where it knows no cycles (other CPUs than x86) the mean counts. Raises StartFailed if there is none.
    """
    rates = []
    for found in _ROW.finditer(text):
        mean = float(found["rate"]) * _GIB / _VALUE_BYTES
        least, average = float(found["min"]), float(found["avg"])
        rates.append(mean * average / least if least > 0 else mean)
    if not rates or max(rates) <= 0:
        raise StartFailed(f"{program}: no figures in what it printed: {text[-200:]!r}")
    return max(rates)


def _types(text: str) -> frozenset[str]:
    found = re.search(r"set test type as (.*?)\(all\)", text, re.DOTALL)
    return frozenset(found[1].split()) if found else frozenset()


def _run(command: list[str], allowed: tuple[int, ...] = (0,)) -> str:
    """Run the program beside its libraries and return what it printed."""
    folder = str(Path(command[0]).parent)
    paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    env = {**os.environ, "LD_LIBRARY_PATH": ":".join(paths)}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartFailed(f"{command[0]} does not run: {error}") from error
    if done.returncode not in allowed:
        last = (done.stderr.strip().splitlines() or ["it printed no reason"])[-1]
        raise StartFailed(f"{command[0]} ended with status {done.returncode}: {last}")
    return done.stdout + done.stderr
