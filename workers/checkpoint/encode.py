"""Encoding float32 rows in the file formats that experts are converted to. The kernels are elsewhere."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...shm.errors import InternalError, ModelFileError
from ..kernels import code_blocks, encode, encode_signed
from .formats import Format
from .tiers import TARGETS
from .types import Bytes, Floats, TensorType

_ONE = np.ones(1, np.float32)


class Encoder:
    """The scratch of the encoders; one for each thread."""

    def __init__(self) -> None:
        self._work = np.empty(max(encode.WORK_FLOATS, encode_signed.WORK_FLOATS), np.float32)
        self._codes = np.empty(code_blocks.BLOCK, np.uint8)

    def encode(
        self,
        values: Floats,
        target: TensorType,
        out: Bytes,
        weights: Floats | None = None,
        first_row: int = 0,
    ) -> None:
        """Write `values` (float32 (rows, columns), C-contiguous) as blocks of `target` to `out` (uint8).

        weights: float32 (columns,), above 0: how much an error in a column matters, such as the mean of
        the squares of what the column is multiplied with; first_row: the number of the first row, for
        errors. Nothing is allocated. Raises InternalError for
        another type or size, ModelFileError for a value that is not finite or too large.
        """
        rows, columns = values.shape
        if target.name not in TARGETS or out.size != target.nbytes(values.shape):
            raise InternalError(f"encode ({rows}, {columns}) values as {target.name} in {out.size} bytes")
        if weights is not None and weights.shape != (columns,):
            raise InternalError(f"encode {columns} columns with weights of shape {weights.shape}")
        flat, blocks = values.reshape(-1), values.size // code_blocks.BLOCK
        weighted, per_column = weights is not None, _ONE if weights is None else weights
        if target.name == "TQ2_0":
            failed = encode_signed.tq2_0(flat, columns, blocks, per_column, weighted, out)
        elif target.name == "Q3_K":
            failed = encode_signed.q3_k(
                flat, columns, blocks, per_column, weighted, self._work, self._codes, out
            )
        else:
            form = int(Format[target.name])
            failed = encode.affine(
                form, flat, columns, blocks, per_column, weighted, self._work, self._codes, out
            )
        if failed >= 0:
            raise ModelFileError(
                f"type {target.name}: row {first_row + failed * code_blocks.BLOCK // columns}:"
                " a weight that is not finite or too large to be converted"
            )


def relative_error(values: npt.NDArray[np.float32], decoded: npt.NDArray[np.float32]) -> float:
    """Return sum (decoded - values)^2 / sum values^2, 0 for values that are all 0."""
    wide = values.astype(np.float64)
    whole = float((wide**2).sum())
    return float(((decoded - wide) ** 2).sum()) / whole if whole else 0.0
