"""The model's files as experts are read from them: past the page cache where the file system allows it.

Not in here: threads, checksums, packing. `preadv` releases the GIL.
"""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np
import numpy.typing as npt

from ...shm.errors import ModelReadError
from ..messages import FileSlab

ALIGNMENT = 4096
"""What O_DIRECT wants of offsets, lengths and addresses; no disk in use asks for more."""

HUGE_PAGE = 2 << 20
"""Reading 0.8 MB into one takes 0.5 to 0.6 ms and a third of the CPU time; into small pages 0.76 ms."""

MAX_READ = 4 << 20  # of one call: a larger one ties up memory for no more speed


def placed_nbytes(offset: int, nbytes: int) -> int:
    """Return the bytes of the whole blocks that hold `nbytes` bytes from `offset` of a file."""
    return -(-(offset % ALIGNMENT + nbytes) // ALIGNMENT) * ALIGNMENT


def staging_nbytes(slab_nbytes: int) -> int:
    """Return how much memory an I/O thread holds for slabs of at most that size, wherever they lie."""
    nbytes = placed_nbytes(ALIGNMENT - 1, slab_nbytes)
    page = mmap.PAGESIZE if nbytes < HUGE_PAGE // 8 else HUGE_PAGE
    return -(-nbytes // page) * page


class Staging:
    """Aligned private memory that a slab is read into; as large as the largest so far needed."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.view = memoryview(b"")
        self.bytes: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def fit(self, slab: FileSlab) -> None:
        """Have room for `slab`; arrays over what was there before stay valid."""
        nbytes = staging_nbytes(slab.nbytes)
        if nbytes > self.nbytes:
            # Anonymous and private: a worker that is killed has no read under way into the arena.
            whole = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if nbytes % HUGE_PAGE == 0:
                with contextlib.suppress(OSError):  # a kernel without them
                    whole.madvise(mmap.MADV_HUGEPAGE)
            first = -np.frombuffer(whole, np.uint8).ctypes.data % HUGE_PAGE
            self.view, self.nbytes = memoryview(whole)[first : first + nbytes], nbytes
            # Read-only like a file's bytes: numba compiles a packer for each array type.
            self.bytes = np.frombuffer(self.view.toreadonly(), np.uint8)


class ModelFile:
    """An open model of one or more files, read by any number of threads; `close` ends what it opened itself.

    mode: "direct" when a real read with O_DIRECT succeeded on each file, else "buffered"; what was read of a
    file without it is dropped from the page cache again, so that it does not take the memory that the budget
    left free.
    """

    def __init__(self, *fds: int, direct: bool = True) -> None:
        self.fds = fds
        self._direct_fds = [_open_direct(fd) if direct else -1 for fd in fds]
        self.mode = "buffered" if -1 in self._direct_fds else "direct"

    def close(self) -> None:
        """Close the descriptors opened for O_DIRECT; `fds` stay their owner's."""
        for fd in self._direct_fds:
            if fd >= 0:
                os.close(fd)
        self._direct_fds = [-1] * len(self.fds)

    def read(self, slab: FileSlab, staging: Staging) -> npt.NDArray[np.uint8]:
        """Read `slab` into `staging` and return it there, read-only, valid until the next read to there.

        Raises ModelReadError naming tensor and byte when the file is short or the medium fails.
        """
        staging.fit(slab)
        lead = slab.offset % ALIGNMENT
        start, wanted = slab.offset - lead, lead + slab.nbytes
        room = placed_nbytes(slab.offset, slab.nbytes)
        plain, direct = self.fds[slab.file], self._direct_fds[slab.file]
        fd = plain if direct < 0 else direct
        done = 0
        while done < wanted:
            count = _read_part(fd, slab, staging.view[done : min(room, done + MAX_READ)], start + done)
            done += count
            # With O_DIRECT only the end of the file is not whole blocks, and nothing can be read behind it.
            if count == 0 or (count % ALIGNMENT and direct >= 0 and done < wanted):
                found, expected = os.fstat(plain).st_size, slab.offset + slab.nbytes
                raise ModelReadError(
                    f"{slab.tensor}: the model file ends at byte {found}, expected {expected}"
                )
        if direct < 0:
            os.posix_fadvise(plain, slab.offset, slab.nbytes, os.POSIX_FADV_DONTNEED)
        return staging.bytes[lead:wanted]


def _read_part(fd: int, slab: FileSlab, part: memoryview, offset: int) -> int:
    try:
        return os.preadv(fd, [part], offset)
    except OSError as error:
        raise ModelReadError(f"{slab.tensor}: reading at byte {offset} failed: {error.strerror}") from error


def _open_direct(fd: int) -> int:
    """Return a second descriptor of the same file with O_DIRECT, -1 where that does not work.

    Some file systems refuse to open it so, others only to read.
    """
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return -1
    with mmap.mmap(-1, ALIGNMENT) as page:
        try:
            if os.preadv(direct, [page], 0) > 0:
                return direct
        except OSError:
            pass
    os.close(direct)
    return -1
