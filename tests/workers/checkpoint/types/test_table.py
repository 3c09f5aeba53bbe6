"""Sizes and decoders of tensor types against the gguf package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.types.table import TENSOR_TYPES, TYPES_BY_NAME, dequantize, ternary_codes

WRITTEN = (
    "F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4",
)  # fmt: skip
# The oracle reads these but cannot write them.
READ = (
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "NVFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S",
    "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M",
)  # fmt: skip
DECODED = WRITTEN + READ
SHAPES = ((256,), (3, 512), (2, 5, 256), (2, 2, 3, 256))


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.dtype == np.float32 and np.array_equal(
        ours.view(np.uint32), theirs.astype(np.float32).view(np.uint32)
    )


@pytest.mark.parametrize("known", GGMLQuantizationType)
def test_table_knows_every_type_of_the_oracle(known: GGMLQuantizationType) -> None:
    ours = TENSOR_TYPES[known.value]
    assert ours.name == known.name
    assert TYPES_BY_NAME[ours.name] is ours
    # ggml stores 36 bytes for Q8_1 since 2024; the package still has the old 40.
    expected = (32, 36) if known.name == "Q8_1" else gguf.GGML_QUANT_SIZES[known]
    assert (ours.block_elements, ours.block_bytes) == expected


def test_newer_type_than_the_oracle() -> None:
    assert (TENSOR_TYPES[42].name, TENSOR_TYPES[42].block_elements, TENSOR_TYPES[42].block_bytes) == (
        "Q2_0",
        64,
        18,
    )


def test_the_oracle_reads_nothing_that_we_do_not() -> None:
    readable = {ggml_type.name for ggml_type in gguf.quants._type_traits} | {"F32", "F16"}
    assert readable == set(DECODED)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WRITTEN)
def test_written_by_the_oracle_read_by_us(name: str, shape: tuple[int, ...], tmp_path: object) -> None:
    values = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    values.reshape(-1)[:40] = 0
    ggml_type = GGMLQuantizationType[name]
    raw = gguf.quants.quantize(values, ggml_type)
    path = f"{tmp_path}/m.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_tensor("t", raw, raw_dtype=ggml_type)
    writer.add_tensor("after", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile.open(path) as file:
        info = file.tensors["t"]
        assert (info.shape, info.type.name, info.nbytes) == (shape, name, raw.nbytes)
        ours = dequantize(info.type, file.data(info), info.shape)
        after = dequantize(TYPES_BY_NAME["F32"], file.data(file.tensors["after"]), (3,))
    assert ours.shape == shape
    assert same_bits(ours, gguf.quants.dequantize(raw, ggml_type).reshape(shape))
    assert after.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", DECODED)
def test_any_bytes_decode_as_the_oracle_does(name: str) -> None:
    """All bit patterns, among them code 3, infinite scales and the like; only NaNs may differ."""
    ggml_type, tensor_type = GGMLQuantizationType[name], TYPES_BY_NAME[name]
    raw = np.random.default_rng(11).integers(0, 256, (64, tensor_type.row_bytes(1024)), np.uint8)
    ours = dequantize(tensor_type, raw.reshape(-1), (64, 1024))
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, ggml_type)
    numbers = ~np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), ~numbers)
    assert same_bits(ours[numbers], theirs[numbers])
    assert numbers.sum() > 30_000


def test_chunks_meet_without_a_seam() -> None:
    values = np.random.default_rng(3).standard_normal((3, 1 << 20)).astype(np.float32)
    raw = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
    ours = dequantize(TYPES_BY_NAME["Q8_0"], raw.reshape(-1), values.shape)
    assert same_bits(ours, gguf.quants.dequantize(raw, GGMLQuantizationType.Q8_0))


def test_result_is_a_copy_that_may_be_written() -> None:
    raw = np.arange(8, dtype=np.float32).view(np.uint8)
    raw.flags.writeable = False
    ours = dequantize(TYPES_BY_NAME["F32"], raw, (2, 4))
    ours[:] = 0
    assert raw.view(np.float32).tolist() == list(range(8))


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("shape", [(256,), (4, 768), (3, 2, 512)])
def test_ternary_codes(name: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    trits = rng.integers(0, 3, shape, np.uint8)
    trits.reshape(-1, 256)[:, 0] = 2  # so that every block has its scale
    scales = rng.integers(1, 100, (*shape[:-1], shape[-1] // 256)).astype(np.float32) / 64
    values = (trits.astype(np.float32) - 1) * np.repeat(scales, 256, axis=-1)
    raw = gguf.quants.quantize(values, GGMLQuantizationType[name]).reshape(-1)
    codes, found_scales = ternary_codes(TYPES_BY_NAME[name], raw, shape)
    rows, cols = trits.reshape(-1, shape[-1]).shape
    assert codes.shape == (rows, cols)
    assert found_scales.shape == (rows, cols // 256)
    assert (codes.dtype, found_scales.dtype) == (np.uint8, np.float32)
    assert np.array_equal(codes, trits.reshape(rows, cols))
    assert np.array_equal(found_scales, scales.reshape(rows, -1))


def test_code_3_is_refused_at_its_place() -> None:
    tensor_type = TYPES_BY_NAME["TQ2_0"]
    raw = np.full(4 * 2 * 66, 0b01010101, np.uint8)
    # Row 2, second block, byte 32 + 5 (half 1), bits 4..5 (l = 2): column 256 + 128 + 64 + 5.
    raw[(2 * 2 + 1) * 66 + 37] |= 0b00110000
    with pytest.raises(
        ModelFileError, match=r"TQ2_0, shape .*row 2, column 453: expected a code of 0, 1 or 2, found 3"
    ):
        ternary_codes(tensor_type, raw, (4, 512))


def test_what_cannot_be_decoded() -> None:
    block = np.zeros(292, np.uint8)
    with pytest.raises(
        ModelFileError, match=r"Q8_K \(id 15\) cannot be decoded; supported are BF16, .*F32, .*TQ2_0"
    ):
        dequantize(TYPES_BY_NAME["Q8_K"], block, (256,))
    with pytest.raises(ModelFileError, match=r"Q8_0 \(id 8\) is not ternary; supported are .*TQ1_0, TQ2_0"):
        ternary_codes(TYPES_BY_NAME["Q8_0"], np.zeros(34, np.uint8), (32,))
    with pytest.raises(
        ModelFileError, match=r"type F32, shape \(3,\): expected 12 bytes, found 13 elements of uint8"
    ):
        dequantize(TYPES_BY_NAME["F32"], np.zeros(13, np.uint8), (3,))
    with pytest.raises(ModelFileError, match="expected 12 bytes, found 12 elements of float32"):
        dequantize(TYPES_BY_NAME["F32"], np.zeros(12, np.float32), (3,))  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match="TQ1_0: expected a row length divisible by 256, found 100"):
        TYPES_BY_NAME["TQ1_0"].nbytes((2, 100))
