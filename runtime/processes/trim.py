"""Gives memory back that a process needed only to get ready: freed heap, and the code that did it.

After the kernels are there, the compiler's library (100 MB) is not run again in the nursery or in what is
forked from it; its pages lie in the page cache and come back by themselves should it be.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

_MADV_DONTNEED = 4
# Code alone: other read-only parts of a library may hold addresses that the loader has written.
_CODE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ [1-9]\d* +(\S*llvmlite\S*\.so\S*)$", re.MULTILINE)


def trim() -> None:
    """Return freed heap to the system and unmap the pages of the compiler's code; never raises OSError."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc only
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        for low, end, _ in _CODE.findall(Path("/proc/self/maps").read_text()):
            start = int(low, 16)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(int(end, 16) - start), _MADV_DONTNEED)
