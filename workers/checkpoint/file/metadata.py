"""GGUF metadata: value types, lazily decoded arrays and strings, typed access by key.

Not here: which keys a model needs. Scalars are read when the file is opened; a string or an array
is checked then (length, bounds, nesting) and decoded when it is asked for.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

from .source import HeaderReader, Source, quoted, refusal

MAX_KEYS: Final = 65_536
MAX_KEY_BYTES: Final = 65_535
MAX_KEY_BYTES_TOGETHER: Final = 16 << 20
MAX_ARRAY_ELEMENTS: Final = 4 << 20
MAX_ARRAY_NESTING: Final = 2
MAX_NESTED_ARRAYS: Final = 65_536  # of one file together: each is walked
MIN_KEY_BYTES: Final = 8 + 4 + 1  # an empty name, a type, one byte of value

BOOL, STRING, ARRAY = 7, 8, 9
VALUE_TYPE_NAMES: Final = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
    "uint64", "int64", "float64",
)  # fmt: skip
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),  # checked to be 0 or 1, then bool
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_MIN_ELEMENT_BYTES: Final = {STRING: 8, ARRAY: 12}

T = TypeVar("T")


class GgufArray(Sequence["MetadataValue"]):
    """A metadata array that decodes its elements on access.

    Valid while the file is open; `strings()`, `numpy()` and `list(...)` give copies that outlive it.
    Decoding raises ModelFileError naming file, byte, key and element.
    """

    __slots__ = ("_at", "_key", "_length", "_source", "_starts", "element_type_id")

    def __init__(
        self, source: Source, key: str, element_type_id: int, length: int, at: int, starts: array[int]
    ) -> None:
        self._source = source
        self._key = key
        self._length = length
        self._at = at
        self._starts = starts  # of strings and nested arrays, with the end as a last entry
        self.element_type_id = element_type_id

    @property
    def element_type(self) -> str:
        """Name of the element type: "string", "int32", "array", ..."""
        return VALUE_TYPE_NAMES[self.element_type_id]

    def __repr__(self) -> str:
        return f"GgufArray({self.element_type} x {self._length})"

    def __len__(self) -> int:
        return self._length

    def _string(self, index: int) -> str:
        start, end = self._starts[index] + 8, self._starts[index + 1]
        try:  # here and not in `decoded`: its label would take longer than the text
            return self._source.mapped[start:end].decode()
        except UnicodeDecodeError:
            return decoded(self._source, start, end, f"key {quoted(self._key)}[{index}]")  # raises

    def _element(self, index: int) -> MetadataValue:
        if self.element_type_id == STRING:
            return self._string(index)
        if self.element_type_id == ARRAY:
            reader = HeaderReader(self._source, self._starts[index], window_bytes=4096)
            reader.what = f"key {quoted(self._key)}[{index}]"
            return read_array(reader, self._key, depth=2)
        value: MetadataValue = self._raw(index, 1)[0].item()
        return value

    @overload
    def __getitem__(self, index: int) -> MetadataValue: ...
    @overload
    def __getitem__(self, index: slice) -> list[MetadataValue]: ...
    def __getitem__(self, index: int | slice) -> MetadataValue | list[MetadataValue]:
        chosen = range(self._length)[index]  # IndexError and negative indices as in a list
        if isinstance(chosen, range):
            return [self._element(i) for i in chosen]
        return self._element(chosen)

    def __iter__(self) -> Iterator[MetadataValue]:
        if self.element_type_id in _DTYPES:
            yield from self.numpy().tolist()
        else:
            for index in range(self._length):
                yield self._element(index)

    def strings(self) -> list[str]:
        """Return all elements of a string array; ModelFileError if it is none."""
        if self.element_type_id != STRING:
            raise self._wrong_elements("strings")
        return [self._string(index) for index in range(self._length)]

    def numpy(self) -> npt.NDArray[Any]:
        """Return a copy as a 1-D array of the elements' own dtype; ModelFileError if not numeric."""
        if self.element_type_id not in _DTYPES:
            raise self._wrong_elements("numbers")
        return self._raw(0, self._length)

    def _raw(self, first: int, count: int) -> npt.NDArray[Any]:
        dtype = _DTYPES[self.element_type_id]
        start = self._at + first * dtype.itemsize
        values: npt.NDArray[Any] = np.frombuffer(
            self._source.mapped[start : start + count * dtype.itemsize], dtype
        ).copy()
        if self.element_type_id != BOOL:
            return values
        bad = np.flatnonzero(values > 1)
        if bad.size:
            element = f"key {quoted(self._key)}[{first + bad[0]}]"
            found = int(values[bad[0]])
            raise refusal(self._source.label, start + int(bad[0]), element, "a bool of 0 or 1", found)
        return values.astype(np.bool_)

    def _wrong_elements(self, expected: str) -> Exception:
        found = f"an array of {self.element_type}"
        what = f"key {quoted(self._key)}"
        return refusal(self._source.label, self._at, what, f"an array of {expected}", found)


MetadataValue: TypeAlias = int | float | bool | str | GgufArray


