"""A daemon for one command: started on a socket of its own, stopped at the end.

In here: starting, waiting for its ready line, stopping; only by the process id that was started. Not in here:
the daemon (`daemon/daemon.py`).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...shm.errors import StartFailed, SternaError, error_of_exit
from ..python_command import python_command
from .render import for_terminal

if TYPE_CHECKING:
    from ..daemon.announcement import Announcement

STOP_TIMEOUT_S = 15.0
_READY = b"ready socket="
_LOADING = "loading "
_NOTE = "note "


Progress = Callable[[str, int, int], None]


def _ignore_note(text: str) -> None:
    """Show nothing."""


def _ignore(what: str, done: int, total: int) -> None:
    """Show nothing."""


def print_progress(what: str, done: int, total: int) -> None:
    """Print a step of the start for the parent to read; `private_daemon` hands it to its caller."""
    print(f"{_LOADING}{what} {done} {total}", flush=True)


def print_note(text: str) -> None:
    """Show what a private daemon has to tell its user."""
    click.echo(f"sterna: {text}", err=True)


def announce(announcement: Announcement) -> None:
    """Print for the parent that the daemon is ready, and before that how it differs from what was wished."""
    for note in announcement.notes:
        print(f"{_NOTE}{note}", flush=True)
    announcement.print_ready()


@contextlib.contextmanager
def private_daemon(
    arguments: list[str],
    start_timeout_s: float,
    on_progress: Progress = _ignore,
    on_note: Callable[[str], None] = _ignore_note,
) -> Iterator[str]:
    """Run `sterna serve ARGUMENTS` on a private socket and yield its URL; it is stopped on leaving.

    `on_progress(what, done, total)` is called while it starts, `on_note` with a line for the user.

    Raises what the daemon's exit code says, with its last words, if it ends before it is ready; StartFailed
    if it was killed or is not ready in time.
    """
    with tempfile.TemporaryDirectory(prefix="sterna-", ignore_cleanup_errors=True) as folder:
        url = f"ipc://{folder}/sterna.sock"
        stderr_path = Path(folder) / "stderr"
        command = python_command("-m", "sterna.runtime.cli.main", "serve", *arguments)
        with stderr_path.open("wb") as stderr:
            child = subprocess.Popen(
                [*command, "--socket", url, "--exit-with-parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # A Ctrl-C is for the command, which cancels its request first.
                process_group=0,
            )
        try:
            _await_ready(child, start_timeout_s, stderr_path, on_progress, on_note)
            yield url
        finally:
            _stop(child)


def _await_ready(
    child: subprocess.Popen[bytes],
    timeout_s: float,
    stderr_path: Path,
    on_progress: Progress,
    on_note: Callable[[str], None],
) -> None:
    if child.stdout is None:
        raise StartFailed("the daemon was started without a pipe for its output")
    until_s = time.monotonic() + timeout_s
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            *lines, seen = seen.split(b"\n")
            for line in lines:
                if line.startswith(_NOTE.encode()):
                    on_note(for_terminal(line.decode(errors="replace").removeprefix(_NOTE)))
                _report(line, on_progress)
            if any(line.startswith(_READY) for line in lines):
                return
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise StartFailed(f"the daemon was not ready after {timeout_s:g} s{_last_words(stderr_path)}")
            if not selector.select(left_s):
                continue
            part = os.read(child.stdout.fileno(), 4096)
            if not part:
                raise _death(child, stderr_path)
            seen = seen[-65536:] + part


def _report(line: bytes, on_progress: Progress) -> None:
    words = line.decode(errors="replace").removeprefix(_LOADING).split()
    if line.startswith(_LOADING.encode()) and len(words) == 3:
        on_progress(words[0], int(words[1]), int(words[2]))


def _death(child: subprocess.Popen[bytes], stderr_path: Path) -> SternaError:
    try:
        code = child.wait(5)
    except subprocess.TimeoutExpired:
        return StartFailed(f"the daemon closed its output before it was ready{_last_words(stderr_path)}")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return error_of_exit(code)(f"the daemon {how} before it was ready{_last_words(stderr_path)}")


def _last_words(stderr_path: Path) -> str:
    with stderr_path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last.removeprefix('sterna: error: ')}" if last else ""


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(STOP_TIMEOUT_S)
    if child.stdout is not None:
        child.stdout.close()
