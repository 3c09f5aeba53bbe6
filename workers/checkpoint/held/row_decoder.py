"""Decoding some rows to float32, by a kernel where there is one. Whole tensors: `types.dequantize`."""

from __future__ import annotations

from typing import Final

import numpy as np

from ...kernels.packing import decode
from ...kernels.products import planes
from ..types.table import Bytes, Floats, TensorType, dequantize
from .formats import Format

_K_QUANTS: Final = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class RowDecoder:
    """A buffer for the values, grown when there are more; one for each thread."""

    def __init__(self) -> None:
        self._unpacked = np.empty(planes.WORK_NBYTES, np.uint8)
        self._values = np.empty(0, np.float32)

    def decode(self, raw: Bytes, file_type: TensorType, rows: int, columns: int) -> Floats:
        """Return rows of a file (read-only uint8) as float32 (rows, columns), valid until the next call.

        The values are those of `types.dequantize`, and so are the errors.
        """
        if self._values.size < rows * columns:
            self._values = np.empty(rows * columns, np.float32)
        values = self._values[: rows * columns]
        if file_type.name in _K_QUANTS:
            form = int(Format[file_type.name])
            decode.kquants(form, raw, values.size // planes.BLOCK, self._unpacked, values)
        elif file_type.name == "Q8_0":
            decode.q8_0(raw, values.size // 32, values)
        elif file_type.name in ("F16", "BF16") and values.size % 16 == 0:
            decode.halves(file_type.name == "BF16", raw, values.size, values)
        else:
            return dequantize(file_type, raw, (rows, columns))
        return values.reshape(rows, columns)
