"""What was used before, kept in the user's cache: a cold start reads the hottest experts first."""

from __future__ import annotations

import contextlib
import os
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # the daemon reads counts, and must not load numba
    from .policies import Policy

COUNT_ROW = 1
"""Of the saved table; `workers/kernels/routing/eviction.py` has it as COUNT."""


class SavedCounts:
    """The policy's state of one model file, in a file of its own; a bad or foreign one counts as none."""

    def __init__(self, cache_dir: str, model_id: tuple[int, int, int, int]) -> None:
        """`cache_dir` "" keeps nothing."""
        self._path = _path(cache_dir, model_id) if cache_dir else None

    def load(self, policy: Policy) -> None:
        """Give `policy` what was saved, if anything was."""
        if self._path is None:
            return
        with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile):
            with np.load(self._path, allow_pickle=False) as saved:
                policy.load(dict(saved))
            policy.arrays.resident[:] = 0

    def save(self, policy: Policy) -> None:
        """Replace what was saved; a cache that cannot be written is no error."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(f".{os.getpid()}")
            with part.open("wb") as file:
                np.savez(file, **policy.save())  # type: ignore[arg-type]
            part.replace(self._path)


def read_counts(cache_dir: str, model_id: tuple[int, int, int, int]) -> npt.NDArray[np.float64] | None:
    """Return how often each expert was used, float64 (experts,) by key, None if not known. No numba."""
    if not cache_dir:
        return None
    with contextlib.suppress(OSError, ValueError, EOFError, KeyError, IndexError, zipfile.BadZipFile):
        with np.load(_path(cache_dir, model_id), allow_pickle=False) as saved:
            counts = np.asarray(saved["table"][COUNT_ROW], np.float64)
        if counts.ndim == 1 and np.isfinite(counts).all() and (counts >= 0).all():
            return counts
    return None


def _path(cache_dir: str, model_id: tuple[int, int, int, int]) -> Path:
    digest = blake2b(repr(model_id).encode(), digest_size=12).hexdigest()
    return Path(cache_dir) / "counts" / f"{digest}.npz"


def reading_order(policy: Policy | None, layers: int, experts: int) -> npt.NDArray[np.int64]:
    """Return all keys, those used before first and hottest first; the others layer by layer in turn."""
    others = np.arange(layers * experts).reshape(layers, experts).T.reshape(-1)
    if policy is None:
        return others
    hot = policy.hottest(policy.num_keys)
    return np.concatenate((hot, others[~np.isin(others, hot)]))
