"""Types that no kernel multiplies: what they become in memory, what that costs, what to use instead. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Set
from typing import Final

from ...scheduler.model.plan import ModelPlan
from ...workers.checkpoint.file.gguf import GgufFile, TensorInfo
from ...workers.checkpoint.held.formats import is_decoded_at_load
from ...workers.checkpoint.types.table import TYPES_BY_NAME, TensorType
from ..sizes import format_size

_F16_NBYTES: Final = 2
# What `sterna quantize` makes and kernels multiply as it is; of equally near ones the first.
_NATIVE: Final = ("Q2_K", "Q3_K", "Q4_K", "Q4_0", "Q5_K", "Q6_K", "Q8_0")


def slow_types(file: GgufFile, used: Set[str], plan: ModelPlan) -> list[str]:
    """Return a line for each type whose matrices are held as F16, with its cost and the type to use instead.

    used: names of the tensors that `plan` takes.
    """
    raw = {entry.tensor.name for entry in plan.dense.values() if entry.held == "raw"}
    matrices: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in file.tensors.values():
        multiplied = info.name in used and info.name not in raw and len(info.shape) > 1
        if multiplied and is_decoded_at_load(info.type):
            matrices[info.type.name].append(info)
    return [_line(found) for found in matrices.values()]


def _line(found: list[TensorInfo]) -> str:
    stored = sum(info.nbytes for info in found)
    held = sum(_F16_NBYTES * _elements(info) for info in found)
    stored_type = found[0].type
    native = nearest_native(stored_type, {info.shape[-1] for info in found})
    advice = f"; requantise to {native}: `sterna quantize IN OUT --type {native}`" if native else ""
    tensors = "1 matrix" if len(found) == 1 else f"{len(found)} matrices"
    return (
        f"{tensors} of type {stored_type.name} are held as F16, {format_size(held)} in memory for "
        f"{format_size(stored)} in the file{advice}"
    )


def nearest_native(stored_type: TensorType, widths: Set[int]) -> str:
    """Return the type with a kernel that is nearest in size and takes rows of these widths, "" for none."""
    fitting = [
        each
        for each in map(TYPES_BY_NAME.__getitem__, _NATIVE)
        if not any(width % each.block_elements for width in widths)
    ]
    best = min(fitting, key=lambda each: abs(_bits(each) - _bits(stored_type)), default=None)
    return "" if best is None else best.name


def _bits(stored_type: TensorType) -> float:
    return 8 * stored_type.block_bytes / stored_type.block_elements


def _elements(info: TensorInfo) -> int:
    return math.prod(info.shape)
