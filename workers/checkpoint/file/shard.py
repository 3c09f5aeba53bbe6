"""One file of a model: header, tensor table, tensor bytes (`Shard`, `TensorInfo`); bounded.

Reads GGUF versions 2 and 3, little endian. Whatever the bytes are, opening either raises one SternaError
that names the offset or gives tensors that lie inside the file and do not overlap; every count is
limited before anything is allocated for it. Not here: metadata values (`metadata.py`), tensor types
(`checkpoint/types/`), models of several files (`gguf.py`, `split.py`).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Self, TypeVar

from ....shm.errors import ModelFileError
from ..types.table import FOREIGN_TYPES, TensorType, candidates, is_claimed
from .metadata import MAX_KEYS, MIN_KEY_BYTES, Metadata
from .source import HeaderReader, Source, quoted, refusal

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_TENSORS: Final = 65_536
MAX_TENSOR_NAME_BYTES: Final = 64
MAX_DIMENSIONS: Final = 4
MIN_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension
DEFAULT_ALIGNMENT: Final = 32
MIN_ALIGNMENT: Final = 8
MAX_ALIGNMENT: Final = 1 << 20

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a model."""

    name: str
    shape: tuple[int, ...]
    """In numpy order: outermost first, rows of the last axis contiguous. `ne` is the same reversed, as
    GGUF stores it."""
    type: TensorType
    offset: int
    """First byte, counted from the start of its file."""
    nbytes: int
    file: int = 0
    """Number of its file."""

    @property
    def ne(self) -> tuple[int, ...]:
        """The dimensions in GGUF order, contiguous axis first."""
        return self.shape[::-1]


@dataclass(frozen=True, slots=True)
class _Declared:
    """A tensor as the header states it: `info.offset` is still relative to the data.

    `info.type` and `info.nbytes` are of the first of the types that `type_id` may mean.
    """

    info: TensorInfo
    offset_at: int
    type_id: int


def _read_magic(reader: HeaderReader) -> int:
    reader.what = "header"
    magic = reader.bytes_of(4, "magic")
    if magic != MAGIC:
        raise reader.refusal(f"the magic {MAGIC!r}", repr(magic), at=0)
    version = reader.uint32("version")
    if version in VERSIONS:
        return version
    swapped = struct.unpack("<I", struct.pack(">I", version))[0]
    found = f"big-endian version {swapped}" if 1 <= swapped <= max(VERSIONS) else f"version {version}"
    raise reader.refusal("little-endian version 2 or 3", found, at=4)


def _read_count(reader: HeaderReader, what: str, limit: int, min_bytes_each: int) -> int:
    at = reader.at
    count = reader.uint64(f"the number of {what}")
    if count > limit:
        raise reader.refusal(f"at most {limit} {what}", count, at=at)
    if count * min_bytes_each > reader.bytes_left:
        wanted = f"{count} {what}, at least {count * min_bytes_each} bytes"
        raise reader.refusal(wanted, f"{reader.bytes_left} bytes left in the file", at=at)
    return count


def _read_shape(reader: HeaderReader) -> tuple[int, ...]:
    at = reader.at
    n_dims = reader.uint32("the number of dimensions")
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise reader.refusal(f"1 to {MAX_DIMENSIONS} dimensions", n_dims, at=at)
    ne = []
    for axis in range(n_dims):
        size = reader.uint64(f"dimension {axis}")
        if size == 0:
            raise reader.refusal(f"dimension {axis} of at least 1", 0, at=reader.at - 8)
        ne.append(size)
    if math.prod(ne) >= 1 << 63:
        raise reader.refusal("fewer than 2^63 elements", " x ".join(map(str, ne)), at=at + 4)
    return tuple(reversed(ne))


def _read_type(reader: HeaderReader) -> tuple[int, TensorType]:
    at = reader.at
    type_id = reader.uint32("the tensor type")
    known = candidates(type_id)
    if not known:
        hint = f" ({FOREIGN_TYPES[type_id]})" if type_id in FOREIGN_TYPES else ""
        raise reader.refusal("a known tensor type", f"type id {type_id}{hint}", at=at)
    return type_id, known[0]


