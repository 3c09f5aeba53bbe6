"""The formats of real files (Q4_0 to Q6_K, IQ4_NL, MXFP4) against the gguf package and float64."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.held.formats import (
    Format,
    MatrixShape,
    activation_kind,
    format_of,
    is_decoded_at_load,
)
from sterna.workers.checkpoint.held.packing import matrix_entry, pack_matrix
from sterna.workers.checkpoint.types.table import TENSOR_TYPES, TYPES_BY_NAME, dequantize
from sterna.workers.kernels.cache import cache_dir
from sterna.workers.kernels.layers import ffn
from sterna.workers.kernels.scratch import product_nbytes
from sterna.workers.kernels.target import TARGETS

from ... import oracles
from ...scheduler import altered_model
from ...scheduler.local_engine import Generated, LocalEngine
from .products.file_blocks import FORMATS, SCALES_AT, Matrix, quantized, random_blocks, ternary_blocks
from .test_targets import missing, run

# A few roundings of float32 in sums of K products.
TOLERANCE = 4e-7


def bound(matrix: Matrix, values: oracles.F64) -> oracles.F64:
    """Return what rounding may cost: relative to the sum of the magnitudes of all products."""
    whole: oracles.F64 = np.abs(values) @ np.abs(matrix.values.astype(np.float64)).T * TOLERANCE
    return whole


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 100])
def test_every_row_tail_agrees_with_float64(name: str, rows: int) -> None:
    matrix = Matrix.random(name, rows, 256, seed=rows)
    tokens = quantized(Format[name], 9, 256, seed=rows)
    error = np.abs(matrix.multiply(tokens, range(9)) - oracles.dequantized_gemm(matrix.values, tokens.values))
    assert (error <= bound(matrix, tokens.values)).all()


@pytest.mark.parametrize(
    ("name", "columns"),
    [(name, columns) for name in FORMATS for columns in (256, 512, 1536, 4096)]
    + [(name, columns) for name in FORMATS[:3] for columns in (32, 96, 160)],
)
def test_every_width_agrees_with_float64(name: str, columns: int) -> None:
    matrix = Matrix.random(name, 37, columns, seed=columns)
    tokens = quantized(Format[name], 11, columns, seed=columns)
    error = np.abs(
        matrix.multiply(tokens, range(11)) - oracles.dequantized_gemm(matrix.values, tokens.values)
    )
    assert (error <= bound(matrix, tokens.values)).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19])
def test_gathered_rows_give_each_token_its_own_result(name: str, count: int) -> None:
    matrix = Matrix.random(name, 20, 512, seed=3)
    tokens = quantized(Format[name], 12, 512, seed=4)
    rows = np.random.default_rng(count).integers(0, 12, count).tolist()
    error = np.abs(
        matrix.multiply(tokens, rows) - oracles.dequantized_gemm(matrix.values, tokens.values[rows])
    )
    assert (error <= bound(matrix, tokens.values[rows])).all()


@pytest.mark.parametrize("name", FORMATS)
def test_worst_codes_and_activations(name: str) -> None:
    """All bits set: the largest codes, scales and minima; activations 127 and -127 only."""
    file_type = TYPES_BY_NAME[name]
    for filling in (0x00, 0x7F, 0x80, 0xFF):
        raw = random_blocks(name, 16, 4096, seed=5).reshape(-1, file_type.block_bytes)
        fixed = raw.copy()
        fixed[:] = filling
        for column in (0,) if name == "MXFP4" else [b for a in SCALES_AT[name] for b in (a, a + 1)]:
            fixed[:, column] = raw[:, column]
        matrix = Matrix.pack(name, fixed.reshape(16, -1), 16, 4096)
        tokens = quantized(Format[name], 9, 4096, seed=6)
        for part in (tokens.q, tokens.sums, tokens.values):  # row 4 is 127 throughout
            part[1] = -part[4]
        tokens.scales[1] = tokens.scales[4]
        assert (tokens.q[1] == -127).all()
        found = matrix.multiply(tokens, range(9))
        error = np.abs(found - oracles.dequantized_gemm(matrix.values, tokens.values))
        assert (error <= bound(matrix, tokens.values)).all(), filling


@pytest.mark.parametrize("name", FORMATS)
def test_each_weight_meets_its_own_activation(name: str) -> None:
    """One activation at a time: the result is that column of the matrix."""
    columns = 256
    matrix = Matrix.random(name, 5, columns, seed=8)
    block = int(activation_kind(Format[name]))
    q = np.zeros((columns, columns), np.int8)
    np.fill_diagonal(q, 1)
    tokens = quantized(Format[name], columns, columns, seed=9)
    ones = np.ones((columns, columns // block), np.float32)
    sums = q.astype(np.int32).reshape(columns, -1, block).sum(axis=2, dtype=np.int32)
    tokens = type(tokens)(q, ones, sums, q.astype(np.float64))
    found = matrix.multiply(tokens, range(columns))
    assert np.allclose(found.T, matrix.values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(0, 11), min_size=1, max_size=19), seed=st.integers(0, 2**32 - 1))
def test_a_token_has_the_same_bits_alone_and_anywhere_in_a_batch(
    name: str, rows: list[int], seed: int
) -> None:
    matrix = Matrix.random(name, 40, 512, seed=seed)
    tokens = quantized(Format[name], 12, 512, seed=seed)
    together = matrix.multiply(tokens, rows)
    for i, row in enumerate(rows):
        assert (together[i].view(np.uint32) == matrix.multiply(tokens, [row])[0].view(np.uint32)).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [4, 8, 12, 21])
@pytest.mark.parametrize("rows", [16, 48])
def test_tiles_give_the_bits_of_single_tokens(name: str, count: int, rows: int) -> None:
    """One tile and several, with tokens beside them; an odd number of groups."""
    matrix = Matrix.random(name, rows, 768, seed=count)
    tokens = quantized(Format[name], count, 768, seed=count)
    together = matrix.multiply(tokens, range(count))
    for t in range(count):
        assert (together[t].view(np.uint32) == matrix.multiply(tokens, [t])[0].view(np.uint32)).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("at", [1, 3, 17, 63])
def test_arena_offsets_need_no_alignment(name: str, at: int) -> None:
    tokens = quantized(Format[name], 9, 256, seed=1)
    aligned = Matrix.random(name, 20, 256, seed=2).multiply(tokens, range(9))
    assert (Matrix.random(name, 20, 256, seed=2, at=at).multiply(tokens, range(9)) == aligned).all()


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "MXFP4"])
def test_a_nan_scale_poisons_its_row_and_no_other(name: str) -> None:
    raw = random_blocks(name, 20, 256, seed=3)
    at = SCALES_AT[name][0]
    raw.reshape(20, -1)[7, at : at + 2] = np.array([np.nan], np.float16).view(np.uint8)
    found = Matrix.pack(name, raw, 20, 256).multiply(quantized(Format[name], 9, 256, seed=1), range(9))
    assert np.isnan(found[:, 7]).all()
    assert np.isfinite(np.delete(found, 7, axis=1)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_nan_activation_scale_poisons_its_token_and_no_other(name: str) -> None:
    tokens = quantized(Format[name], 11, 256, seed=1)
    tokens.scales[4, 0] = np.nan
    found = Matrix.random(name, 20, 256, seed=2).multiply(tokens, range(11))
    assert np.isnan(found[4]).all()
    assert np.isfinite(np.delete(found, 4, axis=0)).all()


def test_smallest_and_largest_powers_of_mxfp4() -> None:
    raw = random_blocks("MXFP4", 16, 32, seed=1)
    raw[:, 0] = [0, 1, 2, 3, 4, 60, 126, 127, 128, 129, 160, 180, 200, 220, 230, 240]
    matrix = Matrix.pack("MXFP4", raw, 16, 32)
    tokens = quantized(Format.MXFP4, 9, 32, seed=1)
    true = oracles.dequantized_gemm(matrix.values, tokens.values)
    with np.errstate(over="ignore"):
        expected = true.astype(np.float32)
    found = matrix.multiply(tokens, range(9))
    # 2^-128 times an activation's scale is subnormal: a few of its 2^-149 are lost.
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-43)


# They compile for half a minute each; test_targets looks at the dot products of all.
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_all_targets_give_the_same_bits(target: str) -> None:
    if reason := missing(target):
        pytest.skip(reason)
    digests = {}
    for each in (target, "generic"):
        done = run([str(Path(__file__).with_name("format_check.py"))], each, cache_dir(each))
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["target"] == each
        digests[each] = report["digests"]
    assert digests[target] == digests["generic"]


@pytest.mark.parametrize(
    ("wide", "down"),
    [("Q4_K", "Q6_K"), ("Q4_0", "Q6_K"), ("Q4_K", "Q4_0"), ("MXFP4", "MXFP4"), ("Q2_K", "Q3_K")],
)
def test_an_expert_of_mixed_formats(wide: str, down: str) -> None:
    d_model, d_ff, count = 256, 512, 9
    parts = [
        Matrix.random(wide, d_ff, d_model, seed=1, size=3e-4),
        Matrix.random(wide, d_ff, d_model, seed=2, size=3e-4),
        Matrix.random(down, d_model, d_ff, seed=3, size=3e-4),
    ]
    table, at = np.zeros((1, 3, 5), np.int64), 0
    for i, part in enumerate(parts):
        table[0, i] = matrix_entry(part.shape, at + part.at)
        at += len(part.arena)
    tokens = quantized(Format[wide], count, d_model, seed=4)
    out = np.zeros((count, d_model), np.float32)
    scratch = np.zeros((2, count, d_ff), np.float32)
    ffn.expert_batch(
        np.concatenate([part.arena for part in parts]), table, np.full((1, 3), -1, np.int64),
        np.array([0, count], np.int64), np.arange(count, dtype=np.int32), d_model, d_ff, 0,
        np.zeros((1, 1), np.float32), tokens.q, tokens.scales, tokens.sums, scratch[0], scratch[1],
        np.zeros((count, d_ff), np.int8), np.zeros((count, d_ff // 32), np.float32),
        np.zeros((count, d_ff // 32), np.int32),
        np.arange(count, dtype=np.int32), np.zeros(product_nbytes(d_ff, count), np.uint8), out,
    )  # fmt: skip
    gate, up, low = (part.values.astype(np.float64) for part in parts)
    middle = oracles.silu(tokens.values @ gate.T) * (tokens.values @ up.T)
    block = int(activation_kind(Format[down]))
    q, scales, _ = oracles.quantize_rows(middle.astype(np.float32), block)
    heard = (q.reshape(count, -1, block) * scales[:, :, None].astype(np.float64)).reshape(count, -1)
    true = heard @ low.T
    # SiLU's last bit may turn a code of the middle.
    assert ((out - true) ** 2).sum() / (true**2).sum() < 1e-5


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1", "IQ4_XS", "IQ3_S", "IQ2_XXS", "IQ1_M", "NVFP4"])
def test_a_type_without_a_kernel_becomes_float16(name: str) -> None:
    file_type = TYPES_BY_NAME[name]
    assert is_decoded_at_load(file_type)
    assert format_of(file_type, 256, "f: t") is Format.F16
    raw = random_blocks(name, 20, 256, seed=1)
    if name == "IQ1_M":  # its float16 is spread over the top nibbles of the last four words: 0x2C00 = 1/16
        words = raw[:, 48:56].view("<u2")
        words &= 0x0FFF
        words |= np.array([0x0000, 0x0000, 0xC000, 0x2000], np.uint16)
    shape = MatrixShape(form=Format.F16, rows=20, columns=256)
    arena = np.zeros(shape.nbytes, np.uint8)
    pack_matrix(np.frombuffer(raw.tobytes(), np.uint8), file_type, shape, arena, 0)
    packed = arena.view(np.float16).reshape(2, 256, 16).transpose(0, 2, 1).reshape(32, 256)
    expected = dequantize(file_type, raw.reshape(-1), (20, 256)).astype(np.float16)
    assert np.isfinite(expected).all()
    assert (packed[:20] == expected).all()
    assert (packed[20:] == 0).all()


def test_weights_beyond_float16_are_refused() -> None:
    raw = random_blocks("Q5_1", 20, 32, seed=1)
    raw[18, :2] = np.array([60000.0], np.float16).view(np.uint8)
    shape = MatrixShape(form=Format.F16, rows=20, columns=32)
    with pytest.raises(ModelFileError, match=r"type Q5_1: rows 16 to 19: a weight beyond 65504"):
        pack_matrix(raw.reshape(-1), TYPES_BY_NAME["Q5_1"], shape, np.zeros(shape.nbytes, np.uint8), 0)


def test_only_types_that_nothing_decodes_are_refused() -> None:
    refused = {t.name for t in TENSOR_TYPES.values() if t.decode is None and t.matrix is None}
    assert refused == {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0"}
    with pytest.raises(ModelFileError, match="f: t: type Q8_K cannot be computed with or decoded"):
        format_of(TYPES_BY_NAME["Q8_K"], 256, "f: t")


Type = GGMLQuantizationType


GOLDEN = Path(__file__).parents[2] / "data" / "tales-golden.json"
PROMPTS = [case["prompt_ids"] for case in json.loads(GOLDEN.read_text())["cases"][:3]]


def stored_as(name: str, tensor: str) -> altered_model.Tensor:
    """Return a ternary tensor of the model as type `name`, exactly where the type can hold trits."""
    values = altered_model.values(tensor)
    if name == "MXFP4":
        return quantize(values, Type.MXFP4), Type.MXFP4
    blocks = ternary_blocks(name, values)
    if name != "IQ4_NL":
        assert (dequantize(TYPES_BY_NAME[name], blocks.reshape(-1), values.shape) == values).all()
    return blocks.reshape(*values.shape[:-1], -1), Type[name]


def as_q8(stored: altered_model.Tensor) -> altered_model.Tensor:
    """Return the same weights as Q8_0, exactly: blocks of 32 with the same scales."""
    raw, file_type = np.asarray(stored[0], np.uint8), stored[1]
    blocks = raw.reshape(-1, TYPES_BY_NAME[file_type.name].block_bytes)
    if file_type == Type.MXFP4:
        scales = np.exp2(blocks[:, :1].astype(np.float32) - 128).astype(np.float16)
    else:
        scales = blocks[:, :2].copy().view(np.float16)
    values = gguf_dequantize(blocks, file_type)
    codes = np.rint(values / scales.astype(np.float32)).astype(np.int8)
    assert (codes.astype(np.float32) * scales.astype(np.float32) == values).all()
    packed = np.concatenate((scales.view(np.uint8), codes.view(np.uint8)), axis=1)
    return packed.reshape(*raw.shape[:-1], -1), Type.Q8_0


@cache
def speaks(name: str, *, through_q8: bool = False) -> list[Generated]:
    """Return what the embedded model says when its ternary tensors are stored as type `name`."""

    def change(tensor: str, stored: altered_model.Tensor) -> altered_model.Tensor:
        if stored[1] != Type.TQ2_0 or name == "TQ2_0":
            return stored
        changed = stored_as(name, tensor)
        return as_q8(changed) if through_q8 else changed

    with tempfile.TemporaryDirectory() as folder:
        engine = LocalEngine(altered_model.write(Path(folder) / "m.gguf", change=change))
        return engine.run(PROMPTS, 16)


def difference(found: list[Generated], true: list[Generated]) -> float:
    """Return the largest difference of a prompt's log-probabilities."""
    ours, theirs = ([p for each in all_ for p in each.prompt_logprobs] for all_ in (found, true))
    assert len(ours) == len(theirs) > 10
    return float(np.abs(np.array(ours) - np.array(theirs)).max())


@pytest.mark.parametrize("name", ["Q3_K", "Q6_K"])
def test_a_model_with_exact_weights_says_the_same_bit_for_bit(name: str) -> None:
    """The same weights, activations and order of sums as TQ2_0: only the way they are stored differs."""
    assert speaks(name) == speaks("TQ2_0")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "MXFP4", "Q5_0"])
def test_a_model_of_32_blocks_says_what_its_weights_say_as_q8_0(name: str) -> None:
    assert speaks(name) == speaks(name, through_q8=True)


def test_a_model_with_minima_says_the_same_up_to_rounding() -> None:
    """Here a weight is code * d - dmin: two roundings of float32 instead of one, which turn some codes."""
    assert difference(speaks("Q4_K"), speaks("TQ2_0")) < 0.05
    assert speaks("Q2_K") == speaks("Q4_K") == speaks("Q5_K")
