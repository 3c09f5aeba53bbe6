"""GGML tensor types: sizes of all that are known, decoders of those that can be run.

A type is one entry of `TENSOR_TYPES`; a decoder or a ternary view is a function over raw blocks in
that entry. Layouts are those of ggml (little endian). Not here: decoders of the many block types
(`blocks`, `grids`), kernels and packing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from ....shm.errors import ModelFileError
from . import blocks as block_types
from . import grids, ternary
from .bitnet import Tiling
from .ternary import MatrixType, TernaryMatrix, digits

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
# uint8 (blocks, block_bytes) -> float32 (blocks, block_elements)
Decoder: TypeAlias = Callable[[Bytes], Floats]
# uint8 (blocks, block_bytes) -> codes uint8 (blocks, block_elements), scales float32 (blocks,)
CodeReader: TypeAlias = Callable[[Bytes], tuple[Bytes, Floats]]

_CHUNK_ELEMENTS: Final = 1 << 20  # decoded at a time, which bounds the temporaries to some 10 MiB


@dataclass(frozen=True, slots=True)
class TensorType:
    """A storage type: rows are whole blocks of `block_elements` values in `block_bytes` bytes."""

    id: int
    name: str
    block_elements: int
    block_bytes: int
    decode: Decoder | None = None
    read_codes: CodeReader | None = None
    matrix: MatrixType | None = None  # set for types that are not equal blocks one after the other

    def __repr__(self) -> str:
        return f"TensorType({self.name}, id {self.id})"

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of a row of `cols` values; ModelFileError if it is not whole blocks."""
        if self.matrix is not None:
            raise ModelFileError(f"type {self.name}: rows cannot be taken out of the tensor one by one")
        if cols % self.block_elements:
            raise ModelFileError(
                f"type {self.name}: expected a row length divisible by {self.block_elements}, found {cols}"
            )
        return cols // self.block_elements * self.block_bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of `shape` (numpy order: rows along the last axis).

        ModelFileError for a shape that the type cannot have.
        """
        if self.matrix is not None:
            return self.matrix.measure(shape)
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])


def _decode_f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _decode_f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _decode_bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _decode_q8_0(blocks: Bytes) -> Floats:
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)  # (blocks, 1)
    values: Floats = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= scales
    return values


def _read_scales(blocks: Bytes) -> Floats:
    """Return the fp16 that ends each block, as float32 (blocks,)."""
    return np.ascontiguousarray(blocks[:, -2:]).view("<f2").astype(np.float32)[:, 0]


def _read_codes_tq2_0(blocks: Bytes) -> tuple[Bytes, Floats]:
    # Byte m of half h holds in bits 2l the code of element 128h + 32l + m.
    packed = blocks[:, :64].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    codes = (packed >> shifts) & np.uint8(3)  # (blocks, half, l, m)
    return codes.reshape(-1, 256), _read_scales(blocks)


def _read_codes_tq1_0(blocks: Bytes) -> tuple[Bytes, Floats]:
    parts = (digits(blocks[:, :32], 5), digits(blocks[:, 32:48], 5), digits(blocks[:, 48:52], 4))
    return np.concatenate(parts, axis=1), _read_scales(blocks)


def _decoder_from(read_codes: CodeReader) -> Decoder:
    def decode(blocks: Bytes) -> Floats:
        codes, scales = read_codes(blocks)
        values: Floats = codes.astype(np.float32)
        values -= np.float32(1)
        values *= scales[:, np.newaxis]
        return values

    return decode


# Sizes are ggml's. Q8_1 is 36 bytes there (two fp16), the gguf package says 40; no file stores it.
_SIZES: Final = (
    (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 36), (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
    (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18), *ternary.SIZES,
)  # fmt: skip
_CODE_READERS: Final[dict[str, CodeReader]] = {
    "TQ1_0": _read_codes_tq1_0,
    "TQ2_0": _read_codes_tq2_0,
    **ternary.CODE_READERS,
}
_DECODERS: Final[dict[str, Decoder]] = {
    "F32": _decode_f32,
    "F16": _decode_f16,
    "BF16": _decode_bf16,
    "Q8_0": _decode_q8_0,
    **{name: _decoder_from(read) for name, read in _CODE_READERS.items()},
    **block_types.DECODERS,
    **grids.DECODERS,
}

TENSOR_TYPES: Final[Mapping[int, TensorType]] = MappingProxyType(
    {
        row[0]: replace(
            TensorType(*row),
            decode=_DECODERS.get(row[1]),
            read_codes=_CODE_READERS.get(row[1]),
            matrix=ternary.MATRICES.get(row[1]),
        )
        for row in _SIZES
    }
)
TYPES_BY_NAME: Final[Mapping[str, TensorType]] = MappingProxyType({t.name: t for t in TENSOR_TYPES.values()})


def candidates(type_id: int) -> tuple[TensorType, ...]:
    """Return the types that id `type_id` in a file may mean, ggml's first; empty if it is unknown.

    More than one where projects have given an id twice: then the size decides. See `is_claimed`.
    """
    if type_id not in TENSOR_TYPES or type_id >= ternary.PRIVATE_IDS:
        return ()
    others = ternary.CLAIMED.get(type_id, ())
    return (TENSOR_TYPES[type_id], *(TENSOR_TYPES[other] for other in others))


def is_claimed(type_id: int) -> bool:
    """Return whether the id alone does not say what a tensor is, because it has had two meanings."""
    return type_id in ternary.CLAIMED


# Ids that are not ggml's (any more); only for telling the user what the file probably holds.
FOREIGN_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        4: "the retired Q4_2",
        5: "the retired Q4_3",
        31: "the retired Q4_0_4_4",
        32: "the retired Q4_0_4_8",
        33: "the retired Q4_0_8_8",
        37: "I8_S of BitNet, or the retired IQ4_NL_4_8",
    }
)


def check_size(tensor_type: TensorType, data: Bytes, shape: tuple[int, ...]) -> Bytes:
    """Return `data` (uint8) contiguous; ModelFileError unless they are as many bytes as `shape` takes."""
    expected = tensor_type.nbytes(shape)
    if data.dtype != np.uint8 or data.size != expected:
        raise ModelFileError(
            f"type {tensor_type.name}, shape {shape}: expected {expected} bytes,"
            f" found {data.size} elements of {data.dtype}"
        )
    return np.ascontiguousarray(data)


def _blocks(tensor_type: TensorType, data: Bytes, shape: tuple[int, ...]) -> Bytes:
    return check_size(tensor_type, data, shape).reshape(-1, tensor_type.block_bytes)


def dequantize(tensor_type: TensorType, data: Bytes, shape: tuple[int, ...]) -> Floats:
    """Return the values of a tensor as a new float32 array of `shape` (numpy order).

    `data` are the tensor's bytes, uint8. The values are bit for bit those of the gguf package;
    scales that are not finite give inf and NaN silently. ModelFileError if the type has no decoder
    or the sizes do not agree.
    """
    if tensor_type.matrix is not None:
        return ternary_matrix(tensor_type, data, shape).values().reshape(shape)
    decode = tensor_type.decode
    if decode is None:
        raise ModelFileError(
            f"tensor type {tensor_type.name} (id {tensor_type.id}) cannot be decoded;"
            f" supported are {', '.join(sorted(_DECODERS))}"
        )
    blocks = _blocks(tensor_type, data, shape)
    values = np.empty((len(blocks), tensor_type.block_elements), np.float32)
    step = max(1, _CHUNK_ELEMENTS // tensor_type.block_elements)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), step):
            values[first : first + step] = decode(blocks[first : first + step])
    return values.reshape(shape)


def ternary_codes(tensor_type: TensorType, data: Bytes, shape: tuple[int, ...]) -> tuple[Bytes, Floats]:
    """Return the codes {0, 1, 2} of a ternary tensor and its block scales; a weight is (code-1)*scale.

    codes uint8 (rows, cols), scales float32 (rows, cols / block), where cols is the last axis of
    `shape` and rows the product of the others. ModelFileError if the type is not ternary or not of
    blocks with a scale each (`ternary_matrix` takes all), the sizes do not agree or a code is 3.
    """
    read_codes = tensor_type.read_codes
    if read_codes is None:
        raise _not_ternary(tensor_type, _CODE_READERS)
    blocks = _blocks(tensor_type, data, shape)
    codes = np.empty((len(blocks), tensor_type.block_elements), np.uint8)
    scales = np.empty(len(blocks), np.float32)
    step = max(1, _CHUNK_ELEMENTS // tensor_type.block_elements)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), step):
            chosen = slice(first, first + step)
            codes[chosen], scales[chosen] = read_codes(blocks[chosen])
    codes = codes.reshape(-1, shape[-1])
    _refuse_threes(tensor_type, codes, shape)
    return codes, scales.reshape(len(codes), -1)


def _not_ternary(tensor_type: TensorType, supported: Iterable[str]) -> ModelFileError:
    what = "ternary" if tensor_type.matrix is None else "of blocks with a scale each"
    return ModelFileError(
        f"tensor type {tensor_type.name} (id {tensor_type.id}) is not {what};"
        f" supported are {', '.join(sorted(supported))}"
    )


def _refuse_threes(tensor_type: TensorType, codes: Bytes, shape: tuple[int, ...]) -> None:
    if codes.max(initial=0) > 2:
        row, col = np.argwhere(codes > 2)[0].tolist()
        raise ModelFileError(
            f"type {tensor_type.name}, shape {shape}: row {row}, column {col}:"
            f" expected a code of 0, 1 or 2, found {codes[row, col]}"
        )


def ternary_matrix(
    tensor_type: TensorType, data: Bytes, shape: tuple[int, ...], tiling: Tiling | None = None
) -> TernaryMatrix:
    """Return a ternary tensor of any type as codes and scales as stored; rows as in `ternary_codes`.

    tiling: for TL1 and TL2, see `bitnet_types.find_tiling`. ModelFileError as `ternary_codes`, and for
    tile sizes that are missing or do not divide the matrix.
    """
    if tensor_type.matrix is None:
        if tensor_type.read_codes is None:
            raise _not_ternary(tensor_type, (*_CODE_READERS, *ternary.MATRICES))
        codes, wide = ternary_codes(tensor_type, data, shape)
        with np.errstate(all="ignore"):
            scales = wide.astype(np.float16)  # exact: they were float16 in the file
        return TernaryMatrix(codes=codes, scales=scales, group=tensor_type.block_elements)
    data = check_size(tensor_type, data, shape)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    matrix = tensor_type.matrix.read(data, rows, columns, tiling)
    _refuse_threes(tensor_type, matrix.codes, shape)
    return matrix
