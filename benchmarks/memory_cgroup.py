"""Limits of memory for a child process, cold page caches, and what a process tree read and faulted.

In here: `MemoryCgroup` for version 1 and 2, `make_cold`, `Usage`. Not in here: what is run and compared
(`memory.py`). Needs root, or a folder of the memory hierarchy that this user may write to.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import psutil

_ROOT: Final = Path("/sys/fs/cgroup")
_PATIENCE_S: Final = 10.0
_POLL_S: Final = 0.05
_ENTER: Final = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True)
class _Files:
    """Names of one version's files: limit, limit of swap (or of both), peak."""

    limit: str
    swap_limit: str
    swap_is_total: bool
    peak: str


_V1 = _Files(
    limit="memory.limit_in_bytes",
    swap_limit="memory.memsw.limit_in_bytes",
    swap_is_total=True,
    peak="memory.max_usage_in_bytes",
)
_V2 = _Files(
    limit="memory.max",
    swap_limit="memory.swap.max",
    swap_is_total=False,
    peak="memory.peak",
)


def _own_folder(controller: str) -> str:
    """Return this process's folder in the hierarchy of `controller` ("" is version 2), as /a/b."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, folder = line.split(":", 2)
        if controller in controllers.split(","):
            return folder
    return "/"


def _parents() -> Iterator[tuple[Path, _Files]]:
    """Yield folders in which a group can perhaps be made: the root of a hierarchy, then our own folder."""
    if (_ROOT / "memory" / _V1.limit).exists() or (_ROOT / "memory" / "cgroup.procs").exists():
        for folder in ("/", _own_folder("memory")):
            yield _ROOT / "memory" / folder.lstrip("/"), _V1
    if (_ROOT / "cgroup.controllers").exists():
        for folder in ("/", _own_folder("")):
            yield _ROOT / folder.lstrip("/"), _V2


class MemoryCgroup:
    """A group of processes that may use `limit_bytes` together, page cache included; None: no limit.

    Used with `with`; raises OSError, saying why, when no group can be made. What is still in it at the end
    is killed: only what was started with `command_inside` and its children can be.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit_bytes = limit_bytes
        self._folder = Path()
        self._files = _V1

    def __enter__(self) -> Self:
        reasons = []
        for parent, files in _parents():
            folder = parent / f"sterna-benchmark-{os.getpid()}"
            try:
                folder.mkdir()
            except OSError as e:
                reasons.append(f"{folder}: {e.strerror}")
                continue
            self._folder, self._files = folder, files
            try:
                self._set_limit()
            except OSError as e:
                reasons.append(f"{e.filename or folder}: {e.strerror}")
                folder.rmdir()
                continue
            return self
        raise OSError("; ".join(reasons) or f"no memory hierarchy is mounted below {_ROOT}")

    def _set_limit(self) -> None:
        if not (self._folder / self._files.limit).exists():
            raise FileNotFoundError(2, "the memory controller is not enabled here", str(self._folder))
        if self._limit_bytes is None:
            return
        (self._folder / self._files.limit).write_text(str(self._limit_bytes))
        swap = self._folder / self._files.swap_limit
        if swap.exists():
            swap.write_text(str(self._limit_bytes) if self._files.swap_is_total else "0")

    def command_inside(self, command: list[str]) -> list[str]:
        """Return `command` so that it enters the group before it is executed; the process id stays."""
        return ["/bin/sh", "-c", _ENTER, str(self._folder / "cgroup.procs"), *command]

    @property
    def peak_bytes(self) -> int | None:
        """Most memory that was charged at a time; None where the kernel does not count it."""
        path = self._folder / self._files.peak
        return int(path.read_text()) if path.exists() else None

    @property
    def reread_bytes(self) -> int:
        """Bytes of files that were read again soon after they had been dropped, for want of memory.

        (How often a limit was met is no measure: kernels since 6.13 leave that at 0 in version 1.)
        """
        text = (self._folder / "memory.stat").read_text()
        counts = dict(line.split() for line in text.splitlines())
        pages = counts.get("workingset_refault_file") or counts.get("workingset_refault") or "0"
        return int(pages) * mmap.PAGESIZE

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        until_s = time.monotonic() + _PATIENCE_S
        while True:
            for pid in map(int, (self._folder / "cgroup.procs").read_text().split()):
                with contextlib.suppress(ProcessLookupError):
                    if pid:  # 0 is a process that this namespace does not see
                        os.kill(pid, signal.SIGKILL)
            try:
                self._folder.rmdir()
            except OSError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(_POLL_S)
            else:
                return


def why_no_cgroup() -> str | None:
    """Return why no group with a limit can be made here, or None."""
    try:
        with MemoryCgroup(1 << 30):
            return None
    except OSError as e:
        return str(e)


def cached_share(path: Path) -> float:
    """Return the share of the file's pages that are in the page cache."""
    nbytes = path.stat().st_size
    flags = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(nbytes), ctypes.c_void_p(flags.ctypes.data)
        )
        del view  # the mapping cannot be closed while it is looked at
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}", str(path))
    return float((flags & 1).mean())


def make_cold(path: Path) -> float:
    """Drop the file from the page cache; return the share that stayed.

    Pages that a process maps stay: those of one that is just ending are waited for, a few seconds.
    """
    until_s = time.monotonic() + _PATIENCE_S
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages not yet written cannot be dropped
        while True:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            share = cached_share(path)
            if not share or time.monotonic() > until_s:
                return share
            time.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class Usage:
    """Major faults, and bytes read from storage, of processes until now."""

    major_faults: int = 0
    read_bytes: int = 0

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Return the sum over a process and all that descend from it and still run."""
        total = cls()
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(OSError):  # it ended a moment ago
                folder = Path(f"/proc/{process.pid}")
                # Fields after the name, which may hold anything: state is the third, majflt the twelfth.
                faults = int((folder / "stat").read_text().rpartition(")")[2].split()[9])
                counters = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
                total = cls(total.major_faults + faults, total.read_bytes + int(counters["read_bytes"]))
        return total

    def __sub__(self, earlier: Usage) -> Usage:
        """Return what was added since `earlier`."""
        return Usage(self.major_faults - earlier.major_faults, self.read_bytes - earlier.read_bytes)
