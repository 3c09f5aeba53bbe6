"""TL1 matrices against exact integer sums, bit for bit; no speed in here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.workers.kernels.products import ternary

from .... import oracles
from ..packed import F32, I8, U8, Tokens, multiply, pack_ternary, padding_of, same_bits

BLOCK = ternary.BLOCK
COUNTS = [*range(1, 10), 16, 17]  # single tokens, tiles of eight, and both


def random_codes(rng: np.random.Generator, rows: int, columns: int) -> U8:
    return rng.integers(0, 3, (rows, columns), dtype=np.uint8)


def random_activations(rng: np.random.Generator, tokens: int, columns: int) -> I8:
    return rng.integers(-128, 128, (tokens, columns), dtype=np.int8)


def ones(rows: int, columns: int) -> F32:
    return np.ones((rows, columns // BLOCK), np.float32)


def exact(codes: U8, q: I8) -> F32:
    """Return the int64 sums; all of them fit the 24 bits of a float32."""
    sums = oracles.block_sums(codes.astype(np.int64) - 1, q, BLOCK).sum(axis=2)
    assert np.abs(sums).max() < 2**24
    return sums.astype(np.float32)


@pytest.mark.parametrize("rows", [*range(1, 41), 100])
def test_every_row_tail_gives_exact_integers(rows: int) -> None:
    rng = np.random.default_rng(rows)
    codes, q = random_codes(rng, rows, 512), random_activations(rng, 9, 512)
    matrix = pack_ternary(codes, ones(rows, 512))
    tokens = Tokens.exact(q, ones(9, 512), BLOCK)
    assert same_bits(multiply(matrix, tokens, range(9)), exact(codes, q))
    assert (padding_of(matrix, tokens) == 0).all()


@pytest.mark.parametrize("columns", [256, 512, 768, 1536, 4096, 32768])
@pytest.mark.parametrize("code", [0, 1, 2, None])
@pytest.mark.parametrize("activation", [127, -127, -128, None])
def test_worst_inputs_of_every_width_are_exact(
    columns: int, code: int | None, activation: int | None
) -> None:
    rng = np.random.default_rng(columns)
    rows, count = 17, 9  # eight tokens at once and one alone
    codes = random_codes(rng, rows, columns) if code is None else np.full((rows, columns), code, np.uint8)
    q = (
        random_activations(rng, count, columns)
        if activation is None
        else np.full((count, columns), activation, np.int8)
    )
    matrix = pack_ternary(codes, ones(rows, columns))
    found = multiply(matrix, Tokens.exact(q, ones(count, columns), BLOCK), range(count))
    assert same_bits(found, exact(codes, q))


def test_signs_of_weights_and_activations_in_step_give_the_largest_sums() -> None:
    columns = 32768
    codes = np.tile(np.array([0, 2], np.uint8), (3, columns // 2))
    q = np.tile(np.array([-127, 127], np.int8), (9, columns // 2))
    found = multiply(
        pack_ternary(codes, ones(3, columns)), Tokens.exact(q, ones(9, columns), BLOCK), range(9)
    )
    assert (found == 127 * columns).all()


@pytest.mark.parametrize("count", [1, 8])
def test_each_weight_meets_its_own_activation(count: int) -> None:
    """One +1 in a zero matrix, at every column in turn; tokens are each other's, turned by one column."""
    columns = 512
    codes = np.ones((columns, columns), np.uint8)
    np.fill_diagonal(codes, 2)
    q = np.stack([np.roll(np.arange(columns) % 251 - 125, t) for t in range(count)]).astype(np.int8)
    matrix = pack_ternary(codes, ones(columns, columns))
    assert (multiply(matrix, Tokens.exact(q, ones(count, columns), BLOCK), range(count)) == q).all()


