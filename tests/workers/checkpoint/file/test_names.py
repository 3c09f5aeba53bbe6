"""Tensor lookup by role: both naming schemes, stacked, merged and individual experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.tensor_mapping import get_tensor_name_map

from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.file.names import (
    EXPERT_ROLES,
    LAYER_ROLES,
    MODEL_ROLES,
    candidates,
    expert_slab,
    find,
    require,
)
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME, dequantize

from . import gguf_bytes

MODEL = Path(__file__).parents[4] / "runtime" / "models" / "tales-small.gguf"
EXPERTS, ROWS, COLS = 3, 4, 256

Write = Callable[[dict[str, np.ndarray]], GgufFile]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    files: list[GgufFile] = []

    def make(tensors: dict[str, np.ndarray]) -> GgufFile:
        path = tmp_path / f"{len(files)}.gguf"
        writer = gguf.GGUFWriter(path, "deepseek2")
        for name, values in tensors.items():
            tensor_type = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, tensor_type), raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(GgufFile.open(path))
        return files[-1]

    yield make
    for file in files:
        file.close()


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-127, 128, shape).astype(np.float32)


def test_every_tensor_of_the_embedded_model_has_a_role() -> None:
    with GgufFile.open(MODEL) as file:
        found = {info.name for role in MODEL_ROLES if (info := find(file, role))}
        for layer in range(6):
            found |= {info.name for role in LAYER_ROLES if (info := find(file, role, layer))}
        assert found == set(file.tensors)


@pytest.mark.parametrize("role", [*MODEL_ROLES, *LAYER_ROLES])
def test_names_are_those_the_oracle_maps_to_each_other(role: str) -> None:
    layer = None if role in MODEL_ROLES else 3
    ours, *others = candidates(role, layer)
    stem, suffix = ours.rsplit(".", 1)
    name_map = get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 5)
    assert suffix == ("bias" if role == "exp_probs_b" or role.endswith("_bias") else "weight")
    assert stem in {name.format(bid=3) for name in gguf.TENSOR_NAMES.values()}
    if role == "ffn_gate_up_exps":  # the oracle's deepseek2 list has no merged tensor
        assert stem == gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.FFN_GATE_UP_EXP].format(bid=3)
        return
    for other in others:
        plain = other.removesuffix(".weight").removesuffix("_bias")
        assert name_map.get_name(plain) == stem, other


def test_gguf_name_comes_first_and_the_other_is_found(write: Write) -> None:
    both = write(
        {"blk.2.attn_q_a.weight": values(4, 32), "model.layers.2.self_attn.q_a_proj.weight": values(4, 64)}
    )
    other = write({"model.layers.2.self_attn.q_a_proj.weight": values(4, 64)})
    first, second = find(both, "attn_q_a", 2), find(other, "attn_q_a", 2)
    assert first is not None
    assert second is not None
    assert first.name == "blk.2.attn_q_a.weight"
    assert second.name == "model.layers.2.self_attn.q_a_proj.weight"
    assert find(other, "attn_q_a", 1) is None
    assert require(other, "attn_q_a", (4, 64), 2) == second


def test_require_names_what_it_tried_and_the_shapes(write: Write) -> None:
    file = write({"blk.0.attn_q_a.weight": values(4, 32), "blk.0.attn_k_b.weight": values(1, 8, 32)})
    with pytest.raises(ModelFileError) as caught:
        require(file, "attn_q_b", (4, 32), 0)
    assert file.path in str(caught.value)
    assert "blk.0.attn_q_b.weight or model.layers.0.self_attn.q_b_proj.weight" in str(caught.value)
    with pytest.raises(
        ModelFileError, match=r"blk\.0\.attn_q_a\.weight': expected shape \(4, 64\), found shape \(4, 32\)"
    ):
        require(file, "attn_q_a", (4, 64), 0)
    with pytest.raises(ModelFileError, match="expected shape"):
        require(file, "attn_q_a", (32, 4), 0)
    assert require(file, "attn_k_b", (8, 32), 0).shape == (1, 8, 32)  # leading ones do not count


def test_wrong_use_is_a_value_error(write: Write) -> None:
    file = write({"output.weight": values(4, 32)})
    for role, layer, expert in (
        ("nonsense", None, None),
        ("nonsense", 0, None),
        ("attn_q_a", None, None),
        ("output", 0, None),
        ("output", None, 1),
        ("attn_q_a", 0, 1),
        ("attn_q_a", -1, None),
        ("ffn_up_exps", 0, -1),
    ):
        with pytest.raises(ValueError, match=role):
            find(file, role, layer, expert)
    with pytest.raises(ValueError, match="no expert 3 of 3"):
        expert_slab(file, "ffn_up_exps", 0, 3, 3, 4, 32)
    with pytest.raises(ValueError, match="ffn_gate_up_exps"):
        expert_slab(file, "ffn_gate_up_exps", 0, 0, 3, 4, 32)


def layouts() -> dict[str, dict[str, np.ndarray]]:
    gate, up, down = (values(EXPERTS, ROWS, COLS) * (k + 1) / 3 for k in range(3))
    merged = np.concatenate((gate, up), axis=1)
    return {
        "stacked": {
            "blk.1.ffn_gate_exps.weight": gate,
            "blk.1.ffn_up_exps.weight": up,
            "blk.1.ffn_down_exps.weight": down,
        },
        "merged": {"blk.1.ffn_gate_up_exps.weight": merged, "blk.1.ffn_down_exps.weight": down},
        "merged, other names": {
            "model.layers.1.mlp.experts.gate_up_proj": merged,
            "model.layers.1.mlp.experts.down_proj": down,
        },
        "individual": {
            f"blk.1.ffn_{part}.{expert}.weight": stack[expert]
            for part, stack in (("gate", gate), ("up", up), ("down", down))
            for expert in range(EXPERTS)
        },
        "individual, other names": {
            f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight": stack[expert]
            for part, stack in (("gate", gate), ("up", up), ("down", down))
            for expert in range(EXPERTS)
        },
    }


@pytest.mark.parametrize("layout", layouts())
def test_expert_slab_is_the_experts_matrix(write: Write, layout: str) -> None:
    file = write(layouts()[layout])
    for role, expected in zip(
        ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), layouts()["stacked"].values(), strict=True
    ):
        for expert in range(EXPERTS):
            slab = expert_slab(file, role, 1, expert, EXPERTS, ROWS, COLS)
            info = file.tensors[slab.tensor]
            assert slab.type.name == "Q8_0"
            assert info.offset <= slab.offset <= slab.offset + slab.nbytes <= info.offset + info.nbytes
            raw = np.fromfile(file.path, np.uint8, slab.nbytes, offset=slab.offset)
            tensor_type = GGMLQuantizationType.Q8_0
            through_disk = gguf.quants.dequantize(
                gguf.quants.quantize(expected[expert], tensor_type), tensor_type
            )
            assert np.array_equal(dequantize(slab.type, raw, (ROWS, COLS)), through_disk)


def test_expert_roles_are_the_three_matrices() -> None:
    assert set(EXPERT_ROLES) == {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize(
    ("experts", "rows", "cols"), [(EXPERTS, ROWS + 1, COLS), (EXPERTS, COLS, ROWS), (EXPERTS + 1, ROWS, COLS)]
)
def test_expert_slab_checks_the_shape(write: Write, layout: str, experts: int, rows: int, cols: int) -> None:
    file = write(layouts()[layout])
    for role in EXPERT_ROLES:
        with pytest.raises(ModelFileError, match="expected"):
            # The last expert: one more than there are is missing when each has its own tensor.
            expert_slab(file, role, 1, experts - 1, experts, rows, cols)


def test_missing_experts_name_all_places(write: Write) -> None:
    file = write({"output.weight": values(4, 32)})
    with pytest.raises(ModelFileError) as caught:
        expert_slab(file, "ffn_up_exps", 5, 2, 4, 4, 32)
    for name in ("blk.5.ffn_up_exps.weight", "blk.5.ffn_gate_up_exps.weight", "blk.5.ffn_up.2.weight"):
        assert name in str(caught.value)
    with pytest.raises(ModelFileError) as caught:
        expert_slab(file, "ffn_down_exps", 5, 2, 4, 4, 32)
    assert "gate_up" not in str(caught.value)


def test_a_stack_with_one_scale_behind_it_is_refused(tmp_path: Path) -> None:
    """Its slices are no matrices of that type: the scale is the last expert's alone."""
    path = tmp_path / "m.gguf"
    stack = gguf_bytes.tensor("blk.1.ffn_down_exps.weight", (128, 4, 2), TYPES_BY_NAME["I2_S"].id)
    path.write_bytes(gguf_bytes.build((), (stack,), bytes(2 * 4 * 128 // 4 + 32)))
    with GgufFile.open(path) as file, pytest.raises(ModelFileError, match="slices lie apart, found I2_S"):
        expert_slab(file, "ffn_down_exps", 1, 0, 2, 4, 128)
