"""The read-bandwidth probe and the arithmetic peak: what they compute, and what is made of it."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest

from sterna.workers.kernels.measure import bandwidth, peak
from sterna.workers.kernels.measure.bandwidth import BLOCK_NBYTES, ReadBandwidth
from sterna.workers.pinned import PinnedThreads

MIB = 1 << 20
# A Raspberry Pi 5, as published: two threads read more than four.
BOARD = ReadBandwidth(
    bytes_per_s=((1, 9.26e9), (2, 13.23e9), (3, 12.4e9), (4, 11.59e9)), buffer_nbytes=64, cache_nbytes=8
)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 4), (0, 4), (2, 2)])
def test_read_touches_every_byte_of_its_part_and_no_other(start: int, stop: int) -> None:
    buffer = np.random.default_rng(1).integers(0, 256, 4 * BLOCK_NBYTES, np.uint8)
    part = buffer[start * BLOCK_NBYTES : stop * BLOCK_NBYTES]
    expected = int(part.view(np.int32).sum(dtype=np.int64)) & 0xFFFFFFFF
    assert int(bandwidth.read(buffer, start * BLOCK_NBYTES, stop * BLOCK_NBYTES)) & 0xFFFFFFFF == expected


def test_measure_gives_a_rate_for_each_number_of_threads() -> None:
    buffer = np.ones(MIB, np.uint8)
    read = bandwidth.measure(time.perf_counter, seconds=0.01, buffer=buffer)
    cpus = len(os.sched_getaffinity(0))
    assert [count for count, _ in read.bytes_per_s] == bandwidth.thread_counts(cpus)
    assert all(rate > 0 for _, rate in read.bytes_per_s)
    assert read.best == max(rate for _, rate in read.bytes_per_s)
    assert read.streaming_threads() in dict(read.bytes_per_s)
    assert read.buffer_nbytes == MIB


def test_measure_reckons_by_its_clock_and_gives_everyone_a_turn() -> None:
    """A clock on which each look takes a second: the time is over before the first turn ends."""
    seconds = itertools.count()
    limit = min(2, len(os.sched_getaffinity(0)))
    read = bandwidth.measure(
        lambda: float(next(seconds)), seconds=0.5, max_threads=limit, buffer=np.ones(MIB, np.uint8)
    )
    assert read.bytes_per_s == tuple((count, float(MIB)) for count in range(1, limit + 1))


def test_measure_makes_a_buffer_of_its_own() -> None:
    read = bandwidth.measure(time.perf_counter, seconds=0.001, max_threads=1)
    assert read.buffer_nbytes == bandwidth.buffer_nbytes(read.cache_nbytes)
    assert read.best > 0


def test_a_buffer_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        bandwidth.measure(time.perf_counter, buffer=np.ones(BLOCK_NBYTES - 1, np.uint8))


def test_read_once_uses_only_the_threads_asked_for() -> None:
    seconds = itertools.count()
    buffer = np.ones(4 * BLOCK_NBYTES + 5, np.uint8)
    with PinnedThreads(3) as threads:
        for count, blocks in ((1, 4), (2, 4), (3, 3)):  # whole blocks, equal parts
            rate = bandwidth.read_once(lambda: float(next(seconds)), threads, buffer, count)
            assert rate == blocks * BLOCK_NBYTES


def test_streaming_threads_is_the_smallest_number_that_suffices() -> None:
    assert BOARD.streaming_threads() == 2
    assert BOARD.streaming_threads(0.69) == 1
    assert BOARD.best == 13.23e9


def test_rates_between_and_beyond_the_measured_numbers() -> None:
    assert (BOARD.at(1), BOARD.at(4), BOARD.at(16)) == (9.26e9, 11.59e9, 11.59e9)
    with pytest.raises(ValueError, match="at least 1"):
        BOARD.at(0)


def test_best_of_two_runs() -> None:
    other = ReadBandwidth(
        bytes_per_s=((1, 1e9), (2, 14e9), (3, 1e9), (4, 12e9)), buffer_nbytes=64, cache_nbytes=8
    )
    assert BOARD.best_of(other).bytes_per_s == ((1, 9.26e9), (2, 14e9), (3, 12.4e9), (4, 12e9))


def test_thread_counts() -> None:
    assert bandwidth.thread_counts(1) == [1]
    assert bandwidth.thread_counts(4) == [1, 2, 3, 4]
    assert bandwidth.thread_counts(28) == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 28]


@pytest.mark.parametrize(
    ("cache", "available", "mib"),
    [
        (2 * MIB, 4096 * MIB, 32),
        (0, 4096 * MIB, 64),
        (36 * MIB, 4096 * MIB, 144),
        (512 * MIB, 4096 * MIB, 256),
        (36 * MIB, 400 * MIB, 50),
        (36 * MIB, 0, 1),
    ],
)
def test_buffer_size(cache: int, available: int, mib: int) -> None:
    assert bandwidth.buffer_nbytes(cache, available) == mib * MIB


def test_available_memory_is_known_and_allocated_memory_is_there() -> None:
    assert bandwidth.available_nbytes() > 0
    buffer = bandwidth.allocate(MIB)
    assert (buffer.size, buffer.flags.writeable, int(buffer.max())) == (MIB, True, 0)


def test_all_last_level_caches_count_once(tmp_path: Path) -> None:
    def cache(cpu: int, index: int, level: int, cache_type: str, size: str, shared: str) -> None:
        folder = tmp_path / f"cpu{cpu}/cache/index{index}"
        folder.mkdir(parents=True)
        for name, text in (
            ("level", level),
            ("type", cache_type),
            ("size", size),
            ("shared_cpu_list", shared),
        ):
            (folder / name).write_text(f"{text}\n")

    for cpu in range(4):
        cache(cpu, 0, 1, "Data", "32K", str(cpu))
        cache(cpu, 1, 9, "Instruction", "64K", str(cpu))  # never holds weights
        cache(cpu, 2, 3, "Unified", "16M", "0-1" if cpu < 2 else "2-3")
    assert bandwidth.cache_nbytes(range(4), tmp_path) == 32 * MIB
    assert bandwidth.cache_nbytes([1], tmp_path) == 16 * MIB
    (tmp_path / "cpu3/cache/index2/size").unlink()
    assert bandwidth.cache_nbytes([3], tmp_path) == 32 << 10
    assert bandwidth.cache_nbytes([7], tmp_path) == 0


@pytest.mark.parametrize("rounds", [0, 1, 37])
def test_the_peak_loop_really_multiplies(rounds: int) -> None:
    buffer = peak.make_buffer()
    sums = peak.SUMS
    x = buffer[1024 : 1024 + 4 * sums].view(np.int8).astype(np.int64).reshape(sums, 1, 4)
    expected = buffer[1024 + 4 * sums : 1024 + 8 * sums].view(np.int32).astype(np.int64)[:, None]
    for i in range(rounds):
        codes = buffer[(i & 15) * 64 :][:64].astype(np.int64).reshape(1, 16, 4)
        expected = expected + (codes * x).sum(axis=2)
    peak.dot_rounds(buffer, rounds)
    found = buffer[1024 : 1024 + sums * 64].view(np.int32).reshape(sums, 16)
    assert (found == np.broadcast_to(expected, (sums, 16)).astype(np.int32)).all()
