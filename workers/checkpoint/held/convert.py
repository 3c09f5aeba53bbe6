"""Conversion of a matrix from its file type to a smaller one while it is read in.

`convert` gives the bytes as a file of the target type would hold them; `packing.pack_matrix` takes them from
there. The same bytes always give the same bytes. Which conversions there are is in `tiers`.
"""

from __future__ import annotations

import numpy as np

from ....shm.errors import InternalError
from ..types.table import TYPES_BY_NAME, Bytes, Floats, TensorType, check_size, dequantize
from .encode import Encoder, relative_error
from .precisions import TARGETS, is_convertible, is_ternary
from .row_decoder import RowDecoder

_ROWS = 16  # decoded at a time, so that they stay in the processor's cache


class Converter:
    """Buffers of a conversion, grown when a larger matrix comes; one for each thread."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._decoder = RowDecoder()
        self._out = np.empty(0, np.uint8)

    def convert(
        self,
        raw: Bytes,
        file_type: TensorType,
        rows: int,
        columns: int,
        target: TensorType,
        weights: Floats | None = None,
    ) -> Bytes:
        """Return the matrix `raw` (read-only uint8, row after row) as bytes of `target`, read-only uint8.

        They are valid until the next call. weights: see `Encoder.encode`. Raises InternalError for a
        conversion that `tiers.is_convertible` forbids, ModelFileError for bytes that are not of that size
        or weights that are not finite.
        """
        if not is_convertible(file_type, target, rows, columns):
            why = (
                "its weights are ternary" if is_ternary(file_type) else f"({rows}, {columns}) gets no smaller"
            )
            raise InternalError(f"type {file_type.name} is not converted to {target.name}: {why}")
        raw = check_size(file_type, raw, (rows, columns))
        nbytes, row_nbytes = target.nbytes((rows, columns)), file_type.row_bytes(columns)
        if self._out.size < nbytes:
            self._out = np.empty(nbytes, np.uint8)
        out = self._out[:nbytes]
        for row in range(0, rows, _ROWS):
            count = min(_ROWS, rows - row)
            part = raw[row * row_nbytes : (row + count) * row_nbytes]
            values = self._decoder.decode(part, file_type, count, columns)
            to = target.row_bytes(columns)
            self._encoder.encode(values, target, out[row * to : (row + count) * to], weights, row)
        result = out.view()
        result.flags.writeable = False
        return result

    def error(self, raw: Bytes, file_type: TensorType, rows: int, columns: int, target: TensorType) -> float:
        """Return what conversion loses: sum of squared differences / sum of squares, 0 if not convertible."""
        if not is_convertible(file_type, target, rows, columns):
            return 0.0
        after = dequantize(target, self.convert(raw, file_type, rows, columns, target), (rows, columns))
        return relative_error(dequantize(file_type, raw, (rows, columns)), after)


def warm() -> None:
    """Compile or load every kernel of a conversion, for a process that others are forked from."""
    converter = Converter()
    for name in ("F16", "Q8_0", "Q6_K"):
        file_type = TYPES_BY_NAME[name]
        raw = np.frombuffer(bytes(file_type.nbytes((1, 256))), np.uint8)
        for target in TARGETS:
            converter.convert(raw, file_type, 1, 256, TYPES_BY_NAME[target])
