"""Keys and tensors that would make another model of a file, or none, are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sterna.scheduler.model.attention import LatentAttention
from sterna.scheduler.model.plan import ModelPlan
from sterna.scheduler.model.planner import read_plan
from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile

from .tiny_files import write
from .tiny_models import Value, tiny_model


def plan_of(
    path: Path,
    name: str,
    keys: Mapping[str, Value | None] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> ModelPlan:
    """Plan the tiny model `name` with keys and tensors changed, added, or taken out (None)."""
    tiny = tiny_model(name)
    changed = {**tiny.keys, **(keys or {})}
    values = {**tiny.tensors, **(tensors or {})}
    kept = {key: value for key, value in changed.items() if value is not None}
    present = {key: value for key, value in values.items() if value is not None}
    with GgufFile.open(write(replace(tiny, keys=kept, tensors=present), path / "m.gguf")) as file:
        return read_plan(file)


# What the refusal names, and what was done to which model.
KEYS: dict[str, tuple[str, dict[str, Value | None]]] = {
    "rope.dimension_count is 128, expected at most": ("qwen3", {"rope.dimension_count": 128}),
    "attention.head_count_kv is 3": ("qwen3", {"attention.head_count_kv": 3}),
    "attention.value_length": ("qwen3", {"attention.value_length": 16}),
    "attention.causal": ("qwen2", {"attention.causal": False}),
    "'qwen3.rope.freq_base'": ("qwen3", {"rope.freq_base": None}),
    "attention.temperature_scale": ("deepseek2-glm", {"attention.temperature_scale": 0.1}),
    "rope.scaling.original_context_length is 0": (
        "deepseek2-v3", {"rope.scaling.original_context_length": 0},
    ),
    "'deepseek2.rope.scaling.yarn_log_multiplier'": (
        "deepseek2-v3", {"rope.scaling.yarn_log_multiplier": None},
    ),
    "'deepseek2.expert_group_used_count'": ("deepseek2-v3", {"expert_group_used_count": None}),
    "rope.scaling.yarn_ext_factor": ("gpt-oss", {"rope.scaling.yarn_ext_factor": 0.5}),
    "rope.scaling.yarn_log_multiplier is": ("gpt-oss", {"rope.scaling.yarn_log_multiplier": 0.1}),
    "attention.sliding_window": ("gpt-oss", {"attention.sliding_window": None}),
    "logit_scale is 0.0": ("granitemoe", {"logit_scale": float("inf")}),
    "'granitemoe.residual_scale'": ("granitemoe", {"residual_scale": None}),
    "'glm4moe.expert_weights_norm'": ("glm4moe", {"expert_weights_norm": None}),
    "'blk.3.": ("glm4moe", {"nextn_predict_layers": 0}),
}  # fmt: skip


@pytest.mark.parametrize("text", KEYS)
def test_keys(text: str, tmp_path: Path) -> None:
    name, keys = KEYS[text]
    with pytest.raises(ModelFileError) as caught:
        plan_of(tmp_path, name, keys)
    assert text in str(caught.value)


ONE = np.ones(256, np.float32)
TENSORS: dict[str, tuple[str, dict[str, np.ndarray | None]]] = {
    "blk.1.ffn_down.bias": ("qwen2", {"blk.1.ffn_down.bias": ONE}),
    "output_norm.bias": ("llama", {"output_norm.bias": ONE}),
    "cls.output.weight": ("qwen3", {"cls.output.weight": np.ones((2, 256), np.float32)}),
    "model.layers.0.self_attn.q_proj.bias": ("qwen2", {"model.layers.0.self_attn.q_proj.bias": ONE}),
    "blk.2.exp_probs_b.bias": ("glm4moe", {"blk.2.exp_probs_b.bias": None}),
    "blk.0.attn_sinks.weight": ("gpt-oss", {"blk.0.attn_sinks.weight": None}),
    "blk.1.ffn_gate_exps.bias": ("gpt-oss", {"blk.1.ffn_gate_exps.bias": None}),
    "blk.1.attn_k.scale": ("bitnet", {"blk.1.attn_k.scale": np.ones(1, np.float32)}),
}


@pytest.mark.parametrize("text", TENSORS)
def test_tensors(text: str, tmp_path: Path) -> None:
    name, tensors = TENSORS[text]
    with pytest.raises(ModelFileError) as caught:
        plan_of(tmp_path, name, tensors=tensors)
    assert text in str(caught.value)


def test_keys_that_families_may_leave_out(tmp_path: Path) -> None:
    """What files of their time lack, and what stands for it."""
    assert plan_of(tmp_path, "llama", {"rope.freq_base": None}).hyper.rotation.base == 10_000.0
    widths: dict[str, Value | None] = {
        "expert_feed_forward_length": None,
        "expert_shared_feed_forward_length": None,
        "feed_forward_length": 64,
    }
    h = plan_of(tmp_path, "qwen2moe", widths).hyper
    assert (h.d_ff_expert, h.d_ff_shared) == (32, 64)
    assert plan_of(tmp_path, "qwen3moe", {"expert_weights_scale": 0.0}).hyper.weights_scale == 1.0
    assert plan_of(tmp_path, "qwen3", {"attention.key_length": None, "attention.value_length": None})


def test_both_forms_of_keys_and_values_may_be_there(tmp_path: Path) -> None:
    extra = {f"blk.{layer}.attn_k_b.weight": np.ones((4, 64, 32), np.float32) for layer in range(3)}
    a = plan_of(tmp_path, "deepseek2-legacy", tensors=extra).hyper.attention
    assert isinstance(a, LatentAttention)
    assert a.joined
