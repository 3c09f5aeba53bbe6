"""Arena formats: how a matrix of each file type lies in memory, and how large it is.

Pure arithmetic and names; the packing itself needs the kernels and is in `packing`. The daemon
imports this to size arenas, and it must not import numba.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from ....shm.errors import ModelFileError
from ....shm.layout import align
from ..types.bitnet import TILED
from ..types.table import TensorType


class Format(IntEnum):
    """The formats of `workers.kernels`; the numbers are those of `kernels.products`."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8 = 3
    TL1 = 4  # ternary, 2 bits, float16 scales of 256 columns
    B3 = 5  # the same in base 3, 1.6 bits
    TL1_ROW = 6  # ternary, 2 bits, a float32 scale for each row
    TL1_TOKEN = 7  # the same bytes; reads activations with one scale for each token
    Q2_K = 16
    Q3_K = 17
    Q4_K = 18
    Q5_K = 19
    Q6_K = 20
    Q4_0 = 24
    IQ4_NL = 25
    MXFP4 = 26


class ActivationKind(IntEnum):
    """What a kernel reads: float32 rows, or int8 rows in blocks of that many values; TOKEN: the whole row."""

    FLOAT = 0
    TOKEN = 1
    Q8_32 = 32
    Q8_256 = 256

    def block(self, width: int) -> int:
        """Return how many values of a row of `width` share a scale, 0 for FLOAT."""
        return width if self is ActivationKind.TOKEN else int(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How ternary matrices are held and read where there is a choice; the same in all processes."""

    small: bool = False
    """1.6 bits a weight instead of 2, for types with block scales."""
    per_token: bool = False
    """Activations with one scale for each token, not for each 256 values, for types with row scales."""


DEFAULT_STORAGE = Storage()

TERNARY = frozenset({Format.TL1, Format.B3, Format.TL1_ROW, Format.TL1_TOKEN})
"""Formats of ternary weights."""

ROW_SCALED = ("I2_S", "IQ1_BN", "IQ2_BN", "IQ2_BN_R4", "TL1", "TL2")
"""Names of the ternary file types with a scale for each row, or one for all."""

# File type -> (format, multiple that the columns must have).
_FORMAT_OF = {
    "F32": (Format.F32, 4),
    "F16": (Format.F16, 4),
    "BF16": (Format.BF16, 4),
    "Q8_0": (Format.Q8, 32),
    "Q5_0": (Format.Q8, 32),  # code - 16 with the same scale: exact
    "TQ2_0": (Format.TL1, 256),
    "TQ1_0": (Format.TL1, 256),
    "BITNET_T158": (Format.TL1, 256),
    **dict.fromkeys(ROW_SCALED, (Format.TL1_ROW, 256)),
    "Q2_K": (Format.Q2_K, 256),
    "Q3_K": (Format.Q3_K, 256),
    "Q4_K": (Format.Q4_K, 256),
    "Q5_K": (Format.Q5_K, 256),
    "Q6_K": (Format.Q6_K, 256),
    "Q4_0": (Format.Q4_0, 32),
    "IQ4_NL": (Format.IQ4_NL, 32),
    "MXFP4": (Format.MXFP4, 32),
}
KERNEL_TYPES = tuple(name for name in _FORMAT_OF if name not in TILED)
"""Names of the file types that are multiplied as they are; others are decoded at load."""

_FLOAT_WIDTH = {Format.F32: 4, Format.F16: 2, Format.BF16: 2}


@dataclass(frozen=True, slots=True)
class _RowGroupLayout:
    """Bytes of 16 rows: codes per 32 columns, scales per block of activations, scales of whole rows."""

    reads: ActivationKind
    code_nbytes: int
    scale_nbytes: int
    row_scale_nbytes: int = 0


_LAYOUTS = {
    Format.Q8: _RowGroupLayout(ActivationKind.Q8_32, 512, 32),
    Format.TL1: _RowGroupLayout(ActivationKind.Q8_256, 128, 32),
    # 13 packets of 64 bytes hold 16 rows of 256 columns.
    Format.B3: _RowGroupLayout(ActivationKind.Q8_256, 104, 32),
    Format.TL1_ROW: _RowGroupLayout(ActivationKind.Q8_256, 128, 0, 64),
    Format.TL1_TOKEN: _RowGroupLayout(ActivationKind.TOKEN, 128, 0, 64),
    Format.Q2_K: _RowGroupLayout(ActivationKind.Q8_256, 128, 320),
    Format.Q3_K: _RowGroupLayout(ActivationKind.Q8_256, 192, 288),
    Format.Q4_K: _RowGroupLayout(ActivationKind.Q8_256, 256, 320),
    Format.Q5_K: _RowGroupLayout(ActivationKind.Q8_256, 320, 320),
    Format.Q6_K: _RowGroupLayout(ActivationKind.Q8_256, 384, 288),
    Format.Q4_0: _RowGroupLayout(ActivationKind.Q8_32, 256, 32),
    Format.IQ4_NL: _RowGroupLayout(ActivationKind.Q8_32, 256, 32),
    Format.MXFP4: _RowGroupLayout(ActivationKind.Q8_32, 256, 16),
}


def is_decoded_at_load(file_type: TensorType) -> bool:
    """Return whether matrices of `file_type` have no kernel and become float16 when they are loaded.

    This is the slow path: two bytes a weight whatever the file holds, and float products.
    """
    return file_type.name not in _FORMAT_OF


def kernel_type(file_type: TensorType) -> str:
    """Return the name of a type whose matrices are packed by the same kernels as those of `file_type`."""
    if file_type.name in TILED:
        return "IQ1_BN"  # both become codes first
    return "F16" if is_decoded_at_load(file_type) else file_type.name


_SMALL = {Format.TL1: Format.B3}
_PER_TOKEN = {Format.TL1_ROW: Format.TL1_TOKEN}


def format_of(file_type: TensorType, columns: int, where: str, storage: Storage = DEFAULT_STORAGE) -> Format:
    """Return the arena format for a matrix of `file_type`; `where` names file and tensor.

    Raises ModelFileError for a type that cannot be decoded or columns that its kernel cannot take.
    """
    if is_decoded_at_load(file_type) and file_type.decode is None:
        raise ModelFileError(f"{where}: type {file_type.name} cannot be computed with or decoded")
    form, multiple = _FORMAT_OF.get(file_type.name, (Format.F16, 4))
    if columns % multiple:
        raise ModelFileError(
            f"{where}: {columns} columns, expected a multiple of {multiple} for {file_type.name}"
        )
    form = _SMALL.get(form, form) if storage.small else form
    return _PER_TOKEN.get(form, form) if storage.per_token else form


def activation_kind(form: Format) -> ActivationKind:
    """Return what the kernel of `form` reads."""
    return _LAYOUTS[form].reads if form in _LAYOUTS else ActivationKind.FLOAT


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
        if self.form in _FLOAT_WIDTH:
            return self.groups * 16 * self.columns * _FLOAT_WIDTH[self.form]
        return self.groups * (self.columns // 32) * _LAYOUTS[self.form].code_nbytes

    @property
    def scales_nbytes(self) -> int:
        """Bytes of the scale area, 0 for a float matrix."""
        if self.form in _FLOAT_WIDTH:
            return 0
        layout = _LAYOUTS[self.form]
        blocks = self.columns // layout.reads.block(self.columns)
        return self.groups * (blocks * layout.scale_nbytes + layout.row_scale_nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of both areas, each rounded up to 64."""
        return align(self.codes_nbytes) + align(self.scales_nbytes)

    def offsets(self, at: int) -> tuple[int, int]:
        """Return (codes_at, scales_at) of this matrix when it starts at byte `at`."""
        return at, at + align(self.codes_nbytes)