@pytest.mark.parametrize("columns", [256, 768, 2048])
def test_scaled_sums_follow_the_documented_order(columns: int) -> None:
    rng = np.random.default_rng(columns + 1)
    rows = 37
    codes, q = random_codes(rng, rows, columns), random_activations(rng, 14, columns)
    w_scales = (rng.standard_normal((rows, columns // BLOCK)) * 0.1).astype(np.float16).astype(np.float32)
    x_scales = np.exp(rng.standard_normal((14, columns // BLOCK))).astype(np.float32)
    found = multiply(pack_ternary(codes, w_scales), Tokens.exact(q, x_scales, BLOCK), range(14))
    expected = oracles.scaled_gemm(codes.astype(np.int64) - 1, w_scales, q, x_scales, BLOCK)
    assert same_bits(found, expected)


@pytest.mark.parametrize("count", [1, 8])
def test_subnormal_and_extreme_scales_keep_their_values(count: int) -> None:
    scales = np.array([[2.0**-24], [2.0**-14], [65504.0], [-1.5], [0.0]], np.float32)
    codes = np.full((5, BLOCK), 2, np.uint8)
    q = np.full((count, BLOCK), 3, np.int8)
    tokens = Tokens.exact(q, ones(count, BLOCK), BLOCK)
    assert (multiply(pack_ternary(codes, scales), tokens, range(count)) == 3 * BLOCK * scales[:, 0]).all()


@pytest.mark.parametrize("at", [1, 3, 17, 63, 64, 129])
def test_arena_offsets_need_no_alignment(at: int) -> None:
    rng = np.random.default_rng(at)
    codes, q = random_codes(rng, 20, 512), random_activations(rng, 9, 512)
    found = multiply(pack_ternary(codes, ones(20, 512), at), Tokens.exact(q, ones(9, 512), BLOCK), range(9))
    assert same_bits(found, exact(codes, q))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(0, 6), min_size=1, max_size=18), seed=st.integers(0, 2**32 - 1))
def test_a_token_has_the_same_bits_alone_and_anywhere_in_a_batch(rows: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = random_codes(rng, 18, 768)
    w_scales = rng.standard_normal((18, 3)).astype(np.float16).astype(np.float32)
    x_scales = np.exp(rng.standard_normal((7, 3))).astype(np.float32)
    tokens = Tokens.exact(random_activations(rng, 7, 768), x_scales, BLOCK)
    matrix = pack_ternary(codes, w_scales)
    together = multiply(matrix, tokens, rows)
    for i, row in enumerate(rows):
        assert same_bits(together[i], multiply(matrix, tokens, [row])[0])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("columns", [256, 768])
def test_every_number_of_tokens_is_computed(count: int, groups: int, columns: int) -> None:
    rng = np.random.default_rng(count)
    rows = groups * 16
    codes, q = random_codes(rng, rows, columns), random_activations(rng, count, columns)
    tokens = Tokens.exact(q, ones(count, columns), BLOCK)
    assert same_bits(
        multiply(pack_ternary(codes, ones(rows, columns)), tokens, range(count)), exact(codes, q)
    )


@pytest.mark.parametrize("count", [8, 16, 17])
@pytest.mark.parametrize("rows", [16, 32, 48])
def test_a_tile_gives_the_bits_of_single_tokens(count: int, rows: int) -> None:
    rng = np.random.default_rng(count)
    w_scales = rng.standard_normal((rows, 2)).astype(np.float16).astype(np.float32)
    x_scales = np.exp(rng.standard_normal((count, 2))).astype(np.float32)
    tokens = Tokens.exact(random_activations(rng, count, 512), x_scales, BLOCK)
    matrix = pack_ternary(random_codes(rng, rows, 512), w_scales)
    together = multiply(matrix, tokens, range(count))
    for t in range(count):
        assert same_bits(together[t], multiply(matrix, tokens, [t])[0])


def test_no_tokens_write_nothing() -> None:
    matrix = pack_ternary(np.full((16, 256), 2, np.uint8), ones(16, 256))
    tokens = Tokens.exact(np.ones((1, 256), np.int8), ones(1, 256), BLOCK)
    assert multiply(matrix, tokens, []).shape == (0, 16)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 16])
def test_a_nan_scale_poisons_its_token_and_no_other(count: int) -> None:
    rng = np.random.default_rng(9)
    x_scales = ones(count, 512)
    x_scales[-1, 1] = np.nan
    tokens = Tokens.exact(random_activations(rng, count, 512), x_scales, BLOCK)
    found = multiply(pack_ternary(random_codes(rng, 16, 512), ones(16, 512)), tokens, range(count))
    assert np.isnan(found[-1]).all()
    assert np.isfinite(found[:-1]).all()


def test_a_nan_weight_scale_poisons_its_row_and_no_other() -> None:
    rng = np.random.default_rng(10)
    w_scales = ones(20, 512)
    w_scales[7, 0] = np.nan
    tokens = Tokens.exact(random_activations(rng, 9, 512), ones(9, 512), BLOCK)
    found = multiply(pack_ternary(random_codes(rng, 20, 512), w_scales), tokens, range(9))
    assert np.isnan(found[:, 7]).all()
    assert np.isfinite(np.delete(found, 7, axis=1)).all()
