"""B3 matrices: the layout, exact integer sums, the bits of TL1, every target; no speed in here."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.errors import TypingError

from sterna.workers.kernels.cache import cache_dir
from sterna.workers.kernels.products import base3
from sterna.workers.kernels.simd.trits import FLIP
from sterna.workers.kernels.target import TARGETS

from .base3_check import BLOCK, F32, I8, U8, multiply, pack, scaled
from .test_targets import missing, run

SCRIPT = Path(__file__).with_name("base3_check.py")


def random_codes(rng: np.random.Generator, rows: int, columns: int) -> U8:
    return rng.integers(0, 3, (rows, columns), dtype=np.uint8)


def random_activations(rng: np.random.Generator, tokens: int, columns: int) -> I8:
    return rng.integers(-128, 128, (tokens, columns), dtype=np.int8)


def ones(rows: int, columns: int) -> F32:
    return np.ones((rows, columns // BLOCK), np.float32)


def unscaled(codes: U8, q: I8, at: int = 0) -> F32:
    """Return the products of all tokens with scales of 1, (tokens, padded rows)."""
    rows, columns = codes.shape
    packed = pack("base3", codes, ones(rows, columns), at)
    return multiply("base3", packed, rows, q, ones(len(q), columns), [*range(len(q))])


def exact(codes: U8, q: I8) -> F32:
    """Return the int64 products; all of them fit the 24 bits of a float32."""
    sums = q.astype(np.int64) @ (codes.astype(np.int64) - 1).T
    assert np.abs(sums).max() < 2**24
    return sums.astype(np.float32)


def decoded(arena: U8, rows: int, columns: int) -> U8:
    """Return the codes (padded rows, columns) by the words of the module's docstring."""
    groups, blocks = -(-rows // 16), columns // BLOCK
    stored = arena[: groups * blocks * 832].reshape(groups, blocks, 13, 16, 4) ^ np.uint8(FLIP)
    fraction = stored.astype(np.int64)
    codes = np.zeros((groups, 16, blocks, 13, 5, 4), np.uint8)
    for n in range(5):
        codes[:, :, :, :, n] = (3 * fraction // 256).transpose(0, 3, 1, 2, 4)
        fraction = 3 * fraction % 256
    whole = codes.reshape(groups * 16, blocks, 260)
    assert (whole[:, :, 256:] == 0).all()
    return whole[:, :, :256].reshape(groups * 16, columns)


@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (16, 512), (23, 768), (40, 1024)])
def test_the_arena_holds_the_codes_as_documented(rows: int, columns: int) -> None:
    codes = random_codes(np.random.default_rng(rows), rows, columns)
    arena, _, scales_at = pack("base3", codes, ones(rows, columns))
    assert scales_at == -(-rows // 16) * columns // 256 * 832
    found = decoded(arena, rows, columns)
    assert (found[:rows] == codes).all()
    assert (found[rows:] == 1).all()


def test_all_243_bytes_hold_their_five_codes() -> None:
    codes = np.ones((16, 256), np.uint8)
    for i in range(768):  # all bytes of the twelve full packets
        packet, lane, j = i // 64, i % 64 // 4, i % 4
        codes[lane, 20 * packet + j : 20 * packet + 20 : 4] = [i // 3 ** (4 - n) % 3 for n in range(5)]
    arena, _, _ = pack("base3", codes, ones(16, 256))
    assert len(np.unique(arena[:768])) == 243
    assert (decoded(arena, 16, 256) == codes).all()
    spread = np.zeros(4096, np.uint8)
    base3._unpack(arena, 0, spread, 0)
    assert (spread.reshape(64, 16, 4).transpose(1, 0, 2).reshape(16, 256) == codes).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (23, 768), (48, 512)])
