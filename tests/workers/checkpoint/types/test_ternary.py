"""Ternary file types against encoders written from the layouts' text; sizes, ids used twice, refusals."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.file.tilings import find_tiling
from sterna.workers.checkpoint.types.bitnet import Tiling
from sterna.workers.checkpoint.types.table import (
    TENSOR_TYPES,
    TYPES_BY_NAME,
    candidates,
    dequantize,
    ternary_codes,
    ternary_matrix,
)
from sterna.workers.checkpoint.types.ternary import PER_TENSOR, PRIVATE_IDS, TernaryMatrix

from ..file.gguf_bytes import ARR, F32, U32, build, items, key, tensor
from . import ternary_bytes as encoders
from .ternary_bytes import BLOCK_TYPES, F16, U8

TILES = Tiling(64, 96, 32)
ROW_TYPES = {"IQ2_BN": np.float32, "IQ2_BN_R4": np.float32, "IQ1_BN": np.float16}


def random_codes(seed: int, rows: int, columns: int) -> U8:
    return np.random.default_rng(seed).integers(0, 3, (rows, columns), dtype=np.uint8)


def random_scales(seed: int, *shape: int) -> F16:
    """Return float16 scales of all magnitudes, among them subnormal ones."""
    bits = np.random.default_rng(seed).integers(1, 0x7C00, shape, dtype=np.uint16)
    return bits.view(np.float16)


def encode_rows(name: str, codes: U8) -> tuple[U8, np.ndarray]:
    scales = random_scales(7, len(codes)).astype(ROW_TYPES[name])
    if name != "IQ1_BN":
        scales = scales * ROW_TYPES[name](1.0001)  # no float16
    return getattr(encoders, name.lower())(codes, scales), scales


# ---------------------------------------------------------------- exact values


@pytest.mark.parametrize("columns", [256, 768])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_block_types_give_what_was_written(name: str, rows: int, columns: int) -> None:
    encode, block = BLOCK_TYPES[name]
    codes, scales = random_codes(rows, rows, columns), random_scales(columns, rows, columns // block)
    matrix = ternary_matrix(TYPES_BY_NAME[name], encode(codes, scales), (rows, columns))
    assert np.array_equal(matrix.codes, codes)
    assert matrix.group == block
    assert matrix.scales.dtype == np.float16
    assert np.array_equal(matrix.scales.view(np.uint16), scales.view(np.uint16))
    expected = (codes.astype(np.float32) - 1) * np.repeat(scales, block, axis=1).astype(np.float32)
    assert np.array_equal(matrix.values(), expected)
    assert np.array_equal(dequantize(TYPES_BY_NAME[name], encode(codes, scales), (rows, columns)), expected)


@pytest.mark.parametrize("columns", [64, 192, 512])
@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("name", ROW_TYPES)
def test_row_types_give_what_was_written(name: str, rows: int, columns: int) -> None:
    codes = random_codes(columns, rows, columns)
    raw, scales = encode_rows(name, codes)
    matrix = ternary_matrix(TYPES_BY_NAME[name], raw, (rows, columns))
    assert np.array_equal(matrix.codes, codes)
    assert np.array_equal(matrix.scales, scales.astype(np.float32)[:, None])
    assert np.array_equal(matrix.row_scales(), scales.astype(np.float32))
    assert matrix.block_scales() is None
    expected = (codes.astype(np.float32) - 1) * scales.astype(np.float32)[:, None]
    assert np.array_equal(dequantize(TYPES_BY_NAME[name], raw, (rows, columns)), expected)


@pytest.mark.parametrize("shape", [(1, 128), (3, 128), (4, 160), (2, 768)])
def test_i2_s_is_flat_over_the_tensor(shape: tuple[int, int]) -> None:
    codes = random_codes(1, *shape)
    matrix = ternary_matrix(TYPES_BY_NAME["I2_S"], encoders.i2_s(codes, 0.1), shape)
    assert np.array_equal(matrix.codes, codes)
    assert (matrix.group, matrix.scales.shape) == (PER_TENSOR, (1, 1))
    assert np.array_equal(matrix.row_scales(), np.full(shape[0], 0.1, np.float32))
    assert np.array_equal(matrix.values(), (codes.astype(np.float32) - 1) * np.float32(0.1))


@pytest.mark.parametrize("tiles", [(64, 128, 32), (128, 64, 64), (32, 256, 16)])
@pytest.mark.parametrize("shape", [(128, 256), (256, 512)])
def test_tl1_gives_what_was_written(shape: tuple[int, int], tiles: tuple[int, int, int]) -> None:
    codes = random_codes(2, *shape)
    raw = encoders.tl1(codes, -0.3, tiles)
    matrix = ternary_matrix(TYPES_BY_NAME["TL1"], raw, shape, Tiling(*tiles))
    assert np.array_equal(matrix.codes, codes)
    assert matrix.scales.tolist() == [[np.float32(-0.3)]]


@pytest.mark.parametrize("tiles", [(64, 96), (32, 48), (128, 192)])
@pytest.mark.parametrize("columns", [288, 320, 512, 576])  # a rest of 0 to 224 columns in pairs
def test_tl2_gives_what_was_written(columns: int, tiles: tuple[int, int]) -> None:
    codes = random_codes(3, 128, columns)
    raw = encoders.tl2(codes, 0.7, tiles)
    matrix = ternary_matrix(TYPES_BY_NAME["TL2"], raw, (128, columns), Tiling(*tiles, 32))
    assert np.array_equal(matrix.codes, codes)
    assert matrix.scales.tolist() == [[np.float32(0.7)]]


def test_scales_that_differ_within_256_columns_are_not_held_per_block() -> None:
    codes, same = random_codes(4, 3, 512), random_scales(4, 3, 2)
    equal = TernaryMatrix(codes=codes, scales=np.repeat(same, 4, axis=1), group=64)
    found = equal.block_scales()
    assert found is not None
    assert np.array_equal(found.view(np.uint16), same.view(np.uint16))
    differing = equal.scales.copy()
    differing[2, 7] = -differing[2, 7]
    assert TernaryMatrix(codes=codes, scales=differing, group=64).block_scales() is None
    assert equal.row_scales() is None


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["Q2_0", "PQ2_0", "BITNET_T158", "I2_S", "IQ2_BN", "IQ2_BN_R4"])
def test_code_3_is_refused_with_its_place(name: str) -> None:
    codes = random_codes(5, 4, 512)
    codes[2, 453] = 3
    if name in BLOCK_TYPES:
        encode, block = BLOCK_TYPES[name]
        raw = encode(codes, np.ones((4, 512 // block), np.float16))
    else:
        raw = encoders.i2_s(codes, 1.0) if name == "I2_S" else encode_rows(name, codes)[0]
    with pytest.raises(ModelFileError, match=f"{name}, shape .*row 2, column 453: expected a code .*found 3"):
        ternary_matrix(TYPES_BY_NAME[name], raw, (4, 512))


def test_plus_two_is_a_value_of_q2_0_though_not_ternary() -> None:
    codes = np.full((1, 64), 3, np.uint8)
    raw = encoders.q2_0(codes, np.full((1, 1), 0.5, np.float16))
    assert dequantize(TYPES_BY_NAME["Q2_0"], raw, (1, 64)).tolist() == [[1.0] * 64]


@pytest.mark.parametrize(("name", "byte"), [("TL1", 0x49), ("TL2", 0x0E)])
def test_an_index_without_weights_is_refused(name: str, byte: int) -> None:
    shape = (64, 288)
    tiles = TILES if name == "TL2" else Tiling(64, 96, 64)
    raw = np.zeros(TYPES_BY_NAME[name].nbytes(shape), np.uint8)
    raw[3] = byte
    with pytest.raises(ModelFileError, match=f"{name}, shape .*row .*expected a code of 0, 1 or 2"):
        ternary_matrix(TYPES_BY_NAME[name], raw, shape, tiles)


@pytest.mark.parametrize("change", [-1, 1, 32])
@pytest.mark.parametrize("name", ["I2_S", "IQ2_BN", "IQ2_BN_R4", "IQ1_BN", "TL1", "TL2", "PTQ1_0", "PQ2_0"])
def test_a_size_that_does_not_fit_is_refused(name: str, change: int) -> None:
    known = TYPES_BY_NAME[name]
    raw = np.zeros(known.nbytes((64, 384)) + change, np.uint8)
    with pytest.raises(ModelFileError, match=f"type {name}, shape .*: expected {raw.size - change} bytes"):
        ternary_matrix(known, raw, (64, 384), TILES)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("I2_S", (3, 100), "a multiple of 128 elements, found 300"),
        ("IQ2_BN", (3, 100), "a row length divisible by 64, found 100"),
        ("IQ2_BN_R4", (6, 64), "rows in groups of 4, found 6"),
        ("IQ2_BN_R4", (64,), "rows in groups of 4, found 1"),
        ("TL1", (2, 64, 64), "2 dimensions"),
        ("TL2", (64, 192), "at least 256 columns"),
    ],
)
def test_a_shape_that_a_type_cannot_have(name: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ModelFileError, match=said):
        TYPES_BY_NAME[name].nbytes(shape)
    with pytest.raises(ModelFileError, match="one by one"):
        TYPES_BY_NAME[name].row_bytes(64)


def test_what_is_not_ternary() -> None:
    with pytest.raises(ModelFileError, match=r"Q8_0 \(id 8\) is not ternary; supported are .*I2_S.*TQ2_0"):
        ternary_matrix(TYPES_BY_NAME["Q8_0"], np.zeros(34, np.uint8), (1, 32))
    with pytest.raises(
        ModelFileError, match=r"I2_S \(id 36\) is not of blocks with a scale each; supported are .*Q2_0"
    ):
        ternary_codes(TYPES_BY_NAME["I2_S"], np.zeros(64, np.uint8), (1, 128))


# ---------------------------------------------------------------- tiles


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["TL1", "TL2"]),
    st.integers(1, 3),
    st.integers(8, 24),
    st.tuples(*3 * [st.sampled_from([1, 7, 16, 24, 32, 48, 64, 96, 128, 256, 300, 512, 1 << 20])]),
)
def test_any_tiles_are_taken_or_refused(name: str, m: int, k: int, tiles: tuple[int, int, int]) -> None:
    shape = (m * 64, k * 32)
    raw = np.zeros(TYPES_BY_NAME[name].nbytes(shape), np.uint8)
    try:
        matrix = ternary_matrix(TYPES_BY_NAME[name], raw, shape, Tiling(*tiles))
    except ModelFileError as error:
        assert "do not divide" in str(error)  # noqa: PT017 - both outcomes are right
    else:
        assert matrix.codes.shape == shape


def test_tiles_that_are_not_known_are_asked_for() -> None:
    raw = np.zeros(TYPES_BY_NAME["TL1"].nbytes((64, 256)), np.uint8)
    with pytest.raises(ModelFileError, match=r"64 x 256.*sterna\.tl1\.64x256.*kernel_config\.ini"):
        ternary_matrix(TYPES_BY_NAME["TL1"], raw, (64, 256))
    with pytest.raises(ModelFileError, match="tile sizes"):
        dequantize(TYPES_BY_NAME["TL1"], raw, (64, 256))


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return path


CONFIG = """[Kernels_0]
m = 3200
k = 8640
bm = 160
bk = 64
bmm = 32

