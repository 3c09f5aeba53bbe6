"""How fast this machine reads memory with 1, 2, ... threads: the bound of every product of one token.

The start takes the number of threads that read from it (on some boards two read faster than four),
the benchmark compares with it. Reads only; the clock is an argument. Not in here: threads (`pinned`).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ....shm.errors import OutOfResources
from ...pinned import PinnedThreads, cpu_numbers, cpus_by_core
from ..kernel import kernel
from ..simd.ops import add_i32, load_i32, sum_i32, zero_i32

# Four pages side by side: prefetchers follow a stream in each page, and one alone does not keep memory busy.
_PAGE = 4096
BLOCK_NBYTES = 4 * _PAGE
_MIB = 1 << 20
_CPUS = Path("/sys/devices/system/cpu")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBandwidth:
    """What was measured: (threads, bytes per second) in rising order of threads, and over how much."""

    bytes_per_s: tuple[tuple[int, float], ...]
    buffer_nbytes: int
    cache_nbytes: int

    @property
    def best(self) -> float:
        """The most bytes per second that any number of threads read."""
        return max(rate for _, rate in self.bytes_per_s)

    def at(self, threads: int) -> float:
        """Return the bytes per second of the largest measured number of threads <= `threads`.

        Raises ValueError below one thread.
        """
        if threads < 1:
            raise ValueError(f"expected at least 1 thread, found {threads}")
        return max((count, rate) for count, rate in self.bytes_per_s if count <= threads)[1]

    def best_of(self, other: ReadBandwidth) -> ReadBandwidth:
        """Return the better figure for each number of threads, of two runs over the same numbers."""
        pairs = zip(self.bytes_per_s, other.bytes_per_s, strict=True)
        return replace(self, bytes_per_s=tuple(max(pair) for pair in pairs))

    def streaming_threads(self, share: float = 0.95) -> int:
        """Return the smallest number of threads that reads at least `share` of the best."""
        return min(count for count, rate in self.bytes_per_s if rate >= share * self.best)


@kernel
def read(buffer, start, stop):
    """Return the sum of the int32 in bytes start..stop of `buffer` (uint8), modulo 2^32.

    stop - start is a multiple of BLOCK_NBYTES. The sum is there so that nothing is left out.
    """
    a, b, c, d = zero_i32(), zero_i32(), zero_i32(), zero_i32()
    for block in range(start, stop, BLOCK_NBYTES):
        for at in range(block, block + _PAGE, 64):
            a = add_i32(a, load_i32(buffer, at))
            b = add_i32(b, load_i32(buffer, at + _PAGE))
            c = add_i32(c, load_i32(buffer, at + 2 * _PAGE))
            d = add_i32(d, load_i32(buffer, at + 3 * _PAGE))
    return sum_i32(add_i32(add_i32(a, b), add_i32(c, d)))


def warm() -> None:
    """Compile what `measure` calls, or load it from the cache."""
    read(np.zeros(BLOCK_NBYTES, np.uint8), 0, BLOCK_NBYTES)


def measure(
    clock: Callable[[], float],
    *,
    seconds: float = 0.3,
    max_threads: int | None = None,
    buffer: npt.NDArray[np.uint8] | None = None,
) -> ReadBandwidth:
    """Read `buffer` whole with 1, 2, ... threads, in turns for `seconds`, and keep the best of each.

    clock: seconds, such as time.perf_counter; buffer: uint8, larger than the cache and never a fresh
    private mapping, whose pages are all one; without it one is made for the call, see `buffer_nbytes`.
    Every number of threads gets one turn in any case; above eight, some numbers are left out.
    Starts threads: not for a process that forks later. Raises OutOfResources, and ValueError for a
    buffer that is too small to share out.
    """
    warm()
    end = clock() + seconds
    cpus = cpus_by_core()
    cache = cache_nbytes(cpus)
    contents = allocate(buffer_nbytes(cache)) if buffer is None else buffer
    counts = thread_counts(min(max_threads or len(cpus), len(cpus)))
    if contents.size < counts[-1] * BLOCK_NBYTES:
        raise ValueError(f"a buffer of {contents.size} bytes is too small for {counts[-1]} threads")
    best = dict.fromkeys(counts, 0.0)
    with PinnedThreads(counts[-1]) as threads:
        threads.run([warm] * counts[-1])
        first = True
        while first or clock() < end:
            for count in counts:
                if not first and clock() >= end:
                    break
                best[count] = max(best[count], read_once(clock, threads, contents, count))
            first = False
    return ReadBandwidth(bytes_per_s=tuple(best.items()), buffer_nbytes=contents.size, cache_nbytes=cache)


def read_once(
    clock: Callable[[], float], threads: PinnedThreads, buffer: npt.NDArray[np.uint8], count: int
) -> float:
    """Read the buffer once, a part for each of the first `count` threads; return bytes per second."""
    part = buffer.size // count // BLOCK_NBYTES * BLOCK_NBYTES
    tasks = [partial(read, buffer, i * part, (i + 1) * part) for i in range(count)]
    began = clock()
    threads.run(tasks)
    return part * count / max(clock() - began, 1e-9)


def thread_counts(limit: int) -> list[int]:
    """Return the numbers of threads to try up to `limit`: all to 8, then 12, 16, 24, 32, ... and `limit`."""
    return [n for n in range(1, limit + 1) if n <= 8 or n % (1 << (n.bit_length() - 2)) == 0 or n == limit]


def buffer_nbytes(cache: int, available: int | None = None) -> int:
    """Return how much to read: four caches, 32 to 256 MiB, at most an eighth of the available memory.

    A cache of unknown size (0) counts as 16 MiB.
    """
    free = available_nbytes() if available is None else available
    wanted = min(max(4 * (cache or 16 * _MIB), 32 * _MIB), 256 * _MIB)
    return max(min(wanted, free // 8) // _MIB, 1) * _MIB


def cache_nbytes(cpus: Iterable[int], folder: Path = _CPUS) -> int:
    """Return the bytes of all last-level caches of `cpus`; 0 where the system does not say.

    folder: as /sys/devices/system/cpu. A cache that several of them share counts once.
    """
    levels: dict[int, dict[frozenset[int], int]] = {}
    for cpu in cpus:
        for index in sorted((folder / f"cpu{cpu}" / "cache").glob("index*")):
            try:
                if (index / "type").read_text().strip() == "Instruction":
                    continue
                level = int((index / "level").read_text())
                size = (index / "size").read_text().strip()
                sharers = frozenset(cpu_numbers((index / "shared_cpu_list").read_text()))
                levels.setdefault(level, {})[sharers] = _nbytes(size)
            except (OSError, ValueError):
                continue  # a board whose firmware does not tell
    return sum(levels[max(levels)].values()) if levels else 0


def _nbytes(text: str) -> int:
    unit = {"K": 1 << 10, "M": _MIB, "G": 1 << 30}.get(text[-1:], 0)
    return int(text[:-1]) * unit if unit else int(text)


def available_nbytes() -> int:
    """Return the memory that can be had without swapping, 0 if the system does not say."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def allocate(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return zeroed bytes of shared memory, as the arenas are; every page of its own, all there already."""
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    try:
        return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)
    except OSError as error:
        raise OutOfResources(f"no {nbytes} bytes to measure the read bandwidth with: {error}") from error
