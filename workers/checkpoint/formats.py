"""Arena formats: how a matrix of each file type lies in memory, and how large it is.

Pure arithmetic and names; the packing itself needs the kernels and is in `packing`. The daemon
imports this to size arenas, and it must not import numba.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from ...shm.errors import ModelFileError
from ...shm.layout import align
from .types import TensorType


class Format(IntEnum):
    """The formats of `workers.kernels`; the numbers are those of `kernels.ffn`."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8 = 3
    TL1 = 4


class ActivationKind(IntEnum):
    """What a kernel reads: float32 rows, or int8 rows in blocks of that many values."""

    FLOAT = 0
    Q8_32 = 32
    Q8_256 = 256


# File type -> (format, multiple that the columns must have).
_FORMAT_OF = {
    "F32": (Format.F32, 4),
    "F16": (Format.F16, 4),
    "BF16": (Format.BF16, 4),
    "Q8_0": (Format.Q8, 32),
    "TQ2_0": (Format.TL1, 256),
    "TQ1_0": (Format.TL1, 256),
}
_READS = {Format.Q8: ActivationKind.Q8_32, Format.TL1: ActivationKind.Q8_256}
_FLOAT_WIDTH = {Format.F32: 4, Format.F16: 2, Format.BF16: 2}


def format_of(file_type: TensorType, columns: int, where: str) -> Format:
    """Return the arena format for a matrix of `file_type`; `where` names file and tensor.

    Raises ModelFileError for a type without kernels or columns that its kernel cannot take.
    """
    if file_type.name not in _FORMAT_OF:
        raise ModelFileError(
            f"{where}: type {file_type.name} cannot be computed with yet; supported: {', '.join(_FORMAT_OF)}"
        )
    form, multiple = _FORMAT_OF[file_type.name]
    if columns % multiple:
        raise ModelFileError(
            f"{where}: {columns} columns, expected a multiple of {multiple} for {file_type.name}"
        )
    return form


def activation_kind(form: Format) -> ActivationKind:
    """Return what the kernel of `form` reads."""
    return _READS.get(form, ActivationKind.FLOAT)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixShape:
    """A packed matrix of `rows` x `columns` in format `form`."""

    form: Format
    rows: int
    columns: int

    @property
    def groups(self) -> int:
        """Number of 16-row groups; the last one is padded with zero rows."""
        return -(-self.rows // 16)

    @property
    def codes_nbytes(self) -> int:
        """Bytes of the code area (all of a float matrix)."""
        weights = self.groups * 16 * self.columns
        if self.form is Format.TL1:
            return weights // 4
        return weights if self.form is Format.Q8 else weights * _FLOAT_WIDTH[self.form]

    @property
    def scales_nbytes(self) -> int:
        """Bytes of the scale area: one float16 per row and block."""
        kind = activation_kind(self.form)
        if kind is ActivationKind.FLOAT:
            return 0
        return self.groups * 16 * (self.columns // kind) * 2

    @property
    def nbytes(self) -> int:
        """Bytes of both areas, each rounded up to 64."""
        return align(self.codes_nbytes) + align(self.scales_nbytes)

    def place(self, at: int) -> tuple[int, int]:
        """Return (codes_at, scales_at) of this matrix when it starts at byte `at`."""
        return at, at + align(self.codes_nbytes)
