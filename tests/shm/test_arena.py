"""Arenas: sealed, shared with other processes, outliving them, and refused when they do not fit."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sterna.shm.arena import Arena
from sterna.shm.errors import OutOfResources

TIMEOUT_S = 30
PAGE = mmap.PAGESIZE


def in_child(code: str, *fds: int) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own that inherits `fds`; its arguments are their numbers."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, fds)],
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(("asked", "pages"), [(0, 1), (1, 1), (PAGE, 1), (PAGE + 1, 2), (256 * PAGE, 256)])
def test_an_arena_is_zeroed_memory_of_whole_pages(asked: int, pages: int) -> None:
    arena = Arena.create("test", asked)
    assert arena.nbytes == len(arena.bytes) == pages * PAGE
    assert arena.bytes.dtype == np.uint8
    assert not arena.bytes.any()
    arena.bytes[:] = 255
    arena.close()


def test_the_size_is_sealed() -> None:
    arena = Arena.create("test", 8192)
    for nbytes in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, nbytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(arena.fd, fcntl.F_GET_SEALS) == sealed
    arena.close()


def test_its_memory_is_reserved_when_it_is_made() -> None:
    arena = Arena.create("test", 1 << 20)
    assert os.fstat(arena.fd).st_blocks * 512 >= 1 << 20
    arena.close()


def test_the_descriptor_is_not_inherited_by_accident() -> None:
    arena = Arena.create("test", 4096)
    assert not os.get_inheritable(arena.fd)
    assert Path(f"/proc/self/fd/{arena.fd}").readlink().name.startswith("memfd:sterna-test")
    arena.close()


def test_a_duplicate_shows_the_same_bytes() -> None:
    arena = Arena.create("test", 10_000)
    other = Arena.attach("test", os.dup(arena.fd))
    assert other.nbytes == arena.nbytes
    arena.bytes[5] = 1
    other.bytes[9999] = 2
    assert other.bytes[5] == 1
    assert arena.bytes[9999] == 2
    arena.close()
    other.close()


def test_what_a_child_wrote_outlives_it() -> None:
    arena = Arena.create("test", 1 << 16)
    arena.bytes[:4] = [1, 2, 3, 4]
    code = """
import os, sys
from sterna.shm.arena import Arena
arena = Arena.attach("test", int(sys.argv[1]))
assert arena.bytes[:4].tolist() == [1, 2, 3, 4]
arena.bytes[-4:] = [5, 6, 7, 8]
os.kill(os.getpid(), 9)
"""
    assert in_child(code, arena.fd).returncode == -9
    assert arena.bytes[-4:].tolist() == [5, 6, 7, 8]
    arena.close()


def test_closing_gives_the_descriptor_back_and_leaves_the_memory() -> None:
    before = num_descriptors()
    arena = Arena.create("test", 4096)
    view = arena.bytes[:16]
    arena.close()
    arena.close()
    assert arena.fd == -1
    view[:] = 9
    assert arena.bytes[15] == 9
    del arena
    gc.collect()
    assert view.tolist() == [9] * 16
    del view
    gc.collect()
    assert num_descriptors() == before


def test_many_arenas_leak_nothing() -> None:
    before = num_descriptors()
    for _ in range(300):
        Arena.create("test", 1 << 16).close()
    gc.collect()
    assert num_descriptors() == before


LIMITED = """
import os, resource, sys
from sterna.shm.arena import Arena
from sterna.shm.errors import OutOfResources
limit, nbytes, most = getattr(resource, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if limit == resource.RLIMIT_AS:
    most += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))
try:
    Arena.create("weights", nbytes)
except OutOfResources as error:
    print(error)
resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
assert len(os.listdir("/proc/self/fd")) == before, "a descriptor was left"
"""


@pytest.mark.parametrize(
    ("limit", "nbytes", "at_most"),
    [("RLIMIT_FSIZE", 8 << 20, 4 << 20), ("RLIMIT_AS", 64 << 20, 8 << 20), ("RLIMIT_NOFILE", 4096, 3)],
)
def test_memory_or_descriptors_that_are_not_there_are_one_clear_error(
    limit: str, nbytes: int, at_most: int
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, limit, str(nbytes), str(at_most)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "weights" in process.stdout
    assert len(process.stdout.splitlines()) == 1
    if limit != "RLIMIT_NOFILE":
        assert f"{nbytes / 2**20:.1f} MiB" in process.stdout


def test_attaching_to_what_is_no_arena_fails(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    fd = os.open(tmp_path / "empty", os.O_RDWR)
    with pytest.raises((OSError, ValueError, OutOfResources)):
        Arena.attach("test", fd)
    os.close(fd)
