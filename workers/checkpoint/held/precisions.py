"""Which types a matrix may be converted to when it is read in. No numba."""

from __future__ import annotations

from typing import Final

from ..types.table import TYPES_BY_NAME, TensorType
from .formats import Format, MatrixShape, format_of

FILE_PRECISION: Final = "file"
"""Name of the precision in which everything is as the file has it; always the first."""

TARGETS: Final = ("Q5_K", "Q4_K", "Q3_K", "Q2_K", "TQ2_0")
"""Names of the types that there is an encoder for, finest first."""

BLOCK: Final = 256  # columns of a block of every target


def is_ternary(file_type: TensorType) -> bool:
    """Return whether the file's own weights are ternary: such a model is never quantised again."""
    return file_type.read_codes is not None or file_type.matrix is not None


def held_nbytes(file_type: TensorType, rows: int, columns: int) -> int:
    """Return the bytes in an arena of a (rows, columns) matrix of `file_type`.

    Ternary at two bits; where a file has bits to spare (1.6 for a storage that is small) it only gets less.
    Raises ModelFileError for columns that the type cannot have.
    """
    return MatrixShape(form=format_of(file_type, columns, file_type.name), rows=rows, columns=columns).nbytes


def is_convertible(file_type: TensorType, target: TensorType, rows: int, columns: int) -> bool:
    """Return whether a matrix of the file may be held as `target`: not ternary, and smaller afterwards.

    What counts is the size in memory: a type without a kernel is held as float16, whatever its file size.
    """
    if target.name not in TARGETS or is_ternary(file_type) or columns % BLOCK:
        return False
    return held_nbytes(target, rows, columns) < held_nbytes(file_type, rows, columns)


def held_type(file_type: TensorType, target: str, rows: int, columns: int) -> TensorType:
    """Return the type as which a matrix of the file is held in precision `target`: this or the file's own."""
    wanted = file_type if target == FILE_PRECISION else TYPES_BY_NAME[target]
    return wanted if is_convertible(file_type, wanted, rows, columns) else file_type


def conversion(file_type: TensorType, form: Format) -> TensorType | None:
    """Return the type to which a matrix of the file is converted to be held as `form`, None if it is not.

    A slot's format and the file's type say it all: `form` is that of `held_type`, packed in any storage.
    """
    name = "TQ2_0" if form in (Format.TL1, Format.B3) else form.name
    if is_ternary(file_type) or name not in TARGETS or name == file_type.name:
        return None
    return TYPES_BY_NAME[name]
