"""The layout of a GGUF file that is to be written: its header as bytes, and where each tensor goes.

Writing is the caller's matter, tensor by tensor in any order. Version 3, little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ....shm.errors import ModelFileError
from ....shm.layout import align
from ..types.table import TensorType
from ..types.ternary import PRIVATE_IDS
from .gguf import TensorInfo
from .metadata import STRING
from .source import quoted

MAGIC: Final = b"GGUF"
VERSION: Final = 3
MAX_TENSOR_NAME_BYTES: Final = 63  # a reader may count the zero that ends it
MAX_DIMENSIONS: Final = 4
_UINT32: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufLayout:
    """A file of `nbytes`: `header` (with the padding behind it), then `tensors`, offsets absolute."""

    header: bytes
    tensors: tuple[TensorInfo, ...]
    nbytes: int


def uint32_value(number: int) -> bytes:
    """Return a metadata value as a file has it: its type and its bytes."""
    return struct.pack("<II", _UINT32, number)


def string_value(text: str) -> bytes:
    """Return a metadata value as a file has it: its type and its bytes."""
    return struct.pack("<I", STRING) + _text(text)


def lay_out(
    keys: Iterable[tuple[str, bytes]],
    tensors: Iterable[tuple[str, tuple[int, ...], TensorType]],
    alignment: int,
) -> GgufLayout:
    """Return the layout of a file with these keys (name, value with its type) and tensors (numpy shapes).

    Tensors lie in that order, each at the next multiple of `alignment`, as llama.cpp demands; a type whose
    id was given twice gets the one that its files have. Raises ModelFileError for a name that is too long,
    too many dimensions or a shape that the type cannot have.
    """
    pairs, placed, offset = list(keys), [], 0
    for name, shape, file_type in tensors:
        if len(name.encode()) > MAX_TENSOR_NAME_BYTES or not 1 <= len(shape) <= MAX_DIMENSIONS:
            limits = f"at most {MAX_TENSOR_NAME_BYTES} bytes and 1 to {MAX_DIMENSIONS} dimensions"
            raise ModelFileError(f"tensor {quoted(name)} of shape {shape}: expected {limits}")
        nbytes = file_type.nbytes(shape)
        placed.append(TensorInfo(name=name, shape=shape, type=file_type, offset=offset, nbytes=nbytes))
        offset += align(nbytes, alignment)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(placed), len(pairs))]
    parts += [_text(name) + value for name, value in pairs]
    parts += [_described(info) for info in placed]
    header = b"".join(parts)
    start = align(len(header), alignment)
    return GgufLayout(
        header=header.ljust(start, b"\0"),
        tensors=tuple(
            TensorInfo(
                name=info.name,
                shape=info.shape,
                type=info.type,
                offset=start + info.offset,
                nbytes=info.nbytes,
            )
            for info in placed
        ),
        nbytes=start + offset,
    )


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _described(info: TensorInfo) -> bytes:
    ne = info.ne
    file_id = info.type.id % PRIVATE_IDS
    return _text(info.name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, file_id, info.offset)
