"""What was used before, kept in the user's cache: a cold start reads the hottest experts first."""

from __future__ import annotations

import contextlib
import os
import zipfile
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .policies import Policy


class SavedCounts:
    """The policy's state of one model file, in a file of its own; a bad or foreign one counts as none."""

    def __init__(self, cache_dir: str, model_id: tuple[int, int, int, int]) -> None:
        """`cache_dir` "" keeps nothing."""
        digest = blake2b(repr(model_id).encode(), digest_size=12).hexdigest()
        self._path = Path(cache_dir) / "counts" / f"{digest}.npz" if cache_dir else None

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


def reading_order(policy: Policy | None, layers: int, experts: int) -> npt.NDArray[np.int64]:
    """Return all keys, those used before first and hottest first; the others layer by layer in turn."""
    others = np.arange(layers * experts).reshape(layers, experts).T.reshape(-1)
    if policy is None:
        return others
    hot = policy.hottest(policy.num_keys)
    return np.concatenate((hot, others[~np.isin(others, hot)]))
