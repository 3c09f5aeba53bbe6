"""Least recently used; the real policies are on their way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DEFAULT_POLICY = "lru"


class Policy:
    """Which expert gives way."""

    def __init__(self, name: str, num_keys: int) -> None:
        self._used = np.zeros(num_keys, np.int64)
        self._clock = 0

    def touch(self, keys: npt.NDArray[np.int32]) -> None:
        """Note one event."""
        self._clock += 1
        self._used[keys] = self._clock

    def victim(self, candidates: npt.NDArray[np.uint8]) -> int:
        """Return the key used longest ago among the candidates, -1 if there is none."""
        if not candidates.any():
            return -1
        return int(np.where(candidates > 0, self._used, np.iinfo(np.int64).max).argmin())

    def evicted(self, key: int) -> None:
        """Note that a key gave way."""

    def admitted(self, key: int) -> None:
        """Note that a key came in."""
