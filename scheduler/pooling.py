"""One vector for a whole prompt, out of its hidden states after the final norm.

In here: what one step adds, and what all steps' parts make. The vector does not depend on how the prompt was
cut into steps. Not in here: the hidden states (`decoder/decoder.py`), the request
(`runtime/daemon/answers.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from ..shm.errors import InternalError
from .messages import Pooling
from .state import Segment

FILE_POOLINGS: Final[dict[int, Pooling]] = {0: "last", 1: "mean", 2: "cls", 3: "last"}
"""By `<architecture>.pooling_type` of a GGUF file. 0, or no such key: none is said; then the last token's
state, the only one that a causal model computes from the whole text."""

ROWS = 32  # hidden states that are normed at once
UNITS = 2.0**32  # of a sum of hidden states in 1.0; whole numbers add up to the same in any order
MAX_SUM = 2.0**31

F32 = npt.NDArray[np.float32]
Normed = Callable[[npt.NDArray[np.int32]], F32]


def step_part(
    pooling: Pooling, segment: Segment, first_row: int, prompt_length: int, normed: Normed
) -> bytes | None:
    """Return what a step adds to the vector of a prompt, None for nothing.

    The segment's tokens are the rows from `first_row` of the batch; `normed(rows)` gives their final hidden
    states (len(rows), d_model). mean: their sum as int64 (d_model,), in units of 2^-32; cls: the state at
    position 0, last: the one that ends the prompt, as float32 (d_model,). Raises InternalError for what is
    not finite or too large to be summed.
    """
    end = first_row + segment.count
    if pooling == "mean":
        starts = range(first_row, end, ROWS)
        chunks = (np.arange(at, min(at + ROWS, end), dtype=np.int32) for at in starts)
        parts = [_whole_units(normed(rows), prompt_length) for rows in chunks]
        return np.sum(parts, axis=0, dtype=np.int64).tobytes()
    if pooling == "cls":
        row = first_row if segment.start == 0 else None
    else:
        row = end - 1 if segment.start + segment.count == prompt_length else None
    if row is None:
        return None
    state = normed(np.array([row], np.int32))
    if not np.isfinite(state).all():
        raise InternalError("a normed hidden state is not finite")
    return state.tobytes()


def _whole_units(states: F32, prompt_length: int) -> npt.NDArray[np.int64]:
    wide = states.astype(np.float64)
    largest = float(np.abs(wide).max())
    if not largest * prompt_length < MAX_SUM:  # also for NaN
        raise InternalError(f"a normed hidden state of {largest:g} cannot be averaged over {prompt_length}")
    total: npt.NDArray[np.int64] = np.rint(wide * UNITS).astype(np.int64).sum(axis=0)
    return total


class PooledPrompt:
    """The vector of one prompt while its steps are committed, each exactly once."""

    def __init__(self, pooling: Pooling, *, normalize: bool) -> None:
        self.pooling: Pooling = pooling
        self._normalize = normalize
        self._parts: npt.NDArray[np.int64] | F32 | None = None

    def add(self, part: bytes) -> None:
        """Take in what `step_part` returned."""
        if self.pooling == "mean":
            units = np.frombuffer(part, np.int64)
            self._parts = units if self._parts is None else self._parts + units
        else:
            self._parts = np.frombuffer(part, np.float32)

    def vector(self, prompt_length: int) -> npt.NDArray[np.float32]:
        """Return the vector of the whole prompt, float32 (d_model,); of length 1 if that was asked for.

        A vector of zeros stays one. Raises InternalError when no part has come.
        """
        if self._parts is None:
            raise InternalError("a prompt has ended without a hidden state")
        values = self._parts.astype(np.float64)
        if self.pooling == "mean":
            values /= UNITS * prompt_length
        if self._normalize:
            length = math.sqrt(math.fsum(values * values))
            values /= length or 1.0
        return values.astype(np.float32)
