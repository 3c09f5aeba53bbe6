"""Threads that stay on their CPU, and the order in which CPUs are taken."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path

import pytest

from sterna.workers.pinned import PinnedThreads, cpu_numbers, cpus_by_core


@pytest.mark.parametrize(
    ("text", "numbers"), [("0\n", [0]), ("0-2,8\n", [0, 1, 2, 8]), ("", []), ("3,5-6", [3, 5, 6])]
)
def test_cpu_numbers(text: str, numbers: list[int]) -> None:
    assert cpu_numbers(text) == numbers


def siblings(folder: Path, *pairs: tuple[int, ...]) -> None:
    for pair in pairs:
        for cpu in pair:
            topology = folder / f"cpu{cpu}" / "topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(",".join(map(str, pair)) + "\n")


def test_every_core_comes_before_any_second_thread(tmp_path: Path) -> None:
    siblings(tmp_path, (0, 1), (2, 3), (4, 5))
    assert cpus_by_core(range(6), tmp_path) == [0, 2, 4, 1, 3, 5]
    assert cpus_by_core([1, 2, 3], tmp_path) == [1, 2, 3]  # 1 stands for its core where 0 is not ours
    assert cpus_by_core([0, 9], tmp_path) == [0, 9]  # a CPU of which nothing is known


def test_threads_are_pinned_and_keep_their_task() -> None:
    allowed = os.sched_getaffinity(0)
    with PinnedThreads(3) as threads:
        assert len(threads) == 3
        first = threads.run([lambda: (threading.get_ident(), os.sched_getaffinity(0))] * 3)
        second = threads.run([threading.get_ident] * 3)
    assert [ident for ident, _ in first] == second
    cpus = cpus_by_core()
    for i, (_, affinity) in enumerate(first):
        assert affinity in ({cpus[i % len(cpus)]}, allowed)  # the latter where pinning is forbidden
    assert os.sched_getaffinity(0) == allowed  # the caller stays as it was


def test_tasks_run_at_the_same_time() -> None:
    barrier = threading.Barrier(2, timeout=10)
    with PinnedThreads(2) as threads:
        assert sorted(threads.run([barrier.wait, barrier.wait])) == [0, 1]


def test_a_failing_task_is_heard_and_too_many_are_refused() -> None:
    with PinnedThreads(1) as threads:
        with pytest.raises(ValueError, match="invalid literal"):
            threads.run([partial(int, "x")])
        with pytest.raises(ValueError, match="2 tasks for 1 threads"):
            threads.run([int, int])
