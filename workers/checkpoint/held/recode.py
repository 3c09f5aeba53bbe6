"""From rows of one file type to rows of another, a few at a time; what it costs in precision is sampled.

Not in here: which tensors become what (`runtime.quantize.plan`), and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from ....shm.errors import ModelFileError
from ..types.plain import PLAIN, encode_plain
from ..types.table import Bytes, Floats, TensorType
from .encode import ENCODED, Encoder
from .row_decoder import RowDecoder

WRITABLE: Final = (*PLAIN, *ENCODED)
"""Names of the types that a tensor can be given."""

_CHUNK_ELEMENTS: Final = 1 << 16  # decoded at a time: 256 KiB, which stay in a cache


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums over weights that were looked at: squares of what was lost, and squares."""

    lost: float = 0.0
    whole: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.lost + other.lost, self.whole + other.whole)


class Recoder:
    """Scratch for recoding; one for each thread."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._source = RowDecoder()
        self._written = RowDecoder()

    def recode(
        self,
        raw: Bytes,
        source: TensorType,
        target: TensorType,
        columns: int,
        out: Bytes,
        *,
        weights: Floats | None = None,
        scales: str = "lloyd-max",
        first_row: int = 0,
        measure_every: int = 1,
    ) -> Loss:
        """Write rows `raw` of `source` (read-only uint8) as rows of `target` to `out` (uint8).

        weights, scales: see `Encoder.encode`, not used by plain types. Rows are worked on in chunks, of which
        each `measure_every`-th is decoded again to see what was lost. Raises ModelFileError for values that
        the target cannot hold, naming rows from `first_row` on.
        """
        row_from, row_to = source.row_bytes(columns), target.row_bytes(columns)
        rows, step = raw.size // row_from, max(1, _CHUNK_ELEMENTS // columns)
        loss = Loss()
        for chunk, row in enumerate(range(0, rows, step)):
            count = min(step, rows - row)
            part = raw[row * row_from : (row + count) * row_from]
            values = self._source.decode(part, source, count, columns)
            written = out[row * row_to : (row + count) * row_to]
            if target.name in PLAIN:
                failed = encode_plain(values, target.name, written)
                if failed >= 0:
                    where = f"type {target.name}: row {first_row + row + failed}"
                    raise ModelFileError(f"{where}: a weight that is not finite or too large")
            else:
                self._encoder.encode(values, target, written, weights, first_row + row, scales)
            if chunk % measure_every == 0:
                loss += self._loss(values, written, target)
        return loss

    def _loss(self, values: Floats, written: Bytes, target: TensorType) -> Loss:
        frozen = written.view()
        frozen.flags.writeable = False
        difference = self._written.decode(frozen, target, *values.shape) - values
        return Loss(float(np.vdot(difference, difference)), float(np.vdot(values, values)))


def chunks_of(rows: int, columns: int) -> int:
    """Return into how many chunks `recode` divides `rows` rows."""
    return -(-rows // max(1, _CHUNK_ELEMENTS // columns))