def test_repacking_a_two_bit_matrix_gives_the_same_bytes(rows: int, columns: int) -> None:
    rng = np.random.default_rng(columns)
    codes = random_codes(rng, rows, columns)
    w_scales, _ = scaled(rng, rows, columns, 1)
    wanted, _, scales_at = pack("base3", codes, w_scales)
    source, source_at, source_scales_at = pack("ternary", codes, w_scales, 7)
    out = np.full(len(wanted) + 3, np.uint8(0xA5))
    base3.repack(source, source_at, source_scales_at, -(-rows // 16), columns, out, 3, 3 + scales_at)
    assert (out[:3] == 0xA5).all()
    assert (out[3:] == wanted).all()


def test_codes_that_are_not_contiguous_are_refused() -> None:
    codes = np.ones((16, 512), np.uint8)[:, ::2]
    with pytest.raises(TypingError, match="C-contiguous"):
        base3.pack(codes, np.zeros((16, 1), np.uint16), np.zeros(4096, np.uint8), 0, 832)


@pytest.mark.parametrize("rows", [*range(1, 34), 47, 48, 100])
def test_every_row_tail_gives_exact_integers(rows: int) -> None:
    rng = np.random.default_rng(rows)
    codes, q = random_codes(rng, rows, 512), random_activations(rng, 9, 512)
    found = unscaled(codes, q)
    assert (found[:, :rows] == exact(codes, q)).all()
    assert (found[:, rows:] == 0).all()


@pytest.mark.parametrize("columns", [256, 512, 768, 1536, 4096, 32768])
@pytest.mark.parametrize("code", [0, 1, 2, None])
@pytest.mark.parametrize("activation", [127, -127, -128, None])
def test_worst_inputs_of_every_width_are_exact(
    columns: int, code: int | None, activation: int | None
) -> None:
    rng = np.random.default_rng(columns)
    rows, count = 17, 9  # eight tokens at once and one alone
    codes = random_codes(rng, rows, columns) if code is None else np.full((rows, columns), code, np.uint8)
    q = random_activations(rng, count, columns)
    if activation is not None:
        q[:] = activation
    assert (unscaled(codes, q)[:, :rows] == exact(codes, q)).all()


@pytest.mark.parametrize("count", [1, 8])
def test_signs_of_weights_and_activations_in_step_give_the_largest_sums(count: int) -> None:
    columns = 32768
    codes = np.tile(np.array([0, 2], np.uint8), (3, columns // 2))
    q = np.tile(np.array([-127, 127], np.int8), (count, columns // 2))
    assert (unscaled(codes, q)[:, :3] == 127 * columns).all()


@pytest.mark.parametrize("count", [1, 8])
def test_each_weight_meets_its_own_activation(count: int) -> None:
    """One +1 in a zero matrix, at every column in turn; tokens are each other's, turned by one column."""
    columns = 512
    codes = np.ones((columns, columns), np.uint8)
    np.fill_diagonal(codes, 2)
    q = np.stack([np.roll(np.arange(columns) % 251 - 125, t) for t in range(count)]).astype(np.int8)
    assert (unscaled(codes, q) == q).all()


@pytest.mark.parametrize("at", [1, 3, 17, 63, 64, 129])
def test_arena_offsets_need_no_alignment(at: int) -> None:
    rng = np.random.default_rng(at)
    codes, q = random_codes(rng, 20, 512), random_activations(rng, 9, 512)
    assert (unscaled(codes, q, at)[:, :20] == exact(codes, q)).all()


@pytest.mark.parametrize("count", [*range(1, 10), 12, 13, 16, 17, 24])
@pytest.mark.parametrize("rows", [16, 37, 48])
def test_every_number_of_tokens_gives_the_bits_of_two_bit_matrices(count: int, rows: int) -> None:
    rng = np.random.default_rng(count)
    codes, q = random_codes(rng, rows, 768), random_activations(rng, count, 768)
    w_scales, x_scales = scaled(rng, rows, 768, count)
    here, there = (
        multiply(name, pack(name, codes, w_scales), rows, q, x_scales, [*range(count)])
        for name in ("base3", "ternary")
    )
    assert here.tobytes() == there.tobytes()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.lists(st.integers(0, 6), min_size=1, max_size=18), seed=st.integers(0, 2**32 - 1))
def test_a_token_has_the_same_bits_alone_and_anywhere_in_a_batch(tokens: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, q = random_codes(rng, 18, 768), random_activations(rng, 7, 768)
    w_scales, x_scales = scaled(rng, 18, 768, 7)
    packed = pack("base3", codes, w_scales)
    together = multiply("base3", packed, 18, q, x_scales, tokens)
    for i, token in enumerate(tokens):
        alone = multiply("base3", packed, 18, q, x_scales, [token])
        assert together[i].tobytes() == alone[0].tobytes()


def test_no_tokens_write_nothing() -> None:
    codes = np.full((16, 256), 2, np.uint8)
    packed = pack("base3", codes, ones(16, 256))
    assert multiply("base3", packed, 16, np.ones((1, 256), np.int8), ones(1, 256), []).shape == (0, 16)


@pytest.mark.parametrize("count", [1, 5, 9])
def test_a_nan_scale_poisons_its_token_and_no_other(count: int) -> None:
    rng = np.random.default_rng(9)
    x_scales = ones(count, 512)
    x_scales[-1, 1] = np.nan
    packed = pack("base3", random_codes(rng, 16, 512), ones(16, 512))
    found = multiply("base3", packed, 16, random_activations(rng, count, 512), x_scales, [*range(count)])
    assert np.isnan(found[-1]).all()
    assert np.isfinite(found[:-1]).all()


@cache
def report(target: str) -> dict[str, Any]:
    """Return what a process says that was told to use `target`."""
    process = run([str(SCRIPT)], target, cache_dir(target))
    assert process.returncode == 0, f"{target}: status {process.returncode}\n{process.stderr}"
    found: dict[str, Any] = json.loads(process.stdout)
    return found


# Half a minute of compiling for all of them: left to the slow tests.
@pytest.fixture(params=[pytest.param(each, marks=pytest.mark.slow) for each in TARGETS])
def checked(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The report of each target that runs here; the others are skipped with the reason."""
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    return report(request.param)


def test_all_targets_give_the_bits_of_the_generic_one(checked: dict[str, Any]) -> None:
    """Exactness and equality with TL1 are asserted in the other process."""
    assert len(checked["digests"]) == 4
    assert checked["digests"] == report("generic")["digests"]


def test_bytes_are_multiplied_whole_and_tripled_by_additions(checked: dict[str, Any]) -> None:
    if checked["target"] == "generic":
        pytest.skip("plain LLVM: whatever it finds")
    # Five digits, each with two products of whole bytes or one of digits, in registers of 16 to 64 bytes.
    wanted = {"avx512vnni": ("pdpbusd", 20), "avxvnni": ("pdpbusd", 20), "avx2": ("pmaddubsw", 5)}
    instruction, least = wanted.get(checked["target"], ("sdot", 40))
    text = checked["assembly"]["one token"]
    assert len(re.findall(rf"^\s+v?{instruction}\b", text, re.MULTILINE)) >= least
    for name, text in checked["assembly"].items():
        assert not re.search(r"^\s+(v?pmullw|mul\s+v\d)", text, re.MULTILINE), name
