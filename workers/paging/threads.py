"""How many threads read experts fastest from this disk: measured once, kept in the user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ...shm.errors import ModelReadError
from ..messages import ExpertPage, FileSlab
from .checksums import digest
from .reading import ALIGNMENT, ModelFile, Staging

COUNTS = (1, 2, 3, 4)
SECONDS = 0.3  # for all counts together
UNMEASURED = 2
MAX_THREADS = 4
# Checking a slab and packing it takes about as long as hashing it four times: 0.28 ms for 0.8 MB of two-bit
# codes. A thread that does so does not read meanwhile: reads alone would say that one thread is enough.
HASHES = 4
ENOUGH = 0.92  # of the best speed: further threads would only cost memory and time


def calibrated_threads(file: ModelFile, cache_dir: str, page: ExpertPage) -> int:
    """Return the number of I/O threads for the device of `file` (its first part), measured at its first use.

    `page` is of the experts to be read. Processes that ask at the same time wait for one another, at
    most for a measurement each; without `cache_dir`, or where it cannot be written, each measures.
    Through the page cache nothing is measured: that would tell the speed of memory.
    """
    if file.mode != "direct":
        return UNMEASURED
    device = os.fstat(file.fds[0]).st_dev
    key = f"{os.major(device)}:{os.minor(device)}"
    path = Path(cache_dir) / "io-threads.json"
    with contextlib.ExitStack() as stack:
        kept: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError):
            if cache_dir:
                Path(cache_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = stack.enter_context(path.with_suffix(".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when its holder dies
                kept = _counts(path)
        if kept.get(key) not in COUNTS:
            speeds = measure(file, page.slabs, random.Random(0))  # noqa: S311 - offsets to read
            kept[key] = choose(speeds)
            if cache_dir:
                with contextlib.suppress(OSError):
                    new = path.with_suffix(f".{os.getpid()}")
                    new.write_text(json.dumps(kept))
                    new.replace(path)
        return kept[key]


def choose(speeds: Sequence[float]) -> int:
    """Return the smallest of COUNTS that comes near the best of `speeds` (bytes/s of each)."""
    return next(count for count, speed in zip(COUNTS, speeds, strict=True) if speed >= ENOUGH * max(speeds))


def measure(file: ModelFile, slabs: Sequence[FileSlab], offsets: random.Random) -> list[float]:
    """Return the bytes/s of reading and using pieces as large as `slabs` with each of COUNTS threads."""
    return [_speed(file, slabs, count, SECONDS / len(COUNTS), offsets) for count in COUNTS]


def _speed(
    file: ModelFile, slabs: Sequence[FileSlab], threads: int, seconds: float, offsets: random.Random
) -> float:
    sizes = [os.fstat(fd).st_size for fd in file.fds]
    began_s, done = time.perf_counter(), [0] * threads
    end_s = began_s + seconds

    def read(index: int, choice: random.Random) -> None:
        staging = Staging()
        with contextlib.suppress(ModelReadError):  # what is wrong is said when an expert is read
            while time.perf_counter() < end_s:
                slab = choice.choice(slabs)
                size = sizes[slab.file]
                nbytes = min(slab.nbytes, size)
                at = choice.randrange(max(1, size - nbytes + 1)) // ALIGNMENT * ALIGNMENT
                piece = FileSlab(at, nbytes, 0, "calibration", slab.file)
                raw = file.read(piece, staging)
                for _ in range(HASHES):
                    digest(raw)
                done[index] += nbytes

    choices = [random.Random(offsets.random()) for _ in range(threads)]  # noqa: S311 - offsets to read
    others = [threading.Thread(target=read, args=(i, choices[i]), daemon=True) for i in range(1, threads)]
    for thread in others:
        thread.start()
    read(0, choices[0])
    for thread in others:
        thread.join(seconds)
    return sum(done) / (time.perf_counter() - began_s)


def _counts(path: Path) -> dict[str, int]:
    """Return what the file says, if it is of the form that `calibrated_threads` writes."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text())
    if not isinstance(kept, dict):
        return {}
    return {key: count for key, count in kept.items() if isinstance(count, int)}