def _read_tensor(reader: HeaderReader, index: int, alignment: int) -> _Declared:
    reader.what = f"tensor {index}"
    name = reader.text(MAX_TENSOR_NAME_BYTES, "a tensor name")
    reader.what = f"tensor {quoted(name)}"
    shape_at = reader.at
    shape = _read_shape(reader)
    type_id, tensor_type = _read_type(reader)
    if shape[-1] % tensor_type.block_elements:
        claim = f" (type id {type_id})" if is_claimed(type_id) else ""
        blocks = f"a row length divisible by the {tensor_type.block_elements} of a {tensor_type.name} block"
        raise reader.refusal(blocks + claim, shape[-1], at=shape_at + 4)
    try:
        nbytes = tensor_type.nbytes(shape)
    except ModelFileError as error:
        label = reader.source.label
        raise ModelFileError(f"{label}: byte {shape_at + 4}: {reader.what}: {error}") from None
    offset_at = reader.at
    offset = reader.uint64("the data offset")
    if offset % alignment:
        raise reader.refusal(f"an offset that is a multiple of {alignment}", offset, at=offset_at)
    info = TensorInfo(name=name, shape=shape, type=tensor_type, offset=offset, nbytes=nbytes)
    return _Declared(info, offset_at, type_id)


def _read_tensors(reader: HeaderReader, count: int, alignment: int) -> dict[str, _Declared]:
    declared: dict[str, _Declared] = {}
    for index in range(count):
        at = reader.at
        tensor = _read_tensor(reader, index, alignment)
        if tensor.info.name in declared:
            raise reader.refusal("a name that was not there before", "a duplicate", at=at)
        declared[tensor.info.name] = tensor
    return declared


def _rooms(declared: dict[str, _Declared], data_nbytes: int) -> dict[str, int]:
    """Return the bytes from each tensor's data to the next tensor's, last tensor first: to the file's end."""
    starts = sorted(((tensor.info.offset, name) for name, tensor in declared.items()), reverse=True)
    rooms: dict[str, int] = {}
    end = data_nbytes
    for start, name in starts:
        rooms[name] = end - start
        end = start
    return rooms


def _nbytes_as(file_type: TensorType, shape: tuple[int, ...]) -> int | None:
    try:
        return None if shape[-1] % file_type.block_elements else file_type.nbytes(shape)
    except ModelFileError:
        return None


