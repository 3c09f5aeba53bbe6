"""Arrays described before they are made: who allocates and who plans memory read the same description.

No numba, and no model: what the arrays are for is said in `decoder.buffers`, `experts.buffers` and
`residency.buffers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..shm.layout import Field

Fields = tuple[Field, ...]


def array(name: str, dtype: npt.DTypeLike, *shape: int) -> Field:
    """Return the description of one array."""
    return Field(name=name, dtype=dtype, shape=shape)


def nbytes(fields: Iterable[Field]) -> int:
    """Return the bytes of all arrays."""
    return sum(field.nbytes for field in fields)


def zeros(fields: Iterable[Field]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays by name, zeroed."""
    return {field.name: np.zeros(field.shape, field.dtype) for field in fields}
