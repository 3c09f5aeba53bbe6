"""Writes variants of the embedded model: other keys, other tensors, other types. No test in here."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from sterna.runtime.config import embedded_model

Array = npt.NDArray[np.generic]
# (data, type): float data is quantised, uint8 data are the tensor's bytes as rows
Tensor = tuple[Array, GGMLQuantizationType]
Type = GGMLQuantizationType

EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
DENSE = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")


@cache
def original() -> GGUFReader:
    """Return the embedded model as the gguf package reads it."""
    return GGUFReader(embedded_model())


def tensors() -> dict[str, Tensor]:
    """Return {name: (bytes or floats, type)} of the embedded model."""
    return {t.name: (t.data, t.tensor_type) for t in original().tensors}


def values(name: str) -> npt.NDArray[np.float32]:
    """Return the numbers of a tensor of the embedded model."""
    data, tensor_type = tensors()[name]
    return np.asarray(dequantize(data, tensor_type), np.float32)


def write(
    path: Path,
    *,
    keys: Mapping[str, tuple[object, GGUFValueType] | None] | None = None,
    change: Callable[[str, Tensor], Tensor | None] = lambda name, tensor: tensor,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the embedded model to `path` with changes, and return the path.

    keys: new (value, type) for a key, None to leave it out; change: called for every tensor, returns
    what to write instead, None to leave it out; extra: further tensors. The vocabulary stays behind.
    """
    writer = GGUFWriter(path, "deepseek2")
    changed = dict(keys or {})
    for field in original().fields.values():
        if field.name.startswith(("GGUF.", "tokenizer.")) or field.name == "general.architecture":
            continue
        value = changed.pop(field.name, (field.contents(), field.types[0]))
        if value is not None:
            writer.add_key_value(field.name, *value)
    for name, value in changed.items():
        if value is not None:
            writer.add_key_value(name, *value)
    for name, tensor in tensors().items():
        replaced = change(name, tensor)
        if replaced is not None:
            _add(writer, name, replaced)
    for name, tensor in (extra or {}).items():
        _add(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    data, tensor_type = tensor
    if data.dtype != np.uint8 and tensor_type not in (Type.F32, Type.F16):
        data = quantize(np.asarray(data, np.float32), tensor_type)
    writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=tensor_type)


def only(name: str, replacement: Tensor | None) -> Callable[[str, Tensor], Tensor | None]:
    """Return a `change` that replaces one tensor."""
    return lambda each, tensor: replacement if each == name else tensor


def converted(matches: tuple[str, ...], convert: Callable[[str], Tensor]) -> Callable[[str, Tensor], Tensor]:
    """Return a `change` that passes the tensors with one of `matches` in their name through `convert`."""
    return lambda name, tensor: convert(name) if any(each in name for each in matches) else tensor


def exact_q8(name: str) -> Tensor:
    """Return a ternary tensor as Q8_0 with the same values: codes -1, 0, 1 and the same scales."""
    floats = values(name)
    blocks = floats.reshape(-1, 32)
    scales = np.abs(blocks).max(axis=1).astype(np.float16)
    raw = np.zeros((len(blocks), 34), np.uint8)
    raw[:, :2] = scales[:, None].view(np.uint8)
    raw[:, 2:] = np.sign(blocks).astype(np.int8).view(np.uint8)
    return raw.reshape(*floats.shape[:-1], -1), Type.Q8_0


def retyped(path: Path, columns: Mapping[str, int], type_id: int) -> Path:
    """Give 2-D tensors written as bytes the type `type_id` and their true row length; return the path.

    For types that the gguf package does not know.
    """
    content = bytearray(path.read_bytes())
    for name, length in columns.items():
        key = struct.pack("<Q", len(name)) + name.encode()
        at = content.index(key) + len(key)
        struct.pack_into("<Q", content, at + 4, length)  # behind the number of dimensions
        struct.pack_into("<I", content, at + 20, type_id)
    path.write_bytes(content)
    return path