def _fills(file_type: TensorType, tensor: _Declared, room: int, alignment: int) -> bool:
    nbytes = _nbytes_as(file_type, tensor.info.shape)
    return nbytes is not None and nbytes <= room <= -(-nbytes // alignment) * alignment


def _settle_types(
    source: Source, declared: dict[str, _Declared], data_offset: int, alignment: int
) -> dict[str, _Declared]:
    """Choose by size among the types that an id may mean, for all tensors of that id alike.

    ggml's own meaning stands if its sizes fit; another must fill the room of each tensor, and so must
    the one that is left of an id which has had two. How far the last tensor reaches proves nothing for
    another type: the file may be cut short.
    """
    settled = dict(declared)
    rooms = _rooms(declared, source.size_bytes - data_offset)
    last = next(iter(rooms), "")
    for type_id in sorted({tensor.type_id for tensor in declared.values() if is_claimed(tensor.type_id)}):
        own, *others = candidates(type_id)
        members = [tensor for tensor in declared.values() if tensor.type_id == type_id]
        told = [tensor for tensor in members if not others or tensor.info.name != last]
        misfits = [
            tensor
            for tensor in told
            if tensor.info.nbytes > rooms[tensor.info.name]
            or not (others or _fills(own, tensor, rooms[tensor.info.name], alignment))
        ]
        if not misfits:
            continue
        for file_type in others:
            if all(_fills(file_type, tensor, rooms[tensor.info.name], alignment) for tensor in told):
                break
        else:
            raise _size_refusal(source, misfits[0], rooms[misfits[0].info.name])
        for tensor in members:
            nbytes = _nbytes_as(file_type, tensor.info.shape)
            if nbytes is None:
                raise _size_refusal(source, tensor, rooms[tensor.info.name])
            info = replace(tensor.info, type=file_type, nbytes=nbytes)
            settled[info.name] = replace(tensor, info=info)
    return settled


def _size_refusal(source: Source, tensor: _Declared, room: int) -> ModelFileError:
    sizes = [
        (file_type, _nbytes_as(file_type, tensor.info.shape)) for file_type in candidates(tensor.type_id)
    ]
    expected = " or ".join(
        f"{nbytes} bytes ({file_type.name})" for file_type, nbytes in sizes if nbytes is not None
    )
    what = f"tensor {quoted(tensor.info.name)} of type id {tensor.type_id}"
    return refusal(source.label, tensor.offset_at, what, expected, f"room for {room}")


def _placed(source: Source, declared: dict[str, _Declared], data_offset: int) -> Mapping[str, TensorInfo]:
    """Make offsets absolute; refuse tensors that overlap or reach beyond the file."""
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in declared.items():
        info = tensor.info
        offset = data_offset + info.offset
        if offset + info.nbytes > source.size_bytes:
            raise refusal(
                source.label,
                tensor.offset_at,
                f"tensor {quoted(name)}",
                f"{info.nbytes} bytes of data at byte {offset}",
                f"a file of {source.size_bytes} bytes (cut short?)",
            )
        tensors[name] = TensorInfo(
            name=name, shape=info.shape, type=info.type, offset=offset, nbytes=info.nbytes
        )
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise refusal(
                source.label,
                declared[info.name].offset_at,
                f"tensor {quoted(info.name)}",
                f"data behind that of {quoted(before)}, which ends at byte {end}",
                f"data at byte {info.offset}, which overlaps",
            )
        end, before = info.offset + info.nbytes, info.name
    return MappingProxyType(tensors)


class Shard:
    """An open GGUF file: `metadata`, `tensors`, `source`; owns descriptor and mapping until `close`."""

    def __init__(self, source: Source) -> None:
        """Read the header of `source`; use `open`."""
        self.source = source
        reader = HeaderReader(source)
        self.version = _read_magic(reader)
        num_tensors = _read_count(reader, "tensors", MAX_TENSORS, MIN_TENSOR_BYTES)
        num_keys = _read_count(reader, "keys", MAX_KEYS, MIN_KEY_BYTES)
        self.metadata = Metadata.read(reader, num_keys)
        self.alignment = self._checked_alignment()
        declared = _read_tensors(reader, num_tensors, self.alignment)
        self.data_offset = -(-reader.at // self.alignment) * self.alignment
        declared = _settle_types(source, declared, self.data_offset, self.alignment)
        self.tensors: Mapping[str, TensorInfo] = _placed(source, declared, self.data_offset)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open and check one file; raises as `GgufFile.open`."""
        source = Source(path)
        try:
            return cls(source)
        except BaseException:
            source.close()
            raise

    def get(self, key: str, value_type: type[T], default: D) -> T | D:
        """Return the value of `key`, or `default` if there is none; a wrong type is an error."""
        return self.metadata.typed(key, value_type) if key in self.metadata else default

    def close(self) -> None:
        """Give descriptor and mapping back; again is harmless."""
        self.source.close()

    @property
    def label(self) -> str:
        """The path as messages name it: printable, one line."""
        return self.source.label

    def _checked_alignment(self) -> int:
        key = "general.alignment"
        alignment = self.get(key, int, DEFAULT_ALIGNMENT)
        if MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT and alignment.bit_count() == 1:
            return alignment
        expected = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
        raise refusal(self.label, self.metadata.offset(key), f"key {quoted(key)}", expected, alignment)
