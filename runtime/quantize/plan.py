"""What `sterna quantize` makes of each tensor of a file: its type afterwards, or why it stays as it is. Pure.

Recoded are the matrices of attention and of feed-forward networks. Routers, norms, biases, embeddings and
the head stay, unless a pattern names them. No numba, and no numpy before a file is at hand.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ...shm.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    from ...workers.checkpoint.file.gguf import GgufFile, TensorInfo
    from ...workers.checkpoint.types.table import TensorType

# Type -> general.file_type of a file that is made with it, llama.cpp's numbers.
FILE_TYPES: Final = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q6_K": 18, "Q5_K": 16, "Q4_K": 14, "Q3_K": 11,
    "Q2_K": 10, "TQ1_0": 36, "TQ2_0": 37,
}  # fmt: skip
TYPES: Final = tuple(FILE_TYPES)
TERNARY: Final = ("TQ1_0", "TQ2_0")
WEIGHTED: Final = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", *TERNARY)
"""Types whose encoders heed how much a column matters."""
SCALES: Final = ("lloyd-max", "least-squares", "absmean")
QUANTIZATION_VERSION: Final = 2  # of ggml's block layouts, unchanged since 2023

_ATTENTION = r"attn_(q|k|v|qkv|output|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)"
_EXPERTS: Final = re.compile(
    r"blk\.\d+\.ffn_(gate|up|down|gate_up)(_exps|\.\d+)\.weight"
    r"|model\.layers\.\d+\.mlp\.experts\.(\d+\.)?(gate|up|down|gate_up)_proj(\.weight)?"
)
_MATRICES: Final = re.compile(
    rf"blk\.\d+\.({_ATTENTION}|ffn_(gate|up|down|gate_up)(_shexp|_chexp)?)\.weight"
    r"|model\.layers\.\d+\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.(shared_experts\.)?(gate|up|down)_proj)\.weight"
)
_LAYER: Final = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What was asked for: names of TYPES and SCALES; overrides: (pattern of names, type or None to keep)."""

    type: str
    scales: str = "lloyd-max"
    experts_only: bool = False
    overrides: tuple[tuple[str, str | None], ...] = ()

    @property
    def types(self) -> set[str]:
        """The types that anything may become."""
        return {self.type, *(name for _, name in self.overrides if name is not None)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One tensor: what it becomes. `kept` says why it stays as it is, and is empty if it does not."""

    info: TensorInfo
    target: TensorType
    kept: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes afterwards."""
        return self.info.nbytes if self.kept else self.target.nbytes(self.info.shape)

    @property
    def group(self) -> str:
        """The name with stars for layers and experts: what a report puts together."""
        return _LAYER.sub("*", self.info.name)


def parse_override(text: str) -> tuple[str, str | None]:
    """Return (pattern, type) of a text such as "*_shexp.weight=Q8_0"; type None for "keep".

    Raises UsageError for anything else.
    """
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern or (name.upper() not in TYPES and name != "keep"):
        raise UsageError(
            f"--tensor-type {text}: expected PATTERN=TYPE, with one of {', '.join(TYPES)} or keep"
        )
    return pattern, None if name == "keep" else name.upper()


def choose(file: GgufFile, wanted: Wanted) -> tuple[Choice, ...]:
    """Return a choice for each tensor, in the file's order.

    Raises ModelFileError if nothing would change or a tensor's own type cannot be decoded, UsageError for a
    pattern that no tensor has.
    """
    for pattern, _ in wanted.overrides:
        if not fnmatch.filter(file.tensors, pattern):
            raise UsageError(f"--tensor-type {pattern}: {file.label} has no tensor of such a name")
    choices = tuple(_choose(file, info, wanted) for info in file.tensors.values())
    if all(choice.kept for choice in choices):
        reasons = "; ".join(sorted({choice.kept for choice in choices}))
        raise ModelFileError(f"{file.label}: nothing to change: every tensor is kept ({reasons})")
    return choices


def _choose(file: GgufFile, info: TensorInfo, wanted: Wanted) -> Choice:
    from ...workers.checkpoint.types.table import TYPES_BY_NAME

    name, kept = _wanted_type(info, wanted)
    if name is None:
        return Choice(info=info, target=info.type, kept=kept)
    target = TYPES_BY_NAME[name]
    if target is info.type:
        return Choice(info=info, target=target, kept=f"is {name} already")
    if info.shape[-1] % target.block_elements:
        blocks = f"{info.shape[-1]} columns are no whole blocks of {target.block_elements}"
        return Choice(info=info, target=info.type, kept=blocks)
    if info.type.decode is None and info.type.matrix is None:
        raise ModelFileError(
            f"{file.label}: tensor {info.name!r}: type {info.type.name} cannot be decoded;"
            f" --tensor-type {info.name}=keep leaves it as it is"
        )
    return Choice(info=info, target=target)


def _wanted_type(info: TensorInfo, wanted: Wanted) -> tuple[str | None, str]:
    """Return the name of the type that a tensor should have, or None and why it has none."""
    for pattern, name in wanted.overrides:
        if fnmatch.fnmatchcase(info.name, pattern):
            return name, "as asked"
    if _EXPERTS.fullmatch(info.name):
        return wanted.type, ""
    if not _MATRICES.fullmatch(info.name):
        return None, "no matrix to convert"
    return (None, "no expert") if wanted.experts_only else (wanted.type, "")


def is_quantized(choices: Sequence[Choice]) -> bool:
    """Return whether any tensor afterwards is of a block type, whose layout has a version."""
    return any(choice.target.block_elements > 1 for choice in choices)
