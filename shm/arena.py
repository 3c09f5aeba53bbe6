"""Arena: a sealed block of anonymous shared memory, passed between processes as a descriptor.

The daemon creates arenas and keeps their descriptors; the processes that fill or read them map
them. A process that dies takes nothing with it. There is no name that could leak or collide.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from .errors import OutOfResources

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """A mapping of `nbytes` bytes of shared memory; `bytes` is the whole as uint8, writable.

    `fd` stays open as long as the arena lives and is what other processes attach to.
    """

    def __init__(self, name: str, fd: int, nbytes: int) -> None:
        self.name = name
        self.fd = fd
        self.nbytes = nbytes
        self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)

    @classmethod
    def create(cls, name: str, nbytes: int) -> Arena:
        """Reserve `nbytes` (rounded up to whole pages) of zeroed memory and seal its size.

        Raises OutOfResources when the system cannot back it: posix_fallocate turns what would
        later be a SIGBUS in a worker into an error now.
        """
        nbytes = max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        fd = -1
        try:
            fd = os.memfd_create(f"sterna-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.posix_fallocate(fd, 0, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(name, fd, nbytes)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise OutOfResources(
                f"no memory for the {name} arena of {nbytes / 2**20:.1f} MiB: {error.strerror}"
            ) from error

    @classmethod
    def attach(cls, name: str, fd: int) -> Arena:
        """Map an arena that another process created; takes ownership of `fd`."""
        return cls(name, fd, os.fstat(fd).st_size)

    def punch(self, at: int, nbytes: int) -> int:
        """Give the whole pages within `nbytes` bytes from `at` back to the system; return their bytes.

        They read as zeros afterwards, in every process. Writing there takes memory again, and kills the
        writer (SIGBUS) where there is none: `restore` first.
        """
        start = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (at + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start >= end:
            return 0
        self._map.madvise(mmap.MADV_REMOVE, start, end - start)
        return end - start

    def restore(self, at: int, nbytes: int) -> None:
        """Reserve memory for that range again; raises OutOfResources when there is none."""
        try:
            os.posix_fallocate(self.fd, at, nbytes)
        except OSError as error:
            # What was taken before it failed lies in holes, and is given back.
            self.punch(at, nbytes)
            raise OutOfResources(
                f"no memory for {nbytes / 2**20:.1f} MiB more of the {self.name} arena: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Close the descriptor; the mapping goes when the last array over it is collected."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
