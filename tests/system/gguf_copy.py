"""Copies of the embedded model with something changed, written by the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize, quantize

from sterna.runtime.config import embedded_model

Type = gguf.GGMLQuantizationType
# Returns what a tensor becomes: its bytes or values and their type; None leaves it out.
Change = Callable[[str, npt.NDArray[np.generic], Type], tuple[npt.NDArray[np.generic], Type] | None]


def unchanged(
    name: str, data: npt.NDArray[np.generic], tensor_type: Type
) -> tuple[npt.NDArray[np.generic], Type]:
    return data, tensor_type


def copy_model(
    path: Path,
    change: Change = unchanged,
    *,
    architecture: str = "deepseek2",
    metadata: Mapping[str, object] | None = None,
    shards: int = 1,
    small_first_shard: bool = False,
) -> Path:
    """Write the embedded model to `path`, with `change` applied to each tensor and other metadata.

    shards: in how many files; returned is the path of the first, which `small_first_shard` leaves without
    tensors.
    """
    reader = gguf.GGUFReader(embedded_model())
    parts = shards - small_first_shard
    at_most = -(-len(reader.tensors) // parts) if shards > 1 else 0
    writer = gguf.GGUFWriter(
        path, architecture, split_max_tensors=at_most, small_first_shard=small_first_shard
    )
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = (metadata or {}).get(field.name, field.contents())
        writer.add_key_value(field.name, value, field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        changed = change(tensor.name, tensor.data, tensor.tensor_type)
        if changed is not None:
            data, tensor_type = changed
            writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if shards == 1 else shard_path(path, 1, shards)


def shard_path(path: Path, number: int, shards: int) -> Path:
    """Return the path of a file of a model that was written to `path` in several."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{shards:05d}.gguf")


def without(missing: str) -> Change:
    """Leave one tensor out."""
    return lambda name, data, tensor_type: None if name == missing else (data, tensor_type)


def half_of(halved: str) -> Change:
    """Keep only half of one tensor's rows."""
    return lambda name, data, tensor_type: (data[: len(data) // 2] if name == halved else data, tensor_type)


def experts_as(new: Type) -> Change:
    """Keep the experts' values (and those of all other ternary tensors) but store them as another type."""

    def change(
        name: str, data: npt.NDArray[np.generic], tensor_type: Type
    ) -> tuple[npt.NDArray[np.generic], Type]:
        return (
            (quantize(dequantize(data, tensor_type), new), new)
            if tensor_type == Type.TQ2_0
            else (data, tensor_type)
        )

    return change
