"""`sterna validate`, and what `sterna inspect` tells of models that cannot be run: all from the header."""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result

from sterna.runtime.cli.main import cli
from sterna.runtime.config import embedded_model
from sterna.runtime.examine.describe import describe, validate
from sterna.runtime.examine.groups import group_of
from sterna.shm.errors import ModelFileError, ModelNotFound
from sterna.workers.checkpoint.file.gguf import GgufFile

from ...scheduler import altered_model as altered
from ...system.gguf_copy import Type, copy_model, shard_path
from ...workers.checkpoint.file.gguf_bytes import F32, STR, U32, build, key, text
from .sparse_model import write_flash

ValueType = altered.GGUFValueType


def invoked(*arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments], standalone_mode=False)


def problems(path: Path) -> list[str]:
    found: list[str] = validate(path)["problems"]
    return found


def test_a_sound_model_is_one_line_and_no_error() -> None:
    found = invoked("validate", str(embedded_model()))
    assert found.return_value == 0
    assert found.stdout == f"{embedded_model()}: can be loaded (deepseek2)\n"
    facts = json.loads(invoked("validate", "--json", str(embedded_model())).stdout)
    assert facts["loads"]
    assert facts["problems"] == facts["notes"] == facts["unused"] == []


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    """Missing tensors of three roles, one of another shape, one of a type without use, and the tokenizer."""
    gone = {
        "blk.2.attn_output.weight",
        "blk.4.attn_output.weight",
        "blk.3.ffn_up_exps.weight",
        "output_norm.weight",
    }

    def change(name: str, data: npt.NDArray[Any], stored: Type) -> tuple[npt.NDArray[Any], Type] | None:
        if name == "blk.1.attn_norm.weight":
            return data[:128], stored
        if name == "blk.5.attn_q_a.weight":
            return np.zeros((256, 256), np.int8), Type.I8
        return None if name in gone else (data, stored)

    path = copy_model(tmp_path / "m.gguf", change, metadata={"tokenizer.ggml.pre": "martian"})
    found = invoked("validate", str(path))
    assert found.return_value == ModelFileError.exit_code
    expected = [
        r"'output_norm\.weight': expected one named .*, found none of them$",
        r"'blk\.1\.attn_norm\.weight': expected shape \(256,\), found shape \(128,\)$",
        r"'blk\.2\.attn_output\.weight': .* \(2 such tensors\)$",
        r"'blk\.3\.ffn_up_exps\.weight': .*found none of them$",
        r"blk\.5\.attn_q_a\.weight: type I8 cannot be computed with or decoded$",
        r"tokenizer\.ggml\.pre.*martian",
    ]
    lines = found.stdout.splitlines()
    assert len(lines) == len(expected), lines
    for pattern, line in zip(expected, lines, strict=True):
        assert re.search(pattern, line), (pattern, line)
        assert line.startswith(str(path))


def test_tables_of_sums_without_tile_sizes_are_told(tmp_path: Path) -> None:
    """Otherwise the scheduler would be the first to find that they are nowhere."""
    name = "blk.1.ffn_down_shexp.weight"
    data = (np.zeros((32, 513), np.uint8), Type.I8)  # the bytes of a TL1 of 256 x 256, and its scale
    path = altered.write(tmp_path / "m.gguf", change=altered.only(name, data))
    content = bytearray(path.read_bytes())
    at = content.index(text(name)) + len(text(name))
    struct.pack_into("<IQQI", content, at, 2, 256, 256, 38)
    path.write_bytes(content)
    expected = f"{name}: expected its tile sizes in key 'sterna.tl1.256x256'"
    assert any(expected in line for line in problems(path))
    path.with_name("kernel_config.ini").write_text("[a]\nm = 256\nk = 256\nbm = 64\nbk = 128\nbmm = 32\n")
    assert not any("tile sizes" in line for line in problems(path))


def test_an_unknown_architecture_does_not_hide_the_tokenizer(tmp_path: Path) -> None:
    changed: dict[str, object] = {"tokenizer.ggml.pre": "martian"}
    first, second = problems(copy_model(tmp_path / "m.gguf", architecture="mamba", metadata=changed))
    assert "general.architecture is 'mamba'" in first
    assert "martian" in second


def test_broken_and_absent_files_have_their_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    found = invoked("validate", "--json", str(tmp_path / "m.gguf"))
    assert found.return_value == 65
    facts = json.loads(found.stdout)
    assert not facts["loads"]
    assert "m.gguf: byte 4" in facts["problems"][0]
    with pytest.raises(ModelNotFound, match=r"none\.gguf: no such model file"):
        validate(tmp_path / "none.gguf")


