"""`sterna serve` on a terminal: bars, one line when it is ready, one at its end; stdout is for scripts."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.runtime.cli.progress import COMPILING

from .daemon_process import (
    COMMAND,
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    Daemon,
    clean_env,
    left_behind,
    wait_until,
)


@pytest.fixture
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="st-"))
    try:
        yield folder
        assert left_behind(folder) == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Terminal:
    """The other side of a terminal: collects what is written to it until it is closed."""

    def __init__(self) -> None:
        self._mine, self.fd = pty.openpty()
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the last writer has gone
            while data := os.read(self._mine, 4096):
                self._seen += data

    @property
    def text(self) -> str:
        return self._seen.decode(errors="replace")

    def close(self) -> None:
        self._reader.join(5)
        os.close(self._mine)


def served(home: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a daemon with stderr on a terminal, stop it when ready; return exit code, stdout, terminal."""
    terminal = Terminal()
    command = [*COMMAND, "serve", "--socket", f"ipc://{home}/s.sock", "--workers", "1", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=terminal.fd, env=clean_env(home, TERM="xterm", COLUMNS="200")
    ) as child:
        os.close(terminal.fd)
        try:
            wait_until(lambda: "sterna generate" in terminal.text or child.poll() is not None,
                       START_TIMEOUT_S, "the ready line")  # fmt: skip
            child.send_signal(signal.SIGINT)
            out, _ = child.communicate(timeout=STOP_TIMEOUT_S)
        finally:
            child.kill()
    terminal.close()
    return child.returncode, out.decode(), terminal.text


def test_vectors_on_a_terminal_are_for_people(home: Path, shared: Daemon) -> None:
    command = [*COMMAND, "embed", "a king", "a queen", "--socket", shared.url]
    terminal = Terminal()
    child = subprocess.Popen(command, stdout=terminal.fd, env=clean_env(home, TERM="xterm", COLUMNS="200"))
    os.close(terminal.fd)
    try:
        assert child.wait(START_TIMEOUT_S) == 0
    finally:
        child.kill()
        child.wait()
    terminal.close()
    lines = terminal.text.splitlines()
    assert len(lines) == 7
    piped = subprocess.run(
        command, capture_output=True, text=True, env=clean_env(home), timeout=START_TIMEOUT_S
    )
    whole = [[float(value) for value in line.split()] for line in piped.stdout.splitlines()]
    assert [len(vector) for vector in whole] == [256, 256]
    for name, shown, vector in zip(("1  a king ", "2  a queen"), lines, whole, strict=False):
        assert shown == f"{name}  256 values: {' '.join(f'{value:+.4f}' for value in vector[:4])} ..."
    alike = f"{sum(a * b for a, b in zip(*whole, strict=True)):.3f}"
    assert [line.split() for line in lines[4:]] == [["1", "2"], ["1", "1.000", alike], ["2", alike, "1.000"]]


def test_a_person_sees_bars_and_two_lines(home: Path) -> None:
    code, out, shown = served(home)
    assert (code, out) == (0, f"ready socket=ipc://{home}/s.sock\n")
    assert "loading kernels" in shown or COMPILING in shown  # the latter where kernels were edited
    for part in ("loading experts", "\x1b["):
        assert part in shown
    lines = [line.strip() for line in shown.splitlines()]
    (ready,) = [line for line in lines if "sterna: ready: tales-small, context 512 tokens; try" in line]
    assert f'sterna generate --socket ipc://{home}/s.sock "Once upon a time"; Ctrl-C stops' in ready
    assert lines[-1] == "sterna: stopped"
    assert " INFO " not in shown
