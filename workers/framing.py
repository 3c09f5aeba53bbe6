"""Several arrays in one ZeroMQ frame: each further frame of a message costs a system call or two.

[count: int32][nbytes 0: int32] ... padded to 16 | array 0, padded to 16 | array 1, padded | ...
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ALIGNMENT = 16  # what the data of a bytearray has
_ZEROS = bytes(ALIGNMENT)


def join(arrays: Sequence[npt.NDArray[np.generic]]) -> bytes:
    """Return one frame that holds the C-contiguous `arrays`, each aligned to 16 bytes."""
    parts: list[bytes | memoryview] = [
        struct.pack(f"<{len(arrays) + 1}i", len(arrays), *(a.nbytes for a in arrays))
    ]
    parts.append(_ZEROS[: -len(parts[0]) % ALIGNMENT])
    for array in arrays:
        parts.append(array.data)
        parts.append(_ZEROS[: -array.nbytes % ALIGNMENT])
    return b"".join(parts)


def split(frame: bytes | bytearray) -> list[memoryview]:
    """Return the arrays' bytes in `frame`, without a copy; raises ValueError if it is none of ours."""
    view = memoryview(frame)
    if len(view) < 4:
        raise ValueError(f"a frame of {len(view)} bytes holds no arrays")
    (count,) = struct.unpack_from("<i", view)
    if not 0 <= count <= 16 or len(view) < 4 * (count + 1):
        raise ValueError(f"a frame of {len(view)} bytes says that it holds {count} arrays")
    at = _padded(4 * (count + 1))
    views = []
    for nbytes in struct.unpack_from(f"<{count}i", view, 4):
        if nbytes < 0 or at + nbytes > len(view):
            raise ValueError(f"an array of {nbytes} bytes does not fit at byte {at} of {len(view)}")
        views.append(view[at : at + nbytes])
        at += _padded(nbytes)
    return views


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
