"""The command `sterna` as a process, for tests."""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "sterna.runtime.cli.main"]
ENV = {key: value for key, value in os.environ.items() if not key.startswith("STERNA_")}


def sterna(*arguments: str, stdin: bytes = b"", **env: str) -> tuple[int, str, str]:
    """Run the command and return its exit code, stdout and stderr."""
    done = subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, env=ENV | env, timeout=30)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def error_line(stderr: str) -> str:
    """Return the text of the one error line."""
    assert stderr.startswith("sterna: error: ")
    assert stderr.count("\n") == 1
    return stderr.removeprefix("sterna: error: ").rstrip("\n")
