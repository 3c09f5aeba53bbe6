"""Packing a matrix from its file bytes into an arena, in the format of `formats`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..kernels import floating, q8, ternary
from .formats import Format, MatrixShape
from .types import TensorType, ternary_codes


def pack_matrix(
    raw: npt.NDArray[np.uint8],
    file_type: TensorType,
    shape: MatrixShape,
    out: npt.NDArray[np.uint8],
    at: int,
) -> None:
    """Pack `raw` (the tensor's bytes, row-major) into `out` (uint8) from byte `at`.

    Raises ModelFileError for a ternary block whose codes are not ternary.
    """
    codes_at, scales_at = shape.place(at)
    if shape.form is Format.TL1:
        codes, scales = ternary_codes(file_type, raw, (shape.rows, shape.columns))
        # The file's scales are float16 widened to float32, so that narrowing is exact.
        ternary.pack(codes, scales.astype(np.float16).view(np.uint16), out, codes_at, scales_at)
    elif shape.form is Format.Q8:
        q8.pack(raw, shape.rows, shape.columns, out, codes_at, scales_at)
    else:
        width = 4 if shape.form is Format.F32 else 2
        floating.pack(raw, shape.rows, shape.columns, width, out, codes_at)
