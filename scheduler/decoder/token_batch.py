"""The tokens of one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The tokens of one step: ids, and for each its stream record and position (all int32, (T,))."""

    ids: npt.NDArray[np.int32]
    streams: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
