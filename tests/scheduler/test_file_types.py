"""Whole models with tensors of each type that the gguf package cannot write, by the same numbers.

The other types are in `test_engine.py` and `tests/system/test_weight_types.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME

from ..workers.checkpoint.file.gguf_bytes import text
from ..workers.checkpoint.types import ternary_bytes as tb
from . import altered_model as altered
from .local_engine import Generated, LocalEngine
from .test_engine import PROMPTS, apart, ternary_run

Bytes = npt.NDArray[np.uint8]
ValueType, Type = altered.GGUFValueType, altered.Type

TL1_TILES, TL2_TILES = (64, 128, 32), (64, 96)
TILES = {
    f"sterna.{name}.256x256": ([*tiles], ValueType.ARRAY, ValueType.INT32)
    for name, tiles in (("tl1", TL1_TILES), ("tl2", (*TL2_TILES, 32)))
}


def run(path: Path) -> list[Generated]:
    return LocalEngine(path, streams=3).run(PROMPTS[:3], 4)


def with_types(
    path: Path,
    tensors: Mapping[str, tuple[int, tuple[int, ...], Bytes]],
    keys: Mapping[str, object] | None = None,
) -> Path:
    """Write the embedded model with tensors given as (type id, shape, bytes), whatever the package knows."""
    raw = {
        name: (data.reshape(*(1,) * (len(shape) - 1), -1), Type.I8)
        for name, (_, shape, data) in tensors.items()
    }
    altered.write(path, keys=keys, change=lambda name, tensor: raw.get(name, tensor))  # type: ignore[arg-type]
    content = bytearray(path.read_bytes())
    for name, (type_id, shape, _) in tensors.items():
        at = content.index(text(name)) + len(text(name))
        struct.pack_into(f"<I{len(shape)}QI", content, at, len(shape), *reversed(shape), type_id)
    path.write_bytes(content)
    return path


# ---- one scale for a tensor: the shared expert's matrices of layer 1 ----

SHARED = tuple(f"blk.1.ffn_{name}_shexp.weight" for name in ("gate", "up", "down"))
SHAPE = (256, 256)


def codes_of(name: str) -> tuple[Bytes, np.float16]:
    """Return the codes of a ternary tensor and the mean of its scales."""
    values = altered.values(name)
    return (np.sign(values) + 1).astype(np.uint8), np.float16(np.abs(values[values != 0]).mean())


def blocks(encode: tb.BlockEncoder, width: int, codes: Bytes, scale: np.float16) -> Bytes:
    return encode(codes, np.full((len(codes), codes.shape[1] // width), scale, np.float16))


ENCODERS = {
    "I2_S": lambda codes, scale: tb.i2_s(codes, float(scale)),
    "TL1": lambda codes, scale: tb.tl1(codes, float(scale), TL1_TILES),
    "TL2": lambda codes, scale: tb.tl2(codes, float(scale), TL2_TILES),
    "IQ1_BN": lambda codes, scale: tb.iq1_bn(codes, np.full(len(codes), scale, np.float16)),
    "IQ2_BN_R4": lambda codes, scale: tb.iq2_bn_r4(codes, np.full(len(codes), scale, np.float32)),
    **{
        name: lambda codes, scale, encode=encode, width=width: blocks(encode, width, codes, scale)
        for name, (encode, width) in tb.BLOCK_TYPES.items()
        if name not in ("TQ1_0", "TQ2_0")
    },
}
SLOW = ("IQ1_BN", "IQ2_BN_R4", "BITNET_T158", "PQ2_0", "TL1")  # read in ways that others here have too
IDS = {"BITNET_T158": 30, "TL2": 39, "PQ2_0": 142}  # in files; others have the id of the table


@cache
def reference(folder: Path) -> list[Generated]:
    """Return the answers with the same numbers as float32."""

    def floats(name: str) -> altered.Tensor:
        codes, scale = codes_of(name)
        return (codes.astype(np.float32) - 1) * np.float32(scale), Type.F32

    return run(altered.write(folder / "f32.gguf", change=altered.converted(SHARED, floats)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("types")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ENCODERS]
)
def test_a_ternary_type_says_what_its_numbers_say(name: str, folder: Path) -> None:
    """Only the int8 codes of activations lie between: none for types that are decoded at load."""
    file_type = TYPES_BY_NAME[name]
    tensors = {
        tensor: (IDS.get(name, file_type.id), SHAPE, ENCODERS[name](*codes_of(tensor))) for tensor in SHARED
    }
    path = with_types(folder / f"{name}.gguf", tensors, TILES)
    with GgufFile.open(path) as file:
        assert {file.tensors[tensor].type.name for tensor in SHARED} == {name}
    difference = apart(run(path), reference(folder))
    print(f"\n{name}: mean difference of prompt log-probabilities {difference:.5f}")
    assert difference < 0.02


# ---- experts ----


def test_experts_of_id_30_are_known_by_their_size(tmp_path: Path) -> None:
    """BITNET_T158 and BF16 share the id; the numbers are those of the embedded model, to the bit."""
    tensors = {}
    for name in altered.tensors():
        if any(each in name for each in altered.EXPERTS):
            values = altered.values(name)
            flat = values.reshape(-1, values.shape[-1])
            scales = np.abs(flat).max(axis=1, keepdims=True).astype(np.float16)  # rows of one block
            codes = (np.sign(flat) + 1).astype(np.uint8).reshape(len(flat), 64, 4)
            packed = np.bitwise_or.reduce(codes << np.arange(0, 8, 2, np.uint8), axis=2)
            tensors[name] = (30, values.shape, np.concatenate((packed, scales.view(np.uint8)), axis=1))
    path = with_types(tmp_path / "m.gguf", tensors)
    assert LocalEngine(path, streams=3).run(PROMPTS[:3], 12) == ternary_run()


def test_merged_gate_and_up_give_the_same_bits(tmp_path: Path) -> None:
    """In all layers but one, whose experts are a tensor each."""
    tensors = altered.tensors()
    gone, extra = set[str](), dict[str, altered.Tensor]()
    for layer in (1, 2, 3, 4):
        names = [f"blk.{layer}.ffn_{name}_exps.weight" for name in ("gate", "up")]
        merged = np.concatenate([tensors[name][0] for name in names], axis=1)
        extra[f"blk.{layer}.ffn_gate_up_exps.weight"] = (merged, Type.TQ2_0)
        gone.update(names)
    for name in ("gate", "up", "down"):
        gone.add(stacked := f"blk.5.ffn_{name}_exps.weight")
        for expert, data in enumerate(tensors[stacked][0]):
            extra[f"blk.5.ffn_{name}.{expert}.weight"] = (data, Type.TQ2_0)
    path = altered.write(
        tmp_path / "m.gguf", change=lambda name, tensor: None if name in gone else tensor, extra=extra
    )
    assert LocalEngine(path, streams=3).run(PROMPTS[:3], 12) == ternary_run()


def test_each_layer_may_have_types_of_its_own(tmp_path: Path) -> None:
    """As in files of mixed precision: slots of several sizes."""
    held = {1: Type.Q8_0, 2: Type.F16, 4: Type.TQ1_0}

    def change(name: str, tensor: altered.Tensor) -> altered.Tensor:
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        if "_exps" not in name or layer not in held:
            return tensor
        if held[layer] is Type.Q8_0:
            return altered.exact_q8(name)
        return altered.values(name).astype(np.float16 if layer == 2 else np.float32), held[layer]

    engine = LocalEngine(altered.write(tmp_path / "m.gguf", change=change), streams=3)
    assert len(engine.plan.slot_sizes()) == 3
    assert apart(engine.run(PROMPTS[:3], 12), ternary_run()) < 0.02


def test_gate_and_up_of_types_that_read_differently_are_held_as_float16(tmp_path: Path) -> None:
    """Experts, a dense layer and shared experts: both read the same activations, and say what they said."""
    odd = ("blk.2.ffn_gate_exps.weight", "blk.0.ffn_gate.weight", "blk.4.ffn_up_shexp.weight")
    engine = LocalEngine(
        altered.write(tmp_path / "m.gguf", change=altered.converted(odd, altered.exact_q8)), streams=3
    )
    held = [matrix.shape.form.name for matrix in engine.plan.experts[2]]
    for role in ("0.ffn_{}", "4.ffn_{}_shexp"):
        shapes = [engine.plan.dense[role.format(name)].shape for name in ("gate", "up", "down")]
        assert [shape.form.name for shape in shapes if shape] == held == ["F16", "F16", "TL1"]
    assert apart(engine.run(PROMPTS[:3], 12), ternary_run()) < 0.02
