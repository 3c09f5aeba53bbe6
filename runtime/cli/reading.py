"""Text that a command is given as a file or on its standard input: bounded, and UTF-8."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from ...shm.errors import UsageError


def read_file(path: str, limit: int) -> str:
    """Return what the file `path` holds; raises UsageError as `read_text`, and if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return read_text(file, path, limit)
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}") from None


def read_text(file: BinaryIO, where: str, limit: int) -> str:
    """Return what `file` holds.

    Raises UsageError that begins with `where` for more than `limit` bytes, or what is not UTF-8.
    """
    data = file.read(limit + 1)
    if len(data) > limit:
        raise UsageError(f"{where}: expected at most {limit} bytes, found more")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{where}: expected UTF-8 text, found the byte {data[e.start]:#04x} at {e.start}"
        ) from None