@dataclass(frozen=True, slots=True)
class _Text:
    """Where a string value lies; its length field is at `start - 8`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Entry:
    at: int  # of the value, behind its type
    value: int | float | bool | _Text | GgufArray


def decoded(source: Source, start: int, end: int, what: str) -> str:
    """Return the UTF-8 text of bytes [start, end) of the file."""
    raw = source.mapped[start:end]
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise refusal(source.label, start + error.start, what, "UTF-8 text", quoted(raw)) from None


def read_array(reader: HeaderReader, key: str, depth: int = 1) -> GgufArray:
    """Read the array value at the reader and step over it, checking everything but UTF-8 and bools."""
    type_at = reader.at
    element_type = reader.uint32("the array's element type")
    if element_type >= len(VALUE_TYPE_NAMES):
        raise reader.refusal("an element type of 0..12", element_type, at=type_at)
    if element_type == ARRAY and depth >= MAX_ARRAY_NESTING:
        raise reader.refusal(f"arrays nested at most {MAX_ARRAY_NESTING} deep", "a third level", at=type_at)
    count_at = reader.at
    count = reader.uint64("the array's length")
    if count > MAX_ARRAY_ELEMENTS:
        raise reader.refusal(f"at most {MAX_ARRAY_ELEMENTS} array elements", count, at=count_at)
    scalar = _SCALARS.get(element_type)
    element_bytes = scalar.size if scalar else _MIN_ELEMENT_BYTES[element_type]
    if count * element_bytes > reader.bytes_left:
        wanted = (
            f"{count} elements of {VALUE_TYPE_NAMES[element_type]}, at least {count * element_bytes} bytes"
        )
        raise reader.refusal(wanted, f"{reader.bytes_left} bytes left in the file", at=count_at)
    at = reader.at
    starts = array("Q")
    if scalar:
        reader.skip(count * element_bytes, "array elements")
    elif element_type == STRING:
        starts = reader.skip_strings(count)
    else:
        starts = _skip_arrays(reader, key, count, depth)
    return GgufArray(reader.source, key, element_type, count, at, starts)


def _skip_arrays(reader: HeaderReader, key: str, count: int, depth: int) -> array[int]:
    reader.nested_arrays += count
    if reader.nested_arrays > MAX_NESTED_ARRAYS:
        raise reader.refusal(f"at most {MAX_NESTED_ARRAYS} nested arrays in a file", reader.nested_arrays)
    starts = array("Q")
    outer = reader.what
    for index in range(count):
        reader.what = f"{outer}[{index}]"
        starts.append(reader.at)
        read_array(reader, key, depth + 1)
    reader.what = outer
    starts.append(reader.at)
    return starts


def _read_value(reader: HeaderReader, key: str) -> _Entry:
    type_at = reader.at
    value_type = reader.uint32("the value's type")
    at = reader.at
    if value_type == STRING:
        reader.skip_string("a string")
        return _Entry(at, _Text(at + 8, reader.at))
    if value_type == ARRAY:
        return _Entry(at, read_array(reader, key))
    scalar = _SCALARS.get(value_type)
    if scalar is None:
        raise reader.refusal("a value type of 0..12", value_type, at=type_at)
    value = scalar.unpack(reader.bytes_of(scalar.size, VALUE_TYPE_NAMES[value_type]))[0]
    if value_type == BOOL:
        if value > 1:
            raise reader.refusal("a bool of 0 or 1", value, at=at)
        value = bool(value)
    return _Entry(at, value)


class Metadata(Mapping[str, MetadataValue]):
    """The keys of one file in file order; string values are decoded on each access."""

    __slots__ = ("_entries", "_source")

    def __init__(self, source: Source, entries: dict[str, _Entry]) -> None:
        self._source = source
        self._entries = entries

    @classmethod
    def read(cls, reader: HeaderReader, count: int) -> Metadata:
        """Read `count` keys and values; ModelFileError names the byte and the key."""
        entries: dict[str, _Entry] = {}
        key_bytes = 0
        for index in range(count):
            reader.what = f"key {index}"
            key_at = reader.at
            key = reader.text(MAX_KEY_BYTES, "a key")
            reader.what = f"key {quoted(key)}"
            if key in entries:
                raise reader.refusal("a key that was not there before", "a duplicate", at=key_at)
            key_bytes += reader.at - key_at - 8
            if key_bytes > MAX_KEY_BYTES_TOGETHER:
                raise reader.refusal(f"at most {MAX_KEY_BYTES_TOGETHER} bytes of keys", key_bytes, at=key_at)
            entries[key] = _read_value(reader, key)
        return cls(reader.source, entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries  # the mixin's way would decode the value

    def __getitem__(self, key: str) -> MetadataValue:
        value = self._entries[key].value
        if isinstance(value, _Text):
            return decoded(self._source, value.start, value.end, f"key {quoted(key)}")
        return value

    def offset(self, key: str) -> int:
        """Return the byte offset of the key's value; KeyError if there is no such key."""
        return self._entries[key].at

    def raw(self, key: str) -> bytes:
        """Return the value as the file has it: its type and its bytes; KeyError if there is no such key."""
        reader = HeaderReader(self._source, self._entries[key].at - 4)
        reader.what = f"key {quoted(key)}"
        start = reader.at
        _read_value(reader, key)
        return self._source.read(start, reader.at - start)

    def typed(self, key: str, value_type: type[T]) -> T:
        """Return the value if it is exactly of `value_type` (a bool is no int); see GgufFile.require."""
        if key not in self._entries:
            raise refusal(
                self._source.label, None, f"key {quoted(key)}", _type_name(value_type), "no such key"
            )
        value = self[key]
        if isinstance(value, value_type) and type(value) is value_type:
            return value
        found = (
            type(value).__name__
            if isinstance(value, GgufArray)
            else f"{_type_name(type(value))} {value!r:.80}"
        )
        raise refusal(
            self._source.label, self.offset(key), f"key {quoted(key)}", _type_name(value_type), found
        )


def _type_name(value_type: type) -> str:
    names = {int: "an integer", float: "a float", bool: "a bool", str: "a string", GgufArray: "an array"}
    return names.get(value_type, value_type.__name__)
