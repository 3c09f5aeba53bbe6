"""Where a model's weights lie in a file: tensor names by role, checked lookup, expert slabs.

Every role has its GGUF name first; some have the Hugging Face name second. Not here: which roles a
model needs and with which dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from ....shm.errors import ModelFileError
from ..types.table import TensorType
from .gguf import GgufFile, TensorInfo
from .source import quoted, refusal

_MODEL: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "token_embd": ("token_embd.weight", "model.embed_tokens.weight"),
        "output_norm": ("output_norm.weight", "model.norm.weight"),
        "output": ("output.weight", "lm_head.weight"),
        "rope_freqs": ("rope_freqs.weight",),
    }
)

# role: (GGUF name within "blk.N.", Hugging Face names within "model.layers.N.")
_LAYER: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "attn_norm": ("attn_norm.weight", "input_layernorm.weight"),
        "ffn_norm": ("ffn_norm.weight", "post_attention_layernorm.weight"),
        "post_attention_norm": ("post_attention_norm.weight",),
        "attn_q": ("attn_q.weight", "self_attn.q_proj.weight"),
        "attn_k": ("attn_k.weight", "self_attn.k_proj.weight"),
        "attn_v": ("attn_v.weight", "self_attn.v_proj.weight"),
        "attn_q_bias": ("attn_q.bias",),
        "attn_k_bias": ("attn_k.bias",),
        "attn_v_bias": ("attn_v.bias",),
        "attn_output_bias": ("attn_output.bias",),
        "attn_q_norm": ("attn_q_norm.weight",),
        "attn_k_norm": ("attn_k_norm.weight",),
        "attn_sinks": ("attn_sinks.weight",),
        "attn_sub_norm": ("attn_sub_norm.weight",),
        "ffn_sub_norm": ("ffn_sub_norm.weight",),
        "attn_q_a": ("attn_q_a.weight", "self_attn.q_a_proj.weight"),
        "attn_q_a_norm": ("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight"),
        "attn_q_b": ("attn_q_b.weight", "self_attn.q_b_proj.weight"),
        "attn_kv_a_mqa": ("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"),
        "attn_kv_a_norm": ("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"),
        "attn_k_b": ("attn_k_b.weight", "self_attn.k_b_proj.weight"),
        "attn_v_b": ("attn_v_b.weight", "self_attn.v_b_proj.weight"),
        "attn_kv_b": ("attn_kv_b.weight", "self_attn.kv_b_proj.weight"),
        "attn_output": ("attn_output.weight", "self_attn.o_proj.weight"),
        "ffn_gate": ("ffn_gate.weight", "mlp.gate_proj.weight"),
        "ffn_up": ("ffn_up.weight", "mlp.up_proj.weight"),
        "ffn_down": ("ffn_down.weight", "mlp.down_proj.weight"),
        "ffn_gate_inp": ("ffn_gate_inp.weight", "mlp.gate.weight"),
        "ffn_gate_inp_bias": ("ffn_gate_inp.bias",),
        "ffn_gate_inp_shexp": ("ffn_gate_inp_shexp.weight",),
        "exp_probs_b": ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
        "ffn_gate_exps": ("ffn_gate_exps.weight", "mlp.experts.gate_proj.weight", "mlp.experts.gate_proj"),
        "ffn_up_exps": ("ffn_up_exps.weight", "mlp.experts.up_proj.weight", "mlp.experts.up_proj"),
        "ffn_down_exps": ("ffn_down_exps.weight", "mlp.experts.down_proj.weight", "mlp.experts.down_proj"),
        "ffn_gate_up_exps": (
            "ffn_gate_up_exps.weight",
            "mlp.experts.gate_up_proj.weight",
            "mlp.experts.gate_up_proj",
        ),
        "ffn_gate_exps_bias": ("ffn_gate_exps.bias",),
        "ffn_up_exps_bias": ("ffn_up_exps.bias",),
        "ffn_down_exps_bias": ("ffn_down_exps.bias",),
        "ffn_gate_shexp": ("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight"),
        "ffn_up_shexp": ("ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight"),
        "ffn_down_shexp": ("ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight"),
    }
)

# The same for one tensor per expert, {expert} in both.
_EXPERT: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "ffn_gate_exps": ("ffn_gate.{expert}.weight", "mlp.experts.{expert}.gate_proj.weight"),
        "ffn_up_exps": ("ffn_up.{expert}.weight", "mlp.experts.{expert}.up_proj.weight"),
        "ffn_down_exps": ("ffn_down.{expert}.weight", "mlp.experts.{expert}.down_proj.weight"),
    }
)
_HALF_OF_MERGED: Final = {"ffn_gate_exps": 0, "ffn_up_exps": 1}

MODEL_ROLES: Final = tuple(_MODEL)
LAYER_ROLES: Final = tuple(_LAYER)
EXPERT_ROLES: Final = tuple(_EXPERT)


class TensorProblem(ModelFileError):
    """A tensor that is missing or misshapen: `name` is the first to try, `shape` what was expected."""

    def __init__(self, text: str, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(text)
        self.name = name
        self.shape = shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """The contiguous bytes of one expert's matrix: absolute `offset` in the model's file number `file`."""

    offset: int
    nbytes: int
    type: TensorType
    tensor: str
    file: int = 0


def candidates(role: str, layer: int | None = None, expert: int | None = None) -> tuple[str, ...]:
    """Return the tensor names to try for a role, best first.

    Model roles take no layer, all others do; `expert` asks for the tensor of that expert alone.
    ValueError if the role is unknown or the indices do not belong to it.
    """
    if layer is None:
        if role not in _MODEL or expert is not None:
            raise ValueError(f"role {role!r} is not one of the model as a whole")
        return _MODEL[role]
    table = _LAYER if expert is None else _EXPERT
    if role not in table or layer < 0 or (expert is not None and expert < 0):
        raise ValueError(f"no role {role!r} for layer {layer}, expert {expert}")
    first, *others = (name.format(expert=expert) for name in table[role])
    return (f"blk.{layer}.{first}", *(f"model.layers.{layer}.{name}" for name in others))


def find(file: GgufFile, role: str, layer: int | None = None, expert: int | None = None) -> TensorInfo | None:
    """Return the tensor of a role under the first of its names that the file has, or None."""
    for name in candidates(role, layer, expert):
        info = file.tensors.get(name)
        if info is not None:
            return info
    return None


def require(
    file: GgufFile,
    role: str,
    shape: tuple[int, ...],
    layer: int | None = None,
    expert: int | None = None,
) -> TensorInfo:
    """Return the tensor of a role, which must have `shape` (numpy order).

    Leading axes of length 1 do not count. TensorProblem lists the names tried, or both shapes.
    """
    info = find(file, role, layer, expert)
    if info is None:
        raise _missing(file, candidates(role, layer, expert), shape)
    return _checked(file, info, shape)


def expert_slab(
    file: GgufFile, role: str, layer: int, expert: int, num_experts: int, rows: int, cols: int
) -> Slab:
    """Return where the (rows, cols) matrix of one expert lies; role is one of EXPERT_ROLES.

    Looks for a stacked tensor (num_experts, rows, cols), then for gate and up in a merged one
    (num_experts, 2 * rows, cols; gate first), then for the expert's own tensor. TensorProblem if
    there is none or its shape differs; ValueError for a wrong role or index.
    """
    if role not in _EXPERT or not 0 <= expert < num_experts:
        raise ValueError(f"no expert {expert} of {num_experts} for role {role!r}")
    part, parts, outer = expert, num_experts, num_experts
    info = find(file, role, layer)
    height = rows
    if info is None and role in _HALF_OF_MERGED:
        info = find(file, "ffn_gate_up_exps", layer)
        part, parts, height = 2 * expert + _HALF_OF_MERGED[role], 2 * num_experts, 2 * rows
    if info is None:
        info = find(file, role, layer, expert)
        part, parts, outer, height = 0, 1, 1, rows
    if info is None:
        merged = candidates("ffn_gate_up_exps", layer) if role in _HALF_OF_MERGED else ()
        tried = candidates(role, layer) + merged + candidates(role, layer, expert)
        raise _missing(file, tried, (num_experts, rows, cols))
    _checked(file, info, (outer, height, cols))
    if parts > 1 and info.type.matrix is not None and not info.type.matrix.has_slices:
        what = f"tensor {quoted(info.name)}"
        raise refusal(file.label_of(info), info.offset, what, "a type whose slices lie apart", info.type.name)
    nbytes = info.nbytes // parts
    return Slab(
        offset=info.offset + part * nbytes, nbytes=nbytes, type=info.type, tensor=info.name, file=info.file
    )


def expert_vector(file: GgufFile, role: str, layer: int, expert: int, num_experts: int, length: int) -> Slab:
    """Return where one expert's row of a bias (num_experts, length) lies; raises as `require`."""
    info = require(file, role, (num_experts, length), layer)
    nbytes = info.nbytes // num_experts
    return Slab(
        offset=info.offset + expert * nbytes, nbytes=nbytes, type=info.type, tensor=info.name, file=info.file
    )


def _missing(file: GgufFile, names: tuple[str, ...], shape: tuple[int, ...]) -> TensorProblem:
    what = f"tensor {quoted(names[0])}"
    error = refusal(file.label, None, what, f"one named {' or '.join(names)}", "none of them")
    return TensorProblem(str(error), names[0], shape)


def _checked(file: GgufFile, info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    if _without_leading_ones(info.shape) != _without_leading_ones(shape):
        what = f"tensor {quoted(info.name)}"
        error = refusal(file.label_of(info), info.offset, what, f"shape {shape}", f"shape {info.shape}")
        raise TensorProblem(str(error), info.name, shape)
    return info


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]