def test_parts_of_a_model_are_told_and_missed(tmp_path: Path) -> None:
    first = copy_model(tmp_path / "m.gguf", shards=3)
    assert validate(first)["loads"]
    facts = describe(first)
    assert facts["files"] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert facts["parameters"] == describe(embedded_model())["parameters"]
    shard_path(tmp_path / "m.gguf", 2, 3).unlink()
    assert problems(first) == [f"{first}: 1 of 3 parts are missing beside it: m-00002-of-00003.gguf"]


# ---- what is left aside, what cannot be run ----


def test_layers_that_predict_further_tokens_are_noted(tmp_path: Path) -> None:
    norm = (np.ones(256, np.float32), Type.F32)
    unused = ["blk.6.nextn.enorm.weight", "blk.6.attn_norm.weight"]
    path = altered.write(
        tmp_path / "m.gguf",
        keys={
            "deepseek2.block_count": (7, ValueType.UINT32),
            "deepseek2.nextn_predict_layers": (1, ValueType.UINT32),
        },
        extra=dict.fromkeys(unused, norm),
    )
    facts = validate(path)
    assert facts["loads"]
    assert facts["unused"] == unused
    assert facts["notes"] == [
        "2 tensors are not used: 2 of layers behind the last one (next-token prediction)"
    ]
    rows = {row["group"]: row for row in describe(path)["groups"]}
    assert (rows["ignored"]["tensors"], rows["ignored"]["place"]) == (2, "not read")
    assert rows["norms"]["tensors"] == 25


def test_an_architecture_that_cannot_be_run_is_described(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    keys = (
        key("general.architecture", STR, text("mamba")),
        key("mamba.block_count", U32, struct.pack("<I", 64)),
        key("mamba.ssm.eps", F32, struct.pack("<f", 0.5)),
    )
    tensors = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 4, 0, 0)
    path.write_bytes(build(keys, (tensors,), bytes(512)))
    facts = describe(path)
    assert not facts["runs"]
    assert "general.architecture is 'mamba'; supported: deepseek2" in facts["problems"][0]
    assert facts["hyperparameters"] == {"block_count": 64, "ssm.eps": 0.5}
    assert [(row["group"], row["place"]) for row in facts["groups"]] == [("embedding", "not supported")]
    shown = invoked("inspect", str(path))
    assert shown.return_value == 0
    assert "cannot be run: " in shown.stdout


GROUPS = {
    "embedding": ("token_embd.weight", "model.embed_tokens.weight"),
    "head": ("output.weight", "lm_head.weight"),
    "norms": ("output_norm.weight", "blk.1.attn_q_norm.weight", "model.layers.1.input_layernorm.weight"),
    "attention": ("blk.0.attn_kv_b.weight", "blk.0.attn_sinks.weight", "model.layers.0.self_attn.q_proj"),
    "dense FFN": ("blk.0.ffn_up.weight", "model.layers.0.mlp.gate_proj.weight"),
    "router": ("blk.3.ffn_gate_inp.bias", "blk.3.exp_probs_b.bias", "model.layers.3.mlp.gate.weight"),
    "shared experts": ("blk.3.ffn_gate_inp_shexp", "model.layers.3.mlp.shared_experts.up_proj"),
    "experts": ("blk.3.ffn_gate_up_exps.weight", "blk.3.ffn_down.7.weight", "model.layers.3.mlp.experts.7.w"),
    "next-token prediction": ("blk.47.nextn.eh_proj.weight",),
    "other": ("blk.0.ssm_a",),
}  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_names_tell_the_group(group: str) -> None:
    assert {group_of(name) for name in GROUPS[group]} == {group}


# ---- without reading the data ----


def test_eighteen_gigabytes_take_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as GLM-4.7-Flash in Q4_K; the tensors' bytes are not touched at all."""
    path = write_flash(tmp_path / "flash.gguf", layers=47, expert_type=Type.Q4_K)
    monkeypatch.delattr(GgufFile, "data")
    began_s = time.perf_counter()
    told = validate(path)
    middle = time.perf_counter()
    facts = describe(path)
    end = time.perf_counter()
    print(
        f"\n{path.stat().st_size / 1e9:.1f} GB: validate {middle - began_s:.2f} s,"
        f" inspect {end - middle:.2f} s"
    )
    assert told["loads"]
    (experts,) = (row for row in facts["groups"] if row["group"] == "experts")
    assert experts["types"] == {"Q4_K": 3 * 46}
    assert experts["file_bytes"] > 15e9
    assert experts["held_as"] == ["Q4_K"]
    assert facts["parameters"] > 29e9
