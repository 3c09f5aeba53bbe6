"""A model file, in one piece or several: metadata, tensors and their bytes (`GgufFile`).

Not here: how one file is read (`shard.py`) and which files make a model (`split.py`), tensor types
(`checkpoint/types/`), tensor names (`names.py`), what keys and shapes a model needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from .metadata import GgufArray, MetadataValue
from .shard import Shard, TensorInfo
from .source import quoted, refusal
from .split import merged_tensors, open_shards

__all__ = ["GgufArray", "GgufFile", "MetadataValue", "TensorInfo"]

T = TypeVar("T")
D = TypeVar("D")


class GgufFile:
    """An open GGUF model: `metadata`, `tensors` and views of the mapped tensor bytes.

    It may lie in several files, `NAME-00001-of-00003.gguf` and so on; any of them opens all, and the
    metadata are those of the first. Context manager; owns descriptors and mappings until `close`. Arrays
    from `data` stay valid after that (they hold the mapping), metadata strings and arrays do not. May be
    shared by threads and, since nothing is written, inherited over a fork. If a file is cut short by
    someone else while it is mapped, touching the lost pages kills the process (SIGBUS): read cold data
    with `pread`.
    """

    def __init__(self, path: str, shards: tuple[Shard, ...]) -> None:
        """Own `shards`; use `open`."""
        self.path = path
        """The path as it was opened."""
        self._shards = shards
        self._metadata = shards[0].metadata
        self.tensors: Mapping[str, TensorInfo] = merged_tensors(shards)
        """By name, in the order of the files; each knows the number of its file."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open and check `path`, with the other files of its model if it is split.

        Raises ModelNotFound, NotPermitted, ModelReadError, OutOfResources or, for everything that
        is wrong with the content, ModelFileError; each is one line that names the file.
        """
        shards = open_shards(path)
        try:
            return cls(os.fspath(path), shards)
        except BaseException:
            for shard in shards:
                shard.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give descriptors and mappings back; again is harmless."""
        for shard in self._shards:
            shard.close()

    @property
    def label(self) -> str:
        """The path of the first file as messages name it: printable, one line."""
        return self._shards[0].label

    def label_of(self, info: TensorInfo) -> str:
        """Return the same of the file that holds a tensor."""
        return self._shards[info.file].label

    @property
    def paths(self) -> list[str]:
        """The paths of all files, in the order of `TensorInfo.file`."""
        return [shard.source.path for shard in self._shards]

    @property
    def fds(self) -> list[int]:
        """A descriptor of each of `paths`, for `pread`; owned by this object."""
        return [shard.source.fd for shard in self._shards]

    @property
    def fd(self) -> int:
        """The descriptor of the first file, which is all there is of a model that is not split."""
        return self._shards[0].source.fd

    @property
    def version(self) -> int:
        """The version of the format that the first file says."""
        return self._shards[0].version

    @property
    def alignment(self) -> int:
        """Multiple of the offsets of tensors in the first file."""
        return self._shards[0].alignment

    @property
    def data_offset(self) -> int:
        """Where the tensors of the first file begin."""
        return self._shards[0].data_offset

    @property
    def size_bytes(self) -> int:
        """Size of all files together when they were opened."""
        return sum(shard.source.size_bytes for shard in self._shards)

    @property
    def metadata(self) -> Mapping[str, MetadataValue]:
        """All keys in file order; reading a string value may raise ModelFileError."""
        return self._metadata

    def require(self, key: str, value_type: type[T]) -> T:
        """Return the value of `key`; ModelFileError if it is missing or not exactly of `value_type`.

        `value_type` is int, float, bool, str or GgufArray; a bool is no int, an int no float.
        """
        return self._metadata.typed(key, value_type)

    def get(self, key: str, value_type: type[T], default: D) -> T | D:
        """Return the value of `key`, or `default` if there is none; a wrong type is an error."""
        return self._shards[0].get(key, value_type, default)

    def raw_value(self, key: str) -> bytes:
        """Return the value of `key` as the file has it, its type and its bytes; KeyError if there is none."""
        return self._metadata.raw(key)

    def data(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """Return the tensor's bytes, 1-D, read-only, as a view of the mapping (no copy)."""
        return np.frombuffer(self._shards[info.file].source.mapped, np.uint8, info.nbytes, info.offset)

    def slab(self, info: TensorInfo, index: int) -> tuple[int, int]:
        """Return (absolute offset, bytes) of slice `index` of the outermost axis of a 3-D tensor.

        ModelFileError if the tensor is not 3-D or of a type whose slices are not apart, IndexError if
        there is no such slice.
        """
        what = f"tensor {quoted(info.name)}"
        if info.type.matrix is not None and not info.type.matrix.has_slices:
            found = info.type.name
            raise refusal(self.label_of(info), info.offset, what, "slices that lie apart", found)
        if len(info.shape) != 3:
            raise refusal(self.label_of(info), info.offset, what, "3 dimensions", f"shape {info.shape}")
        if not 0 <= index < info.shape[0]:
            raise IndexError(f"slice {index} of {info.name!r}, which has {info.shape[0]}")
        nbytes = info.nbytes // info.shape[0]
        return info.offset + index * nbytes, nbytes
