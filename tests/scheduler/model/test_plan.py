"""What a model file must hold: hyperparameters, tensors, placement; errors name file and part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as ValueType

from sterna.runtime.config import embedded_model
from sterna.scheduler.model.attention import LatentAttention
from sterna.scheduler.model.families.family import read_hyperparameters
from sterna.scheduler.model.hyper import Hyperparameters
from sterna.scheduler.model.plan import DENSE_HEADER_NBYTES, ModelPlan
from sterna.scheduler.model.planner import read_plan
from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.held.formats import ActivationKind, Format
from sterna.workers.gating import SIGMOID, SOFTMAX
from sterna.workers.messages import FileSlab

from .. import altered_model as altered


@pytest.fixture(scope="module")
def file() -> Iterator[GgufFile]:
    with GgufFile.open(embedded_model()) as opened:
        yield opened


@pytest.fixture(scope="module")
def plan(file: GgufFile) -> ModelPlan:
    return read_plan(file)


def plan_of(path: Path) -> ModelPlan:
    with GgufFile.open(path) as opened:
        return read_plan(opened)


def refusal(path: Path) -> str:
    """Return the one-line error of planning `path`, without the path it must name."""
    with pytest.raises(ModelFileError) as caught:
        plan_of(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text.replace(str(path), "")


# ---- the embedded model ----


def test_hyperparameters_are_those_of_the_file(plan: ModelPlan) -> None:
    h = plan.hyper
    a = h.attention
    assert isinstance(a, LatentAttention)
    assert (h.layers, h.d_model, h.d_ff_dense, a.heads) == (6, 256, 768, 4)
    assert (a.q_rank, a.kv_rank, a.nope, a.rope, a.v_dim) == (256, 128, 32, 32, 64)
    assert (h.experts, h.experts_used, h.d_ff_shared, h.d_ff_expert) == (16, 2, 256, 256)
    assert (h.dense_layers, list(h.moe_layers)) == (1, [1, 2, 3, 4, 5])
    assert (h.gating, h.weights_norm, h.context_length) == (SIGMOID, True, 512)
    assert h.weights_scale == pytest.approx(1.8)
    assert h.eps == pytest.approx(1e-6)
    assert h.rotation.base == 10_000.0
    assert h.cache_width == 160
    assert plan.vocab_size == 2048


def test_every_tensor_of_the_file_has_its_place(file: GgufFile, plan: ModelPlan) -> None:
    placed = {entry.tensor.name for entry in plan.dense.values()}
    stacked = {name for name in file.tensors if "_exps" in name}
    assert placed | stacked == set(file.tensors)
    assert not placed & stacked


def test_dense_tensors_lie_apart_and_aligned(plan: ModelPlan) -> None:
    end = 0
    for entry in sorted(plan.dense.values(), key=lambda entry: entry.at):
        assert entry.at % 64 == 0
        assert entry.at >= end
        end = entry.at + entry.nbytes
    assert end <= plan.dense_nbytes
    assert plan.dense_arena_nbytes == plan.dense_nbytes + DENSE_HEADER_NBYTES
    assert DENSE_HEADER_NBYTES % 64 == 0


def test_expert_matrices_lie_apart_within_a_slot(plan: ModelPlan) -> None:
    (slot_nbytes,) = plan.slot_sizes()
    assert slot_nbytes % 4096 == 0
    for layer, matrices in plan.experts.items():
        assert layer in plan.hyper.moe_layers
        assert [m.role for m in matrices] == ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]
        end = 0
        for matrix in matrices:
            assert matrix.at % 64 == 0
            assert matrix.at >= end
            assert matrix.shape.form is Format.TL1
            end = matrix.at + matrix.shape.nbytes
        assert end <= slot_nbytes


def test_every_expert_has_a_key_and_can_have_a_slot(file: GgufFile, plan: ModelPlan) -> None:
    h = plan.hyper
    keys = [plan.key_of(layer, expert) for layer in h.moe_layers for expert in range(h.experts)]
    assert keys == list(range(plan.num_experts)) == list(range(80))
    assert plan.all_slots() == [(80, plan.slot_sizes()[0])]
    page = plan.expert_page(file, 3, 7, 5)
    assert (page.layer, page.expert, page.slot, page.precision) == (3, 7, 5, 0)
    gate = file.tensors["blk.3.ffn_gate_exps.weight"]
    assert (page.slabs[0].offset, page.slabs[0].nbytes) == (
        gate.offset + 7 * gate.nbytes // 16,
        gate.nbytes // 16,
    )
    assert [slab.tensor for slab in page.slabs] == [
        f"blk.3.ffn_{name}_exps.weight" for name in ("gate", "up", "down")
    ]


def test_workers_are_told_what_they_need(plan: ModelPlan) -> None:
    shapes = plan.layer_shapes()
    assert list(shapes) == [1, 2, 3, 4, 5]
    assert (shapes[1].d_model, shapes[1].d_ff) == (256, 256)
    assert [m[:3] for m in shapes[1].precisions[0]] == [(4, 256, 256)] * 3
    assert plan.expert_activation(1) is ActivationKind.Q8_256


# ---- keys ----

# What the error says besides the file: the key with its value, or the first tensor it contradicts.
KEYS = {
    "attention.head_count": ((5, ValueType.UINT32), "blk.0.attn_q_b.weight"),
    "embedding_length": ((255, ValueType.UINT32), "deepseek2.embedding_length is 255"),
    "expert_count": ((17, ValueType.UINT32), "blk.1.ffn_gate_inp.weight"),
    "expert_used_count": ((17, ValueType.UINT32), "deepseek2.expert_used_count is 17"),
    "expert_gating_func": ((4, ValueType.UINT32), "deepseek2.expert_gating_func is 4"),
    "leading_dense_block_count": ((7, ValueType.UINT32), "deepseek2.leading_dense_block_count is 7"),
    "block_count": ((7, ValueType.UINT32), "blk.6.attn_norm.weight"),
    "expert_feed_forward_length": ((512, ValueType.UINT32), "blk.1.ffn_gate_shexp.weight"),
    "feed_forward_length": ((100, ValueType.UINT32), "deepseek2.feed_forward_length is 100"),
    "attention.kv_lora_rank": ((96, ValueType.UINT32), "blk.0.attn_kv_a_mqa.weight"),
    "attention.key_length_mla": ((32, ValueType.UINT32), "deepseek2.attention.key_length_mla is 32"),
    "attention.layer_norm_rms_epsilon": ((0.0, ValueType.FLOAT32), "layer_norm_rms_epsilon is 0.0"),
    "rope.freq_base": ((-1.0, ValueType.FLOAT32), "rope.freq_base is -1.0"),
    "rope.dimension_count": ((24, ValueType.UINT32), "rope.dimension_count is 24"),
    "rope.scaling.type": (("longrope", ValueType.STRING), "deepseek2.rope.scaling.type is 'longrope'"),
    "expert_group_count": ((8, ValueType.UINT32), "deepseek2.expert_group_used_count"),
    "context_length": ((0, ValueType.UINT32), "deepseek2.context_length is 0"),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_key_is_named(key: str, tmp_path: Path) -> None:
    value, text = KEYS[key]
    assert text in refusal(altered.write(tmp_path / "model.gguf", keys={f"deepseek2.{key}": value}))


def test_an_error_is_one_line_even_for_an_odd_path(tmp_path: Path) -> None:
    for number, key in enumerate(("expert_used_count", "rope.scaling.type", "expert_count")):
        path = altered.write(tmp_path / f"a\nmodel{number}.gguf", keys={f"deepseek2.{key}": KEYS[key][0]})
        with pytest.raises(ModelFileError) as caught:
            plan_of(path)
        assert "\n" not in str(caught.value)


REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "expert_count",
    "expert_used_count", "expert_feed_forward_length", "expert_shared_count", "attention.q_lora_rank",
)  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    assert f"deepseek2.{key}" in refusal(
        altered.write(tmp_path / "model.gguf", keys={f"deepseek2.{key}": None})
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("embedding_length", ("256", ValueType.STRING)), ("rope.freq_base", (10_000, ValueType.UINT32))],
)
def test_a_key_of_the_wrong_type_is_named(key: str, value: tuple[object, ValueType], tmp_path: Path) -> None:
    assert f"deepseek2.{key}" in refusal(
        altered.write(tmp_path / "model.gguf", keys={f"deepseek2.{key}": value})
    )


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = altered.write(tmp_path / "model.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"deepseek2", b"deepseek9", 1))
    text = refusal(path)
    assert "general.architecture" in text
    assert "deepseek9" in text
    assert "deepseek2" in text


def test_keys_that_may_be_absent_have_the_defaults_of_the_format(tmp_path: Path) -> None:
    optional = ("expert_gating_func", "expert_weights_norm", "expert_weights_scale", "expert_group_count")
    path = altered.write(tmp_path / "model.gguf", keys={f"deepseek2.{key}": None for key in optional})
    h = plan_of(path).hyper
    assert (h.gating, h.weights_norm, h.weights_scale) == (SOFTMAX, False, 1.0)


def hyper_of(path: Path, **keys: int | None) -> Hyperparameters:
    changed = {
        f"deepseek2.{key}": None if value is None else (value, ValueType.UINT32)
        for key, value in keys.items()
    }
    with GgufFile.open(altered.write(path, keys=changed)) as opened:
        return read_hyperparameters(opened)


@pytest.mark.parametrize(
    ("layers", "vocabulary", "gating"),
    [(47, 154880, SIGMOID), (48, 154880, SIGMOID), (47, 102400, SOFTMAX), (46, 154880, SOFTMAX)],
)
def test_early_glm_files_lack_the_gating_key(
    layers: int, vocabulary: int, gating: int, tmp_path: Path
) -> None:
    """Spec 4.2: 47 or 48 layers with that vocabulary mean sigmoid."""
    h = hyper_of(tmp_path / "m.gguf", expert_gating_func=None, block_count=layers, vocab_size=vocabulary)
    assert h.gating == gating


def test_prediction_layers_at_the_end_do_not_count(tmp_path: Path) -> None:
    assert hyper_of(tmp_path / "m.gguf", block_count=7, nextn_predict_layers=1).layers == 6


def test_a_missing_vocabulary_size_is_no_obstacle(tmp_path: Path) -> None:
    path = altered.write(tmp_path / "m.gguf", keys={"deepseek2.vocab_size": None})
    assert plan_of(path).vocab_size == 2048


# ---- tensors ----


def missing(name: str, path: Path) -> str:
    return refusal(altered.write(path / "model.gguf", change=altered.only(name, None)))


REQUIRED_TENSORS = (
    "token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.2.attn_q_a.weight",
    "blk.2.attn_q_a_norm.weight", "blk.2.attn_q_b.weight", "blk.3.attn_kv_a_mqa.weight",
    "blk.3.attn_kv_a_norm.weight", "blk.4.attn_k_b.weight", "blk.4.attn_v_b.weight",
    "blk.5.attn_output.weight", "blk.5.ffn_norm.weight", "blk.0.ffn_up.weight", "blk.1.ffn_gate_inp.weight",
    "blk.1.ffn_down_shexp.weight", "blk.3.ffn_gate_exps.weight", "blk.5.ffn_down_exps.weight",
)  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED_TENSORS)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    assert name in missing(name, tmp_path)


def test_tensors_that_may_be_absent(tmp_path: Path) -> None:
    path = altered.write(
        tmp_path / "model.gguf",
        change=lambda name, tensor: None if name == "output.weight" or "exp_probs_b" in name else tensor,
    )
    plan = plan_of(path)
    assert plan.dense["output"].tensor.name == "token_embd.weight"
    assert "2.exp_probs_b" not in plan.dense


def test_a_misshapen_tensor_shows_both_shapes(tmp_path: Path) -> None:
    change = altered.only("blk.2.attn_norm.weight", (np.ones(128, np.float32), Type.F32))
    text = refusal(altered.write(tmp_path / "model.gguf", change=change))
    assert "blk.2.attn_norm.weight" in text
    assert "(256,)" in text
    assert "(128,)" in text


def test_a_type_that_nothing_decodes_is_named(tmp_path: Path) -> None:
    name = "blk.1.ffn_down_exps.weight"
    change = altered.only(name, (np.zeros(altered.values(name).shape, np.uint8), Type.I8))
    text = refusal(altered.write(tmp_path / "model.gguf", change=change))
    assert name in text
    assert "type I8 cannot be computed with or decoded" in text


def test_a_tensor_that_would_change_the_model_is_refused(tmp_path: Path) -> None:
    """A bias that was left out would be another model; what is only a table may be there."""
    bias = (np.ones(256, np.float32), Type.F32)
    text = refusal(altered.write(tmp_path / "m.gguf", extra={"blk.2.attn_output.bias": bias}))
    assert "blk.2.attn_output.bias" in text
    plan_of(altered.write(tmp_path / "n.gguf", extra={"blk.2.attn_rot_embd.weight": bias}))


def test_single_and_merged_expert_tensors_are_found(tmp_path: Path) -> None:
    """Both other ways to store experts give the same slots."""
    tensors = altered.tensors()
    gate, up = (tensors[f"blk.2.ffn_{name}_exps.weight"][0] for name in ("gate", "up"))
    extra = {"blk.2.ffn_gate_up_exps.weight": (np.concatenate((gate, up), axis=1), Type.TQ2_0)}
    for name in ("gate", "up", "down"):
        for expert, data in enumerate(tensors[f"blk.3.ffn_{name}_exps.weight"][0]):
            extra[f"blk.3.ffn_{name}.{expert}.weight"] = (data, Type.TQ2_0)
    gone = {f"blk.2.ffn_{name}_exps.weight" for name in ("gate", "up")}
    gone |= {f"blk.3.ffn_{name}_exps.weight" for name in ("gate", "up", "down")}
    path = altered.write(
        tmp_path / "model.gguf", change=lambda name, tensor: None if name in gone else tensor, extra=extra
    )
    with GgufFile.open(path) as other, GgufFile.open(embedded_model()) as first:
        plans = (read_plan(other), read_plan(first))
        for layer in (2, 3):
            for expert in (0, 7, 15):
                pages = (
                    plans[0].expert_page(other, layer, expert, 0),
                    plans[1].expert_page(first, layer, expert, 0),
                )
                assert read(other, pages[0].slabs) == read(first, pages[1].slabs)


def read(opened: GgufFile, slabs: list[FileSlab]) -> list[bytes]:
    return [os.pread(opened.fd, slab.nbytes, slab.offset) for slab in slabs]
