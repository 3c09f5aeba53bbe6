"""One opened model file (`Source`) and a bounded forward reader of its header (`HeaderReader`).

Not here: what the header means (`metadata.py`, `gguf.py`). The reader knows offsets, limits and how
to say where something is wrong. The structure is read with `pread`, so that a failing medium is an
exception and not a SIGBUS; values and tensors are then taken from the mapping.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
from array import array
from typing import Final

from ....shm.errors import (
    ModelFileError,
    ModelNotFound,
    ModelReadError,
    NotPermitted,
    OutOfResources,
    SternaError,
)

MAX_STRING_BYTES: Final = 16 << 20
MAX_STRINGS: Final = 4 << 20  # of all arrays of one file together: what has to be walked one by one
# Real headers have some 10 MB; walking a made-up one of gigabytes would take the time of reading it.
MAX_HEADER_BYTES: Final = 256 << 20
WINDOW_BYTES: Final = 1 << 20

_UINT32: Final = struct.Struct("<I")
_UINT64: Final = struct.Struct("<Q")


def quoted(text: str | bytes) -> str:
    """Return `text` as a literal of one line, at most about 80 characters."""
    literal = repr(text if len(text) <= 72 else text[:72])
    return literal if len(text) <= 72 else f"{literal}... ({len(text)} long)"


def refusal(label: str, at: int | None, what: str, expected: str, found: object) -> ModelFileError:
    """Return the one-line error: file, byte offset, the part, what was expected and what was found."""
    where = "" if at is None else f"byte {at}: "
    return ModelFileError(f"{label}: {where}{what}: expected {expected}, found {found}")


def _open_error(label: str, error: OSError) -> SternaError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return ModelNotFound(f"{label}: no such model file ({reason})")
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermitted(
            f"{label}: user id {os.geteuid()} may not read this file ({reason});"
            " it needs read permission on the file and search permission on its folders"
        )
    if error.errno == errno.ENXIO:
        return ModelFileError(f"{label}: a socket or device, expected a regular file")
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return OutOfResources(f"{label}: cannot open or map the file: {reason}")
    return ModelReadError(f"{label}: cannot open or map the file: {reason}")


class Source:
    """A regular file, opened once: descriptor, size at opening, private read-only mapping.

    Owns the descriptor and the mapping until `close`. Arrays that still look into the mapping keep
    it alive after that; everything else then raises ValueError.
    """

    __slots__ = ("_map", "fd", "label", "path", "size_bytes")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open and map `path`; any SternaError of a model file names it."""
        self._map: mmap.mmap | None = None
        self.fd = -1
        self.path = os.fspath(path)
        self.label = self.path if self.path.isprintable() else repr(self.path)  # for messages of one line
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer; regular files ignore it.
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except ValueError as error:
            raise ModelNotFound(f"{self.label}: no such model file ({error})") from None
        except OSError as error:
            raise _open_error(self.label, error) from None
        try:
            self.size_bytes = self._checked_size()
            self._map = mmap.mmap(self.fd, self.size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        except OSError as error:
            self.close()
            raise _open_error(self.label, error) from None
        except BaseException:
            self.close()
            raise

    def _checked_size(self) -> int:
        status = os.fstat(self.fd)
        if stat.S_ISDIR(status.st_mode):
            raise ModelFileError(f"{self.label}: expected a GGUF file, found a directory")
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{self.label}: expected a GGUF file, found a device, pipe or socket")
        if status.st_size == 0:
            raise ModelFileError(f"{self.label}: expected a GGUF file, found an empty file (0 bytes)")
        return status.st_size

    @property
    def mapped(self) -> mmap.mmap:
        """The mapping of the whole file; ValueError after `close`."""
        if self._map is None:
            raise ValueError(f"{self.label} is closed")
        return self._map

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes at `offset` by pread, fewer only at the file's end at opening.

        Raises ModelReadError when the medium fails, ModelFileError when the file has shrunk.
        """
        if self._map is None:
            raise ValueError(f"{self.label} is closed")
        wanted = min(count, self.size_bytes - offset)
        parts: list[bytes] = []
        while wanted > 0:
            try:
                part = os.pread(self.fd, wanted, offset)
            except OSError as error:
                reason = error.strerror or str(error)
                raise ModelReadError(f"{self.label}: byte {offset}: reading failed: {reason}") from error
            if not part:
                raise refusal(self.label, offset, "file", f"{self.size_bytes} bytes as at opening", "its end")
            parts.append(part)
            offset += len(part)
            wanted -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the descriptor and drop the mapping; again is harmless."""
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):  # an array still looks into it: its death unmaps
                mapped.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class HeaderReader:
    """Reads little-endian fields forward from `at`; holds at most one window of the file.

    `what` names the part being read ("key 'general.name'") and appears in every error.
    """

    __slots__ = (
        "_base",
        "_window",
        "_window_bytes",
        "at",
        "nested_arrays",
        "source",
        "strings_walked",
        "what",
    )

    def __init__(self, source: Source, at: int = 0, window_bytes: int = WINDOW_BYTES) -> None:
        self.source = source
        self.at = at
        self.what = "header"
        self.strings_walked = 0
        self.nested_arrays = 0
        self._window = b""
        self._window_bytes = window_bytes
        self._base = 0

    @property
    def bytes_left(self) -> int:
        """Bytes from here to the end of the file."""
        return self.source.size_bytes - self.at

    def refusal(self, expected: str, found: object, at: int | None = None) -> ModelFileError:
        """Return an error at byte `at` (default: here) of the current part."""
        return refusal(self.source.label, self.at if at is None else at, self.what, expected, found)

    def _field(self, count: int, what: str) -> int:
        """Make `count` bytes from `at` available and step over them; return their window index."""
        start = self.at - self._base
        if start < 0 or start + count > len(self._window):
            if count > self.bytes_left:
                raise self.refusal(f"{count} bytes of {what}", f"the end of the file after {self.bytes_left}")
            if self.at + count > MAX_HEADER_BYTES:
                raise self.refusal(f"a header of at most {MAX_HEADER_BYTES} bytes", "more")
            self._window = self.source.read(self.at, max(count, self._window_bytes))
            self._base = self.at
            start = 0
        self.at += count
        return start

    def uint32(self, what: str) -> int:
        """Read an unsigned 32-bit integer; `what` says what it is."""
        start = self._field(4, what)
        return int(_UINT32.unpack_from(self._window, start)[0])

    def uint64(self, what: str) -> int:
        """Read an unsigned 64-bit integer; `what` says what it is."""
        start = self._field(8, what)
        return int(_UINT64.unpack_from(self._window, start)[0])

    def bytes_of(self, count: int, what: str) -> bytes:
        """Read `count` bytes; the caller has bounded `count` (it is memory)."""
        start = self._field(count, what)
        return self._window[start : start + count]

    def skip(self, count: int, what: str) -> None:
        """Step over `count` bytes without reading them; they must lie in the file."""
        if count > self.bytes_left:
            raise self.refusal(f"{count} bytes of {what}", f"the end of the file after {self.bytes_left}")
        self.at += count

    def text(self, max_bytes: int, what: str) -> str:
        """Read a length-prefixed UTF-8 string of at most `max_bytes` bytes."""
        length_at = self.at
        length = self.uint64(f"the length of {what}")
        if length > max_bytes:
            raise self.refusal(f"{what} of at most {max_bytes} bytes", length, at=length_at)
        raw = self.bytes_of(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.refusal(f"{what} in UTF-8", quoted(raw), at=length_at + 8) from None

    def skip_string(self, what: str) -> None:
        """Step over a length-prefixed string; only its length is read."""
        length = self.uint64(f"the length of {what}")
        if length > MAX_STRING_BYTES:
            raise self.refusal(f"{what} of at most {MAX_STRING_BYTES} bytes", length, at=self.at - 8)
        self.skip(length, what)

    def skip_strings(self, count: int) -> array[int]:
        """Step over `count` strings; return where each starts (its length field), then the end.

        Bounded by MAX_STRINGS over the life of the reader: time and 8 bytes of memory for each.
        """
        self.strings_walked += count
        if self.strings_walked > MAX_STRINGS:
            raise self.refusal(f"at most {MAX_STRINGS} array strings in a file", self.strings_walked)
        starts = array("Q")
        note = starts.append
        unpack = _UINT64.unpack_from
        file_bytes = self.source.size_bytes
        window, base, at = self._window, self._base, self.at
        last = base + len(window) - 8  # a length field may start here
        outer = self.what
        for index in range(count):
            if at > last:  # the slow, checked way also fetches the next window
                self.at, self.what = at, f"{outer} string {index}"
                self.uint64("the length of a string")
                window, base = self._window, self._base
                last = base + len(window) - 8
            note(at)
            length: int = unpack(window, at - base)[0]
            end = at + 8 + length
            if length > MAX_STRING_BYTES or end > file_bytes:
                self.at, self.what = at, f"{outer} string {index}"
                self.skip_string("a string")  # raises
            at = end
        self.at, self.what = at, outer
        note(at)
        return starts