[Kernels_1]
m = 64
k = 256
bm = 64
bk = 128
bmm = 32
"""


def test_tiles_come_from_a_key_or_from_the_configuration_beside_the_file(tmp_path: Path) -> None:
    ours = key("sterna.tl2.64x512", ARR, items(U32, 3, struct.pack("<3I", 64, 96, 32)))
    path = written(tmp_path, build((ours,)))
    with GgufFile.open(path) as file:
        assert find_tiling(file, "TL2", 64, 512) == Tiling(64, 96, 32)
        assert find_tiling(file, "TL1", 64, 512) is None
        (tmp_path / "kernel_config.ini").write_text(CONFIG)
        assert find_tiling(file, "TL1", 64, 256) == Tiling(64, 128, 32)
        assert find_tiling(file, "TL1", 3200, 8640) == Tiling(160, 64, 32)
        assert find_tiling(file, "TL1", 64, 512) is None


@pytest.mark.parametrize(
    "text",
    [
        "no section",
        "[a]\nm = 64\n",
        "[a]\nm = x\nk = 1\n",
        "[a]\nm=64\nk=256\nbm=0\nbk=1\nbmm=1\n",
        "#" * 70_000,
    ],
)
def test_a_broken_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "kernel_config.ini").write_text(text)
    with (
        GgufFile.open(written(tmp_path, build())) as file,
        pytest.raises(ModelFileError, match=r"kernel_config\.ini: ") as caught,
    ):
        find_tiling(file, "TL1", 64, 256)
    assert "\n" not in str(caught.value)


def test_a_key_with_other_than_three_sizes_is_refused(tmp_path: Path) -> None:
    broken = key("sterna.tl1.64x256", ARR, items(F32, 3, struct.pack("<3f", 1, 2, 3)))
    with (
        GgufFile.open(written(tmp_path, build((broken,)))) as file,
        pytest.raises(ModelFileError, match=r"sterna\.tl1\.64x256.*three positive sizes"),
    ):
        find_tiling(file, "TL1", 64, 256)


# ---------------------------------------------------------------- files


def file_of(tmp_path: Path, tensors: list[tuple[tuple[int, ...], int, bytes]]) -> Path:
    """Write tensors (shape, type id, data) named a, b, ... one after the other."""
    heads, data = [], b""
    for i, (shape, type_id, raw) in enumerate(tensors):
        heads.append(tensor("abcdef"[i], shape[::-1], type_id, len(data)))
        data += raw + b"\0" * (-len(raw) % 32)
    return written(tmp_path, build((), tuple(heads), data))


def filler(name: str, shape: tuple[int, ...]) -> bytes:
    return b"\x55" * TYPES_BY_NAME[name].nbytes(shape)


@pytest.mark.parametrize(
    ("type_id", "name", "other"),
    [(42, "Q2_0", "PQ2_0"), (30, "BF16", "BITNET_T158"), (39, "MXFP4", "TL2")],
)
def test_an_id_given_twice_means_what_its_sizes_say(
    tmp_path: Path, type_id: int, name: str, other: str
) -> None:
    big, small, end = (64, 1024), (1, 256), ((1,), 0, b"\0\0\0\0")
    for meant in (name, other):
        tensors = [(shape, type_id, filler(meant, shape)) for shape in (small, big, small)]
        with GgufFile.open(file_of(tmp_path, [*tensors, end])) as file:
            assert [file.tensors[n].type.name for n in "abc"] == [meant] * 3
            assert file.tensors["b"].nbytes == TYPES_BY_NAME[meant].nbytes(big)
            assert file.tensors["b"].type.id in TENSOR_TYPES
    tensors = [((64, 1024), type_id, filler(meant, big)) for meant in (name, other)]
    with pytest.raises(
        ModelFileError, match=rf"id {type_id}: expected \d+ bytes \({name}\) or \d+ bytes \({other}\)"
    ):
        GgufFile.open(file_of(tmp_path, [*tensors, end]))


def test_a_file_cut_short_is_not_taken_for_another_type(tmp_path: Path) -> None:
    shape = (64, 1024)
    with pytest.raises(ModelFileError, match="cut short"):
        GgufFile.open(file_of(tmp_path, [(shape, 30, filler("BITNET_T158", shape))]))


@pytest.mark.parametrize(("type_id", "name"), [(36, "I2_S"), (38, "TL1")])
def test_an_id_with_a_past_needs_its_exact_size(tmp_path: Path, type_id: int, name: str) -> None:
    shape = (64, 256)
    for after in ([], [((1,), 0, b"\0\0\0\0")]):
        with GgufFile.open(file_of(tmp_path, [(shape, type_id, filler(name, shape)), *after])) as file:
            assert file.tensors["a"].type.name == name
            with pytest.raises(ModelFileError, match="slices that lie apart"):
                file.slab(file.tensors["a"], 0)
        for nbytes in (64 * 256 // 32 * 18, 64 * 256 // 4, 64):  # what ggml had here; without scale; cut
            with pytest.raises(ModelFileError, match=rf"id {type_id}: expected 4128 bytes \({name}\), found"):
                GgufFile.open(file_of(tmp_path, [(shape, type_id, b"\0" * nbytes), *after]))


@pytest.mark.parametrize(
    ("type_id", "name"), [(134, "IQ1_BN"), (135, "IQ2_BN"), (335, "IQ2_BN_R4"), (143, "PTQ1_0")]
)
def test_stacked_matrices_of_row_types_have_slices(tmp_path: Path, type_id: int, name: str) -> None:
    shape = (3, 8, 128)
    with GgufFile.open(file_of(tmp_path, [(shape, type_id, filler(name, shape))])) as file:
        info = file.tensors["a"]
        assert info.type.name == name
        offset, nbytes = file.slab(info, 2)
        assert (offset - info.offset, nbytes) == (2 * nbytes, TYPES_BY_NAME[name].nbytes((8, 128)))


@pytest.mark.parametrize(
    ("shape", "type_id", "said"),
    [
        ((1 << 31, 1 << 31), 36, "id 36"),
        ((1 << 20, 1 << 40), 39, "id 39"),
        ((3, 4), 36, "multiple of 128"),
        ((1 << 30, 64), 335, "file of"),
        ((5, 64), 335, "groups of 4"),
        ((8, 8, 64), 38, "2 dimensions"),
        ((256,), PRIVATE_IDS + 30, "known tensor type"),
    ],
)
def test_hostile_sizes_end_in_one_line(
    tmp_path: Path, shape: tuple[int, ...], type_id: int, said: str
) -> None:
    with pytest.raises(ModelFileError, match=said) as caught:
        GgufFile.open(file_of(tmp_path, [(shape, type_id, b"\0" * 64), ((1,), 0, b"\0" * 4)]))
    assert "m.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_private_ids_are_no_ids_of_files() -> None:
    assert candidates(PRIVATE_IDS + 30) == ()
    assert [known.name for known in candidates(30)] == ["BF16", "BITNET_T158"]
    assert candidates(9999) == ()
