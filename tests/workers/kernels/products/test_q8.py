"""Q8_0 matrices against exact integer sums, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.workers.kernels.products import q8

from .... import oracles
from ..packed import F32, I8, Tokens, multiply, pack_q8, padding_of, same_bits

BLOCK = q8.BLOCK
COUNTS = [*range(1, 10), 12, 16, 17]  # single tokens, tiles of four or eight, and both


def random_bytes(rng: np.random.Generator, rows: int, columns: int) -> I8:
    """Return -127..127: what weights and activations hold."""
    return rng.integers(-127, 128, (rows, columns), dtype=np.int8)


def ones(rows: int, columns: int) -> F32:
    return np.ones((rows, columns // BLOCK), np.float32)


def exact(weights: I8, q: I8) -> F32:
    """Return what fma over the blocks gives with scales of 1; the block sums are exact in any case."""
    return oracles.scaled_gemm(weights.astype(np.int64), ones(*weights.shape), q, ones(*q.shape), BLOCK)


@pytest.mark.parametrize("rows", [*range(1, 41), 100])
def test_every_row_tail_gives_exact_integers(rows: int) -> None:
    rng = np.random.default_rng(rows)
    weights, q = random_bytes(rng, rows, 96), random_bytes(rng, 9, 96)
    matrix = pack_q8(weights, ones(rows, 96))
    tokens = Tokens.exact(q, ones(9, 96), BLOCK)
    sums = weights.astype(np.int64) @ q.astype(np.int64).T
    assert np.abs(sums).max() < 2**24
    assert (multiply(matrix, tokens, range(9)) == sums.T).all()
    assert (padding_of(matrix, tokens) == 0).all()


@pytest.mark.parametrize("columns", [32, 64, 160, 768, 4096])
@pytest.mark.parametrize("weight", [127, -127, None])
@pytest.mark.parametrize("activation", [127, -127, None])
def test_worst_inputs_of_every_width_are_exact(
    columns: int, weight: int | None, activation: int | None
) -> None:
    rng = np.random.default_rng(columns)
    weights = random_bytes(rng, 17, columns) if weight is None else np.full((17, columns), weight, np.int8)
    q = random_bytes(rng, 9, columns) if activation is None else np.full((9, columns), activation, np.int8)
    found = multiply(pack_q8(weights, ones(17, columns)), Tokens.exact(q, ones(9, columns), BLOCK), range(9))
    assert same_bits(found, exact(weights, q))


@pytest.mark.parametrize("count", [1, 8])
def test_the_one_weight_no_encoder_writes_becomes_its_neighbour(count: int) -> None:
    weights = np.full((3, 64), -128, np.int8)
    q = np.full((count, 64), 127, np.int8)
    found = multiply(pack_q8(weights, ones(3, 64)), Tokens.exact(q, ones(count, 64), BLOCK), range(count))
    assert (found == -127 * 127 * 64).all()


def test_a_weight_is_stored_as_unsigned_with_128_added() -> None:
    rng = np.random.default_rng(8)
    weights = random_bytes(rng, 20, 64)
    weights[0, :4] = -128, -127, 127, 0
    matrix = pack_q8(weights, ones(20, 64), 5)
    stored = matrix.arena[5 : 5 + q8.codes_nbytes(20, 64)].reshape(2, 16, 16, 4)  # group, column / 4, row
    padded = np.zeros((32, 64), np.int16)
    padded[:20] = np.maximum(weights, -127)
    expected = (padded + 128).reshape(2, 16, 16, 4).transpose(0, 2, 1, 3)
    assert (stored == expected).all()
    assert stored[0, 0, 0].tolist() == [1, 1, 255, 128]


@pytest.mark.parametrize("count", [1, 8, 16])
def test_each_weight_meets_its_own_activation(count: int) -> None:
    columns = 160
    weights = np.zeros((columns, columns), np.int8)
    np.fill_diagonal(weights, 1)
    q = np.stack([np.roll(np.arange(columns) % 251 - 125, t) for t in range(count)]).astype(np.int8)
    matrix = pack_q8(weights, ones(columns, columns))
    assert (multiply(matrix, Tokens.exact(q, ones(count, columns), BLOCK), range(count)) == q).all()


@pytest.mark.parametrize("columns", [32, 256, 1536])
def test_scaled_sums_follow_the_documented_order(columns: int) -> None:
    rng = np.random.default_rng(columns + 1)
    weights, q = random_bytes(rng, 37, columns), random_bytes(rng, 14, columns)
    w_scales = (rng.standard_normal((37, columns // BLOCK)) * 0.1).astype(np.float16).astype(np.float32)
    x_scales = np.exp(rng.standard_normal((14, columns // BLOCK))).astype(np.float32)
    found = multiply(pack_q8(weights, w_scales), Tokens.exact(q, x_scales, BLOCK), range(14))
    expected = oracles.scaled_gemm(weights.astype(np.int64), w_scales, q, x_scales, BLOCK)
    assert same_bits(found, expected)


@pytest.mark.parametrize("at", [1, 3, 17, 63, 64, 129])
def test_arena_offsets_need_no_alignment(at: int) -> None:
    rng = np.random.default_rng(at)
    weights, q = random_bytes(rng, 20, 96), random_bytes(rng, 9, 96)
    found = multiply(pack_q8(weights, ones(20, 96), at), Tokens.exact(q, ones(9, 96), BLOCK), range(9))
    assert same_bits(found, exact(weights, q))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(0, 6), min_size=1, max_size=18), seed=st.integers(0, 2**32 - 1))
def test_a_token_has_the_same_bits_alone_and_anywhere_in_a_batch(rows: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    w_scales = rng.standard_normal((18, 5)).astype(np.float16).astype(np.float32)
    x_scales = np.exp(rng.standard_normal((7, 5))).astype(np.float32)
    tokens = Tokens.exact(random_bytes(rng, 7, 160), x_scales, BLOCK)
    matrix = pack_q8(random_bytes(rng, 18, 160), w_scales)
    together = multiply(matrix, tokens, rows)
    for i, row in enumerate(rows):
        assert same_bits(together[i], multiply(matrix, tokens, [row])[0])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("columns", [32, 96])
def test_every_number_of_tokens_is_computed(count: int, groups: int, columns: int) -> None:
    rng = np.random.default_rng(count)
    weights, q = random_bytes(rng, groups * 16, columns), random_bytes(rng, count, columns)
    tokens = Tokens.exact(q, ones(count, columns), BLOCK)
    found = multiply(pack_q8(weights, ones(groups * 16, columns)), tokens, range(count))
    assert (found == q.astype(np.int64) @ weights.astype(np.int64).T).all()


@pytest.mark.parametrize("count", [4, 8, 12, 16, 17])
@pytest.mark.parametrize("rows", [16, 32, 48])
def test_a_tile_gives_the_bits_of_single_tokens(count: int, rows: int) -> None:
    rng = np.random.default_rng(count)
    w_scales = rng.standard_normal((rows, 3)).astype(np.float16).astype(np.float32)
    x_scales = np.exp(rng.standard_normal((count, 3))).astype(np.float32)
    tokens = Tokens.exact(random_bytes(rng, count, 96), x_scales, BLOCK)
    matrix = pack_q8(random_bytes(rng, rows, 96), w_scales)
    together = multiply(matrix, tokens, range(count))
    for t in range(count):
        assert same_bits(together[t], multiply(matrix, tokens, [t])[0])


def test_no_tokens_write_nothing() -> None:
    matrix = pack_q8(np.full((16, 32), 2, np.int8), ones(16, 32))
    tokens = Tokens.exact(np.ones((1, 32), np.int8), ones(1, 32), BLOCK)
    assert multiply(matrix, tokens, []).shape == (0, 16)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 16])
def test_a_nan_scale_poisons_its_token_and_no_other(count: int) -> None:
    rng = np.random.default_rng(9)
    x_scales = ones(count, 96)
    x_scales[-1, 1] = np.nan
    tokens = Tokens.exact(random_bytes(rng, count, 96), x_scales, BLOCK)
    found = multiply(pack_q8(random_bytes(rng, 16, 96), ones(16, 96)), tokens, range(count))
    assert np.isnan(found[-1]).all()
    assert np.isfinite(found[:-1]).all()


def test_a_nan_weight_scale_poisons_its_row_and_no_other() -> None:
    rng = np.random.default_rng(10)
    w_scales = ones(20, 96)
    w_scales[7, 0] = np.nan
    tokens = Tokens.exact(random_bytes(rng, 9, 96), ones(9, 96), BLOCK)
    found = multiply(pack_q8(random_bytes(rng, 20, 96), w_scales), tokens, range(9))
    assert np.isnan(found[:, 7]).all()
    assert np.isfinite(np.delete(found, 7, axis=1)).all()
