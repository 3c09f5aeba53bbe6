"""What a conversion keeps beside its unfinished file, so that it can go on after it was stopped.

FILE.part is the file so far, FILE.part.journal a line of JSON that says what belongs to it (input and
arguments), then one for each tensor that is complete. Beside them, FILE.part.imatrix is what a calibration
measured (`column_weights.py`). Not in here: the conversion (`convert.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from ...shm.errors import AlreadyRunning, NotPermitted, OutOfResources, SternaError, UsageError

if TYPE_CHECKING:
    from ...workers.checkpoint.file.gguf import GgufFile

VERSION: Final = 1
_BEGINS: Final = b'{"sterna quantize": '  # every journal of ours
_SIDES: Final = ("", ".part", ".part.journal", ".part.imatrix")
_REFUSED: Final = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENXIO, errno.ETXTBSY,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Done:
    """A tensor that is complete: CRC-32 of its bytes; sums of `recode.Loss`."""

    crc: int
    lost: float
    whole: float


def check_output(sources: Sequence[str], out: Path, *, force: bool) -> None:
    """Raise UsageError if something lies at `out` that must not be replaced.

    sources: files that are read, of which none may be `out` or a file that a run keeps beside it.
    """
    for path in (side_path(out, side) for side in _SIDES):
        if any(_same(path, source) for source in sources):
            raise UsageError(f"{path}: input and output are the same file")
    if not out.exists():
        return
    if not out.is_file():
        raise UsageError(f"{out}: is there already and is no regular file")
    if not force:
        raise UsageError(f"{out}: there is such a file already; --force replaces it when the new one is done")


def side_path(out: Path, side: str) -> Path:
    """Return the path of a file beside `out`, such as that of side ".part"."""
    return out.with_name(out.name + side)


def _same(path: Path, other: str) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # one of them is not there
        return False


def identify(file: GgufFile) -> list[Any]:
    """Return what tells `file` from others: sizes and times of its files, a digest of all but the weights."""
    statuses = [os.fstat(fd) for fd in file.fds]
    digest = hashlib.sha256()
    for key in file.metadata:
        digest.update(key.encode() + b"\n" + file.raw_value(key))
    for info in file.tensors.values():
        digest.update(f"{info.name} {info.type.name} {info.shape} {info.file} {info.offset}\n".encode())
    return [*([status.st_size, status.st_mtime_ns] for status in statuses), digest.hexdigest()]


def write_error(path: Path, error: OSError, then: str = "") -> SternaError:
    """Return the error of one line for a file that could not be written: OutOfResources or NotPermitted."""
    error_class = NotPermitted if error.errno in _REFUSED else OutOfResources
    return error_class(f"{path}: writing failed: {error.strerror}{then}")


class PartFile:
    """An unfinished file and its journal, locked; a context that leaves both for the next run.

    `done` maps the names of complete tensors. Every write that fails is an error of one line.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, restart: bool) -> None:
        """Open or make `out`.part; with `restart` an older part is thrown away, and what was measured.

        identity: what the file is made of and how, plain values. Raises UsageError if an older part was made
        otherwise or by something else, AlreadyRunning if another process writes it, NotPermitted if the
        folder refuses, OutOfResources if it has no room.
        """
        self.path = side_path(out, ".part")
        self.journal_path = side_path(out, ".part.journal")
        self.done: dict[str, Done] = {}
        self._out = out
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(self.path, error) from None
        self._journal_fd = -1
        try:
            self._lock()
            kept = b"" if restart else self._resume(identity)
            if restart:
                side_path(out, ".part.imatrix").unlink(missing_ok=True)
            if not kept:  # before the journal: a file without one is taken for somebody else's
                os.ftruncate(self._fd, 0)
            self._journal_fd = os.open(self.journal_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._journal_fd, len(kept))
            os.lseek(self._journal_fd, 0, os.SEEK_END)
            if not kept:
                self._note({"sterna quantize": VERSION, **identity})
        except OSError as error:
            self._close()
            raise self._failure(error) from None
        except BaseException:
            self._close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had the lock may have given the file its name since it was opened here.
            if os.path.samestat(os.fstat(self._fd), self.path.stat()):
                return
        except (BlockingIOError, FileNotFoundError):
            pass
        raise AlreadyRunning(f"{self.path}: another `sterna quantize` is writing it")

    def _resume(self, identity: Mapping[str, Any]) -> bytes:
        """Take over what the journal holds; return its complete lines, empty if no tensor is complete."""
        try:
            text = self.journal_path.read_bytes()
        except FileNotFoundError:
            text = b""
        empty = os.fstat(self._fd).st_size == 0
        if not text and not empty:
            raise UsageError(f"{self.path}: is there already, without a journal; --restart throws it away")
        if text and not text.startswith(_BEGINS):
            raise UsageError(f"{self.journal_path}: damaged; --restart begins anew")
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # the last write was cut short
            lines.pop()
        if len(lines) < 2 or empty:
            return b""
        wanted = json.loads(json.dumps({"sterna quantize": VERSION, **identity}))
        try:
            found, *entries = (json.loads(line) for line in lines)
            done = {entry.pop("tensor"): Done(**entry) for entry in entries}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UsageError(f"{self.journal_path}: damaged; --restart begins anew") from None
        if found != wanted:
            other = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
            raise UsageError(
                f"{self.path}: was begun with another {' and '.join(other) or 'version'};"
                " give the same again to go on, or --restart to begin anew"
            )
        self.done = done
        return b"".join(lines)

    def _failure(self, error: OSError) -> SternaError:
        return write_error(self.path, error, "; the same command goes on from there")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for fd in (self._journal_fd, self._fd):
            if fd >= 0:
                os.close(fd)
        self._journal_fd = self._fd = -1

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at byte `offset`."""
        left = memoryview(data).cast("B")
        try:
            while left:
                written = os.pwrite(self._fd, left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            raise self._failure(error) from None

    def note(self, name: str, done: Done) -> None:
        """Write down that a tensor is complete."""
        self.done[name] = done
        try:
            self._note({"tensor": name, "crc": done.crc, "lost": done.lost, "whole": done.whole})
        except OSError as error:
            raise self._failure(error) from None

    def _note(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        if os.write(self._journal_fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self, nbytes: int) -> None:
        """Set the file's length, have it on the medium, and have later reads come from there."""
        try:
            os.ftruncate(self._fd, nbytes)
            os.fsync(self._fd)
        except OSError as error:
            raise self._failure(error) from None
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def forget(self) -> None:
        """Drop what was written, which turned out to be wrong: the next run begins anew."""
        os.ftruncate(self._fd, 0)
        self.journal_path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the file its name, replacing one that has it, and drop the journal. Raises NotPermitted."""
        try:
            self.path.replace(self._out)
        except OSError as error:
            raise NotPermitted(f"{self._out}: cannot be replaced: {error.strerror}") from None
        self.journal_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            folder = os.open(self._out.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
