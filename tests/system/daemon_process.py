"""A real `sterna serve` in a folder of its own, what it left behind, and how to wait with a bound.

Every process of a daemon carries the folder in its environment (TMPDIR), also those that are forked
or orphaned: that is how `left_behind` finds them, and why nothing here searches by name.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from sterna import Client
from sterna.workers.kernels.cache import cache_root

COMMAND = [sys.executable, "-m", "sterna.runtime.cli.main"]
# The first start after an edit of a kernel compiles them all.
START_TIMEOUT_S = 100.0
STOP_TIMEOUT_S = 45.0
POLL_S = 0.02


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Return when `condition` is true; fails when it is not in time."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)


def clean_env(folder: Path, **extra: str) -> dict[str, str]:
    """Return an environment without settings of whoever runs the tests, with temporary files in `folder`.

    So are checksums and counts; only compiled kernels are shared.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(("STERNA_", "NOTIFY_"))}
    private = {
        "TMPDIR": folder / "tmp",
        "XDG_RUNTIME_DIR": folder / "run",
        "XDG_CONFIG_HOME": folder / "config",
        "CACHE_DIRECTORY": folder / "cache",
    }
    for path in private.values():
        path.mkdir(exist_ok=True)
    kernels = {"NUMBA_CACHE_DIR": str(cache_root())}
    return kernels | env | {key: str(path) for key, path in private.items()} | extra


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return all live processes that have `folder` as their folder; zombies are not live."""
    mine = f"TMPDIR={folder / 'tmp'}".encode()
    found = []
    for process in psutil.process_iter():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if mine in environment and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue  # not ours, or ended a moment ago
    return found


def left_behind(folder: Path) -> list[str]:
    """Name what of a stopped daemon is still there: processes, sockets, temporary files, memfds."""
    found = [f"process {process.pid} {process.name()}" for process in processes_in(folder)]
    found += [f"file {path}" for path in sorted(folder.rglob("*")) if path.is_socket()]
    found += [f"temporary {path}" for path in sorted((folder / "tmp").iterdir())]
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue  # the descriptor of this listing itself
        if "memfd:sterna" in target:
            found.append(f"memfd {target} in the test's own process")
    return found


class Daemon:
    """One `sterna serve ARGUMENTS` on a private socket; `start` returns when it is ready."""

    def __init__(
        self, *arguments: str, env: dict[str, str] | None = None, limit_bytes: int | None = None
    ) -> None:
        """`limit_bytes` bounds what each of its processes can map (RLIMIT_AS)."""
        # Not pytest's tmp_path: a socket's path has 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="st-"))
        self.arguments = arguments
        self._limit_bytes = limit_bytes
        self.path = self.folder / "sterna.sock"
        self.url = f"ipc://{self.path}"
        self._env = clean_env(self.folder, **(env or {}))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The daemon's own process."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        """The daemon's process number."""
        return self.process.pid

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """What it has logged."""
        return (self.folder / "stderr").read_text()

    def launch(self) -> Daemon:
        """Start the process and return at once."""
        command = [*COMMAND, "serve", *self.arguments, "--socket", self.url]
        if self._limit_bytes is not None:
            command = ["prlimit", f"--as={self._limit_bytes}", *command]
        with (self.folder / "stdout").open("wb") as out, (self.folder / "stderr").open("wb") as err:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=self._env
            )
        return self

    def start(self) -> Daemon:
        """Start the process and wait until it says that it is ready."""
        self.launch()
        wait_until(lambda: self._is_ready(), START_TIMEOUT_S, f"{self.arguments} ready")
        return self

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.stderr[-2000:]}"
        return self.stdout == f"ready socket={self.url}\n"

    def late_kernels(self) -> list[str]:
        """Return what its processes logged about kernels that were not there when it was ready."""
        events = ("kernel.compiled_late", "kernel.loaded_late", "kernel.not_kept")
        return [line for line in self.stderr.splitlines() if any(event in line for event in events)]

    def client(self, timeout_s: float = 60.0) -> Client:
        """Return a client that the caller closes."""
        return Client(self.url, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """Return what a fresh client is told."""
        with self.client(10.0) as client:
            return client.status()

    def pids(self, process: str) -> list[int]:
        """Return the processes whose name begins with `process`: "worker", "scheduler", "nursery"."""
        return [row["pid"] for row in self.status()["processes"] if row["name"].startswith(process)]

    def signal(self, number: int) -> None:
        """Send the daemon a signal."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end and return the exit code."""
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        """Stop it if it runs; return its exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                return self.wait()
            finally:
                self.process.kill()
        return self.process.returncode

    def remove(self) -> None:
        """Stop it if need be, check that nothing is left and that no error went by, remove the folder."""
        try:
            if self._process is not None:
                self.stop()
                assert "Traceback" not in self.stderr, self.stderr
                assert self.late_kernels() == []
            # Children of a killed daemon get their signal from the kernel, a moment later.
            wait_until(
                lambda: not processes_in(self.folder), 3.0, f"no process left: {left_behind(self.folder)}"
            )
            left = left_behind(self.folder)
            assert not left, left
        finally:
            for process in processes_in(self.folder):
                process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)
