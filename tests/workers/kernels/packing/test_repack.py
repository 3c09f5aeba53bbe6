"""Packers of file bytes against the arena layouts in plain numpy, byte for byte; no speed in here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from sterna.workers.kernels.packing import repack

from ...checkpoint.types import ternary_bytes as encoders

U8 = npt.NDArray[np.uint8]
POISON = np.uint8(0xA5)
ROWS = [1, 4, 15, 16, 17, 36]
# Name -> encoder and whether scales are per row (float32) or per block of 256 (float16).
BLOCK_PACKERS: dict[str, Callable[..., U8]] = {
    "tq2_0": encoders.tq2_0,
    "tq1_0": encoders.tq1_0,
    "t158": encoders.t158,
}
ROW_PACKERS: dict[str, Callable[..., U8]] = {
    "i2_s": encoders.i2_s,
    "iq2_bn": encoders.iq2_bn,
    "iq2_bn_r4": encoders.iq2_bn_r4,
}


def interleaved(table: npt.NDArray[Any], together: int, fill: float) -> U8:
    """Return the bytes of (rows, n) as [group][n / together][16 rows][together], padded with `fill`."""
    rows, n = table.shape
    padded = np.full((-(-rows // 16) * 16, n), fill, table.dtype)
    padded[:rows] = table
    order = padded.reshape(-1, 16, n // together, together).transpose(0, 2, 1, 3)
    return np.frombuffer(order.tobytes(), np.uint8)


def two_bit(codes: U8) -> U8:
    """Return the code area: 16 columns of a row in 4 bytes, bits 2s, 2s+1 of byte j for column 4s + j."""
    rows, columns = codes.shape
    fields = codes.reshape(rows, columns // 16, 4, 4).astype(np.uint8)
    packed = sum(fields[:, :, s] << np.uint8(2 * s) for s in range(4))
    return interleaved(np.asarray(packed, np.uint8).reshape(rows, columns // 4), 4, 0x55)


def packed(
    packer: Callable[..., Any], arguments: tuple[object, ...], codes: U8, scales: U8, at: int
) -> object:
    """Run `packer`, require exactly `codes` from byte `at` on and `scales` behind; return its answer."""
    scales_at = at + codes.size + 64
    out = np.full(scales_at + scales.size + 64, POISON)
    expected = out.copy()
    answer = packer(*arguments, out, at, scales_at)
    expected[at : at + codes.size] = codes
    expected[scales_at : scales_at + scales.size] = scales
    wrong = np.flatnonzero(out != expected)
    assert wrong.size == 0, f"byte {wrong[0] - at} of {codes.size} + {scales.size}"
    return answer


def random_codes(seed: int, rows: int, columns: int) -> U8:
    return np.random.default_rng(seed).integers(0, 3, (rows, columns), dtype=np.uint8)


@pytest.mark.parametrize("columns", [256, 768])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", BLOCK_PACKERS)
def test_block_types(name: str, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    codes = random_codes(rows, rows, columns)
    bits = rng.integers(0, 1 << 16, (rows, columns // 256), np.uint16)
    raw = BLOCK_PACKERS[name](codes, bits.view(np.float16))
    scales = interleaved(bits, 1, 0)
    assert packed(getattr(repack, name), (raw, rows, columns), two_bit(codes), scales, 3 * rows) == -1


@pytest.mark.parametrize("columns", [256, 768])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ROW_PACKERS)
def test_row_types(name: str, rows: int, columns: int) -> None:
    rows = rows if name != "iq2_bn_r4" else -(-rows // 4) * 4
    codes = random_codes(rows, rows, columns)
    values = np.random.default_rng(rows).standard_normal(rows).astype(np.float32)
    if name == "i2_s":
        values[:] = values[0]
    raw = ROW_PACKERS[name](codes, values[0] if name == "i2_s" else values)
    scales = interleaved(values[:, None], 1, 0)
    assert packed(getattr(repack, name), (raw, rows, columns), two_bit(codes), scales, 64) == -1


@pytest.mark.parametrize("columns", [256, 1280])
@pytest.mark.parametrize("rows", ROWS)
def test_codes(rows: int, columns: int) -> None:
    codes = random_codes(rows, rows, columns)
    bits = np.random.default_rng(rows).integers(0, 1 << 16, (rows, columns // 256), np.uint16)
    packed(repack.codes, (codes, bits), two_bit(codes), interleaved(bits, 1, 0), 5)


def test_every_byte_of_tq1_0_decodes_as_its_digits() -> None:
    """Also bytes that no encoder writes: digit n is floor(3 * (byte * 3^n mod 256) / 256)."""
    raw = np.random.default_rng(3).integers(0, 256, (80, 54), np.uint8)
    scaled = raw[:, None, :52].astype(np.int64) * 3 ** np.arange(5)[None, :, None] % 256
    digits = (scaled * 3 // 256).astype(np.uint8)  # (rows, n, byte)
    parts = (digits[:, :, :32], digits[:, :, 32:48], digits[:, :4, 48:52])
    codes = np.concatenate([part.reshape(80, -1) for part in parts], axis=1)
    scales = interleaved(np.ascontiguousarray(raw[:, 52:]).view(np.uint16), 1, 0)
    assert packed(repack.tq1_0, (encoders.read_only(raw), 80, 256), two_bit(codes), scales, 0) == -1


@pytest.mark.parametrize(("row", "column"), [(0, 0), (33, 511), (16, 256), (35, 100), (34, 255)])
@pytest.mark.parametrize("name", ["tq2_0", "t158", *ROW_PACKERS])
def test_the_first_code_3_is_found(name: str, row: int, column: int) -> None:
    codes = random_codes(1, 36, 512)
    codes[row, column] = 3
    codes[35, 511] = 3  # and one behind it
    if name in BLOCK_PACKERS:
        raw = BLOCK_PACKERS[name](codes, np.ones((36, 2), np.float16))
    else:
        raw = ROW_PACKERS[name](codes, 1.0 if name == "i2_s" else np.ones(36, np.float32))
    out = np.zeros(48 * 512, np.uint8)
    found = getattr(repack, name)(raw, 36, 512, out, 0, 48 * 512 // 4)
    assert found == row * 2 + column // 256


@pytest.mark.parametrize("columns", [32, 96, 256])
@pytest.mark.parametrize("rows", ROWS)
def test_q8_0(rows: int, columns: int) -> None:
    raw = np.random.default_rng(rows).integers(0, 256, (rows, columns // 32, 34), np.uint8)
    raw[0, 0, 2:6] = [0x80, 0x81, 0x7F, 0]
    weights = np.maximum(raw[:, :, 2:].view(np.int8).astype(np.int16), -127) + 128
    codes = interleaved(weights.astype(np.uint8).reshape(rows, columns), 4, 0x80)
    scales = interleaved(np.ascontiguousarray(raw[:, :, :2]).view(np.uint16)[:, :, 0], 1, 0)
    packed(repack.q8_0, (encoders.read_only(raw), rows, columns), codes, scales, 64)


@pytest.mark.parametrize("columns", [32, 96])
@pytest.mark.parametrize("rows", ROWS)
def test_q5_0_as_the_gguf_package_reads_it(rows: int, columns: int) -> None:
    raw = np.random.default_rng(rows).integers(0, 256, (rows, columns // 32 * 22), np.uint8)
    blocks = raw.reshape(rows, -1, 22)
    scales = interleaved(np.ascontiguousarray(blocks[:, :, :2]).view(np.uint16)[:, :, 0], 1, 0)
    unscaled = raw.copy()
    unscaled.reshape(rows, -1, 22)[:, :, :2] = np.array([1.0], np.float16).view(np.uint8)
    weights = dequantize(unscaled, GGMLQuantizationType.Q5_0)
    codes = interleaved((weights + 128).astype(np.uint8), 4, 0x80)
    packed(repack.q5_0, (encoders.read_only(raw), rows, columns), codes, scales, 64)


@pytest.mark.parametrize("columns", [4, 8, 20, 256])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [2, 4])
def test_floats(width: int, rows: int, columns: int) -> None:
    dtype = np.uint16 if width == 2 else np.uint32
    stored = np.random.default_rng(rows).integers(0, 1 << (8 * width), (rows, columns), dtype)
    expected = interleaved(stored, 1, 0)
    out = np.full(expected.size + 71, POISON)
    repack.floats(encoders.read_only(stored), rows, columns, width, out, 7)
    assert np.array_equal(out[7:-64], expected)
    assert (out[:7] == POISON).all()
    assert (out[-64:] == POISON).all()
