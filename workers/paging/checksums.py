"""Checksums of experts as they lie in the file: taken at the first read, compared at every later one.

They are kept for the next start in a file of the user's cache, of 16 bytes for each expert:

    [checksum: uint64][guard: uint64]    at 16 * (layer * LAYER_ENTRIES + expert)

The guard is a hash of the checksum, of what identifies the model file and of the expert. An entry with
another guard counts as unknown, so that no content of that file can do harm: a torn write, a foreign
file or garbage only mean that the expert's checksum is taken again. Workers write entries of different
experts at the same time; the file is read and written, not mapped, because whoever cuts it short would
otherwise kill the worker.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

LAYER_ENTRIES = 4096  # experts beyond share an entry with the next layer's; then one of both is unknown
_ENTRY = struct.Struct("<QQ")


def digest(slab: npt.NDArray[np.uint8]) -> int:
    """Return the XXH3 of 64 bits over a slab."""
    return xxhash.xxh3_64_intdigest(slab.data)


def combined(digests: Iterable[int]) -> int:
    """Return the checksum of an expert: XXH3 over the digests of its slabs, so that any thread may take each.

    Never 0, which means unknown.
    """
    each = list(digests)
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(each)}Q", *each)) or 1


class Checksums:
    """The checksums of one model's experts; used by several threads of several processes.

    One expert is recorded by one thread at a time: its owner reads it into one slot.
    """

    def __init__(self, cache_dir: str = "", model_id: Sequence[int] = (), model_path: str = "") -> None:
        """Take up those that `cache_dir` holds for the file of that identity; "" keeps them in memory.

        So does a folder that cannot be written.
        """
        identity = hashlib.blake2b(f"{tuple(model_id)}\0{model_path}".encode(), digest_size=16)
        self._seed = int.from_bytes(identity.digest()[:8], "little")
        self._known: dict[tuple[int, int], int] = {}
        self._fd = _open(Path(cache_dir) / "checksums" / f"{identity.hexdigest()}.bin") if cache_dir else -1

    def close(self) -> None:
        """Close the file; again is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def known(self, layer: int, expert: int) -> int:
        """Return the checksum recorded for an expert, 0 for none."""
        found = self._known.get((layer, expert), 0)
        return found or self._stored(layer, expert)

    def record(self, layer: int, expert: int, value: int) -> None:
        """Keep `value` for an expert; a full disk or the like is no error."""
        self._known[layer, expert] = value
        if self._fd >= 0:
            entry = _ENTRY.pack(value, self._guard(layer, expert, value))
            try:
                os.pwrite(self._fd, entry, _at(layer, expert))
            except OSError:
                self.close()

    def _stored(self, layer: int, expert: int) -> int:
        if self._fd < 0:
            return 0
        try:
            entry = os.pread(self._fd, _ENTRY.size, _at(layer, expert))
        except OSError:
            return 0
        if len(entry) < _ENTRY.size:
            return 0
        value, guard = _ENTRY.unpack(entry)
        return int(value) if value and guard == self._guard(layer, expert, value) else 0

    def _guard(self, layer: int, expert: int, value: int) -> int:
        return xxhash.xxh3_64_intdigest(struct.pack("<qqQ", layer, expert, value), self._seed)


def _at(layer: int, expert: int) -> int:
    return (layer * LAYER_ENTRIES + expert) * _ENTRY.size


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return -1
