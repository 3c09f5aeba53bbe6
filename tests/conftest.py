"""What holds for all tests: where kernels are kept, how hypothesis runs, and what may run side by side.

Kernels lie with the daemon's and are compiled with its options, in a folder whose name is their digest:
Numba's own place, __pycache__, has a key that misses edits in the intrinsics. Timings never fail a
test, so examples have no deadline; a CI run repeats exactly.

`make test` runs two pytest processes (pytest-xdist). A file's tests stay in one of them, in their order,
and so do all tests of the daemon that is shared. Tests that measure time in the files of ALONE, or carry
the mark `alone`, run while the other process is between two tests.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from sterna.runtime.processes.kernel_environment import SETTINGS
from sterna.workers.kernels.cache import cache_dir

os.environ.update(SETTINGS)

import numba

# Only here, not in the environment: for the processes that tests start that names the root.
numba.config.CACHE_DIR = str(cache_dir())
settings.register_profile("sterna", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("sterna")

TESTS = Path(__file__).parent
SHARED_DAEMON = "session_daemon"
# First what counts the children of its own process, before that has the shared daemon; then the longest, so
# that no process is left with a long file at the end.
FIRST = (
    "runtime/processes",
    SHARED_DAEMON,
    "system",
    "workers/kernels/test_targets.py",
    "scheduler",
    "workers",
    "runtime/quantize",
)
# They measure tenths of a second, or what a process may take of the machine.
ALONE = (
    "runtime/client/",
    "scheduler/residency/test_timings.py",
    "workers/kernels/measure/test_bandwidth.py",
)
# Left out of `make test-fast`, as daemons are: files, or the tests of a file whose names begin so. They
# compile for other targets, start process after process, or draw many examples.
LONG = (
    "aarch64/",
    "families/test_families.py",
    "runtime/cli/test_kernels.py",
    "runtime/processes/test_supervisor",
    "scheduler/lane/test_zeromq.py",
    "scheduler/test_precision_engine.py",
    "scheduler/test_precisions.py",
    "scheduler/test_process.py",
    "scheduler/test_serving.py::test_whoever_dies_whenever",
    "scheduler/test_warm.py",
    "workers/kernels/test_formats.py",
    "workers/kernels/test_targets.py",
    "workers/paging/test_pager.py",
)


def file_of(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).as_posix()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of daemons; say which stay together in one process, and what processes begin with."""
    for item in items:
        if file_of(item).startswith("system/"):
            item.add_marker(pytest.mark.daemon)
        if f"{file_of(item)}::{item.name}".startswith(LONG):
            item.add_marker(pytest.mark.long)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return

    def group(item: pytest.Item) -> str:
        return SHARED_DAEMON if SHARED_DAEMON in getattr(item, "fixturenames", ()) else file_of(item)

    def rank(item: pytest.Item) -> int:
        found = (i for i, part in enumerate(FIRST) if group(item).startswith(part))
        return next(found, len(FIRST))

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=rank)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let a test that runs alone wait for the other process's test, and that process for its end.

    A readers' and writers' lock of two files: whoever wants to run alone keeps `turn` while it waits for
    `room`, so that no further test begins before it. Any two files serve; these are always there.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    alone = file_of(item).startswith(ALONE) or item.get_closest_marker("alone") is not None
    with (TESTS / "conftest.py").open() as turn, (TESTS / "oracles.py").open() as room:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)


# A script's background job ignores SIGINT, and exec hands that on: children that tests interrupt must not.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
