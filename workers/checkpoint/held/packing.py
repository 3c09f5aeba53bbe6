"""Packing a matrix from its file bytes into an arena, in the format of `formats`, and naming it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ....shm.errors import ModelFileError
from ...kernels.packing import repack
from ...kernels.products import base3, nibbles, planes, ternary
from ...kernels.products.table import product
from ..types.bitnet import Tiling
from ..types.table import TensorType, check_size, dequantize, ternary_matrix
from .formats import ROW_SCALED, Format, MatrixShape, activation_kind

_K_QUANTS = (Format.Q2_K, Format.Q3_K, Format.Q4_K, Format.Q5_K, Format.Q6_K)
_NIBBLES = (Format.Q4_0, Format.IQ4_NL, Format.MXFP4)
_TERNARY = {
    "TQ2_0": repack.tq2_0,
    "TQ1_0": repack.tq1_0,
    "BITNET_T158": repack.t158,
    "I2_S": repack.i2_s,
    "IQ2_BN": repack.iq2_bn,
    "IQ2_BN_R4": repack.iq2_bn_r4,
}


def matrix_entry(shape: MatrixShape, at: int) -> tuple[int, int, int, int, int]:
    """Return (product, format, codes_at, scales_at, block), as `kernels.ffn` names the matrix at `at`."""
    block = activation_kind(shape.form).block(shape.columns)
    return product(shape.form), int(shape.form), *shape.offsets(at), block


def pack_matrix(
    raw: npt.NDArray[np.uint8],
    file_type: TensorType,
    shape: MatrixShape,
    out: npt.NDArray[np.uint8],
    at: int,
    tiling: Tiling | None = None,
) -> None:
    """Pack `raw` (the tensor's bytes, row-major) into `out` (uint8) from byte `at`.

    tiling: for TL1 and TL2, see `bitnet_types.find_tiling`.
    Raises ModelFileError for bytes that are not of that size, for a ternary block whose codes are not
    ternary, and for a value of a type without a kernel that float16 cannot hold.
    """
    check_size(file_type, raw, (shape.rows, shape.columns))
    codes_at, scales_at = shape.offsets(at)
    if shape.form is Format.F16 and file_type.name != "F16":
        _pack_decoded(raw, file_type, shape, out, codes_at, tiling)
    elif shape.form is Format.B3:
        _pack_base3(raw, file_type, shape, out, at)
    elif file_type.name in ROW_SCALED and file_type.name not in _TERNARY:
        matrix = ternary_matrix(file_type, raw, (shape.rows, shape.columns), tiling)
        ternary.pack_row(matrix.codes, matrix.row_scales(), out, codes_at, scales_at)
    elif file_type.name in _TERNARY:
        pack = _TERNARY[file_type.name]
        if pack(raw, shape.rows, shape.columns, out, codes_at, scales_at) >= 0:
            ternary_matrix(file_type, raw, (shape.rows, shape.columns))  # raises, and names the row
    elif shape.form is Format.Q8:
        pack_q8 = repack.q5_0 if file_type.name == "Q5_0" else repack.q8_0
        pack_q8(raw, shape.rows, shape.columns, out, codes_at, scales_at)
    elif shape.form in _K_QUANTS:
        work = np.empty(planes.WORK_NBYTES, np.uint8)
        planes.pack(int(shape.form), raw, shape.rows, shape.columns, work, out, codes_at, scales_at)
    elif shape.form in _NIBBLES:
        nibbles.pack(int(shape.form), raw, shape.rows, shape.columns, out, codes_at, scales_at)
    else:
        width = 4 if shape.form is Format.F32 else 2
        repack.floats(raw, shape.rows, shape.columns, width, out, codes_at)


def _pack_base3(
    raw: npt.NDArray[np.uint8],
    file_type: TensorType,
    shape: MatrixShape,
    out: npt.NDArray[np.uint8],
    at: int,
) -> None:
    """Pack at two bits first, which is quick, and turn that into base 3."""
    wide = replace(shape, form=Format.TL1)
    packed = np.empty(wide.nbytes, np.uint8)
    pack_matrix(raw, file_type, wide, packed, 0)
    base3.repack(packed, *wide.offsets(0), shape.groups, shape.columns, out, *shape.offsets(at))


def _pack_decoded(
    raw: npt.NDArray[np.uint8],
    file_type: TensorType,
    shape: MatrixShape,
    out: npt.NDArray[np.uint8],
    at: int,
    tiling: Tiling | None,
) -> None:
    """Decode a matrix to float16, 16 rows at a time or whole where a type mixes rows, and pack that."""
    whole = None
    if file_type.matrix is not None:
        whole = ternary_matrix(file_type, raw, (shape.rows, shape.columns), tiling).values()
    for row in range(0, shape.rows, 16):
        rows = min(16, shape.rows - row)
        if whole is not None:
            values = whole[row : row + rows]
        else:
            row_nbytes = file_type.row_bytes(shape.columns)
            part = raw[row * row_nbytes : (row + rows) * row_nbytes]
            values = dequantize(file_type, part, (rows, shape.columns))
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if (np.isinf(halves) & np.isfinite(values)).any():
            raise ModelFileError(
                f"type {file_type.name}: rows {row} to {row + rows - 1}: a weight beyond 65504, the largest"
                " of float16, as which this type is held"
            )
        # Read-only like a file's bytes: numba compiles a function anew for each array type.
        contents = np.frombuffer(halves.tobytes(), np.uint8)
        repack.floats(contents, rows, shape.columns, 2, out, at + row * shape.columns * 2)
