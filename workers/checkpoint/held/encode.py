"""Encoding float32 rows in the block types of files. The kernels are in `workers.kernels.packing`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from ....shm.errors import InternalError, ModelFileError
from ...kernels.packing import code_blocks, encode, encode_signed, encode_ternary
from ..types.table import Bytes, Floats, TensorType
from .formats import Format
from .precisions import TARGETS

ENCODED: Final = ("Q6_K", *TARGETS, "TQ1_0")
"""Names of the types that `Encoder` writes, finest first."""

SCALE_RULES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "lloyd-max": encode_ternary.LLOYD_MAX,
        "least-squares": encode_ternary.LEAST_SQUARES,
        "absmean": encode_ternary.ABSMEAN,
    }
)
"""How a ternary block gets its threshold and scale, the best first; what they do: `encode_ternary`."""

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
        scales: str = "lloyd-max",
    ) -> None:
        """Write `values` (float32 (rows, columns), C-contiguous) as blocks of `target` to `out` (uint8).

        weights: float32 (columns,), above 0: how much an error in a column matters, such as the mean of
        the squares of what the column is multiplied with; first_row: the number of the first row, for
        errors; scales: one of SCALE_RULES, for ternary types. Nothing is allocated. Raises InternalError for
        a type that is not in ENCODED or another size, ModelFileError for a value that is not finite
        or too large.
        """
        rows, columns = values.shape
        if target.name not in ENCODED or out.size != target.nbytes(values.shape):
            raise InternalError(f"encode ({rows}, {columns}) values as {target.name} in {out.size} bytes")
        if weights is not None and weights.shape != (columns,):
            raise InternalError(f"encode {columns} columns with weights of shape {weights.shape}")
        flat, blocks = values.reshape(-1), values.size // code_blocks.BLOCK
        weighted, per_column = weights is not None, _ONE if weights is None else weights
        form = int(Format.__members__.get(target.name, Format.TL1))
        if target.name in ("TQ2_0", "TQ1_0"):
            rule, base3 = SCALE_RULES[scales], target.name == "TQ1_0"
            failed = encode_ternary.ternary(
                rule, base3, flat, columns, blocks, per_column, weighted, self._codes, out
            )
        else:
            kernel = encode_signed.signed if target.name in ("Q3_K", "Q6_K") else encode.affine
            failed = kernel(form, flat, columns, blocks, per_column, weighted, self._work, self._codes, out)
        if failed >= 0:
            # Two blocks at a time are encoded as Q4_K and Q5_K: the larger weights are in the one at fault.
            together = 2 if target.name in ("Q4_K", "Q5_K") else 1
            at = failed * code_blocks.BLOCK
            sizes = np.abs(flat[at : at + together * code_blocks.BLOCK])
            row = first_row + (at + int(np.where(np.isnan(sizes), np.inf, sizes).argmax())) // columns
            raise ModelFileError(
                f"type {target.name}: row {row}: a weight that is not finite or too large to be converted"
            )


def relative_error(values: npt.NDArray[np.float32], decoded: npt.NDArray[np.float32]) -> float:
    """Return sum (decoded - values)^2 / sum values^2, 0 for values that are all 0."""
    wide = values.astype(np.float64)
    whole = float((wide**2).sum())
    return float(((decoded - wide) ** 2).sum()) / whole if whole else 0.0
