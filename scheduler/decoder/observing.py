"""Dense matrices that show what they are multiplied with, for measuring activations. Not for serving."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .dense import FeedForward, Linear, Rows

Floats = npt.NDArray[np.float32]
SeeDense = Callable[[str, Floats], None]
"""Called with a matrix's key in the plan and the rows that it read, (heads, n, columns)."""


class DenseObserver:
    """An `Observer` (see `dense`) that calls `see` at each product; the rows are valid during the call."""

    def __init__(self, see: SeeDense) -> None:
        self._see = see

    def linear(self, key: str, made: Linear) -> Linear:
        """Return the same matrix, observed."""
        return _ObservedLinear(key, made, self._see)

    def feed_forward(self, keys: tuple[str, str, str], made: FeedForward) -> FeedForward:
        """Return the same network, observed."""
        return _ObservedFeedForward(keys, made, self._see)


class _ObservedLinear(Linear):
    def __init__(self, key: str, made: Linear, see: SeeDense) -> None:
        vars(self).update(vars(made))
        self._key, self._see = key, see

    def apply(
        self, rows: Rows, index: npt.NDArray[np.int32], count: int, out: npt.NDArray[np.float32]
    ) -> None:
        self._see(self._key, rows.x[index[:, :count]])
        super().apply(rows, index, count, out)


class _ObservedFeedForward(FeedForward):
    def __init__(self, keys: tuple[str, str, str], made: FeedForward, see: SeeDense) -> None:
        vars(self).update(vars(made))
        self._keys, self._see = keys, see

    def apply(
        self, rows: Rows, index: npt.NDArray[np.int32], count: int, out: npt.NDArray[np.float32]
    ) -> None:
        gate, up, down = self._keys
        x = rows.x[np.newaxis, :count].copy()  # `out` may be the same memory
        super().apply(rows, index, count, out)
        self._see(gate, x)
        self._see(up, x)
        self._see(down, self._buffers.gate[np.newaxis, :count])
