"""TL1_ROW: one scale for a row of weights, and one for a token or one for each of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.workers.kernels.products import ternary

from .... import oracles
from ..packed import F32, I8, POISON, U8, same_bits

BLOCK = ternary.BLOCK


@dataclass(frozen=True)
class Matrix:
    """A packed matrix, its codes right before its scales."""

    arena: U8
    codes_at: int
    rows: int
    columns: int


def packed(codes: U8, scales: F32, at: int = 0) -> Matrix:
    rows, columns = codes.shape
    scales_at = at + ternary.codes_nbytes(rows, columns)
    end = scales_at + ternary.row_scales_nbytes(rows)
    arena = np.full(end + 64, POISON)
    ternary.pack_row(codes, scales, arena, at, scales_at)
    assert (arena[:at] == POISON).all()
    assert (arena[end:] == POISON).all()
    return Matrix(arena, at, rows, columns)


def multiply(matrix: Matrix, q: I8, x_scales: F32, tokens: Sequence[int]) -> F32:
    """Return the products with the tokens of `q` (one scale each, or one for each block of 256)."""
    sums = q.reshape(len(q), x_scales.shape[1], -1).sum(axis=2, dtype=np.int32)
    groups = -(-matrix.rows // 16)
    out = np.full((len(tokens) + 1, groups * 16), np.float32(7.0))
    size = ternary.scratch_nbytes(matrix.columns, len(tokens))
    scratch = np.full(size + 64, POISON)
    scales_at = matrix.codes_at + ternary.codes_nbytes(matrix.rows, matrix.columns)
    ternary.gemm(
        ternary.TL1_ROW, matrix.arena, matrix.codes_at, scales_at, groups, matrix.columns,
        np.zeros((1, 1), np.float32), q, x_scales, sums, np.array(tokens, np.int32), len(tokens),
        scratch[:size], out, 0, groups * 16,
    )  # fmt: skip
    assert (scratch[size:] == POISON).all()
    assert (out[-1] == 7.0).all()
    assert (np.nan_to_num(out[:-1, matrix.rows :]) == 0.0).all()  # not a number for such a token
    return out[:-1, : matrix.rows].copy()


def random(rng: np.random.Generator, rows: int, columns: int, tokens: int) -> tuple[U8, I8]:
    codes = rng.integers(0, 3, (rows, columns), dtype=np.uint8)
    return codes, rng.integers(-128, 128, (tokens, columns), dtype=np.int8)


def exact(codes: U8, q: I8) -> F32:
    sums = q.astype(np.int64) @ (codes.astype(np.int64) - 1).T
    assert np.abs(sums).max() <= 2**24
    return sums.astype(np.float32)


def expected(codes: U8, w_scales: F32, q: I8, x_scales: F32) -> F32:
    """Follow the contract: fma(float(sum), token's scale, total) by spans, then the row's scale."""
    span = codes.shape[1] // x_scales.shape[1]
    ones = np.ones((len(codes), x_scales.shape[1]), np.float32)
    total = oracles.scaled_gemm(codes.astype(np.int64) - 1, ones, q, x_scales, span)
    result: F32 = total * w_scales
    return result


def scales(rng: np.random.Generator, *shape: int) -> F32:
    return np.exp(rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("columns", [256, 768, 2048, 2304])
@pytest.mark.parametrize("rows", [1, 16, 23, 40])
def test_results_follow_the_documented_order(rows: int, columns: int, by_block: bool) -> None:
    rng = np.random.default_rng(rows * columns)
    codes, q = random(rng, rows, columns, 17)
    w_scales, x_scales = scales(rng, rows), scales(rng, 17, columns // BLOCK if by_block else 1)
    found = multiply(packed(codes, w_scales), q, x_scales, range(17))
    assert same_bits(found, expected(codes, w_scales, q, x_scales))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [256, 1280, 32768, 131072])
@pytest.mark.parametrize(("code", "activation"), [(0, -128), (2, -128), (2, 127), (1, 127)])
def test_the_largest_sums_of_a_row_are_exact(count: int, columns: int, code: int, activation: int) -> None:
    codes, q = np.full((17, columns), code, np.uint8), np.full((count, columns), activation, np.int8)
    ones = np.ones((count, 1), np.float32)
    found = multiply(packed(codes, np.ones(17, np.float32)), q, ones, range(count))
    assert same_bits(found, exact(codes, q))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [32768, 131072])
def test_sums_that_grow_and_vanish_again_are_exact(count: int, columns: int) -> None:
    """The first half of the row adds what the second takes away, with the largest offset in between."""
    codes, q = np.full((16, columns), 2, np.uint8), np.full((count, columns), -128, np.int8)
    codes[:, columns // 2 :] = 0
    q[:, ::4] = 127
    ones = np.ones((count, 1), np.float32)
    found = multiply(packed(codes, np.ones(16, np.float32)), q, ones, range(count))
    assert same_bits(found, exact(codes, q))


@pytest.mark.parametrize("count", range(18))
@pytest.mark.parametrize("by_block", [False, True])
def test_every_number_of_tokens_gives_the_bits_of_single_ones(count: int, by_block: bool) -> None:
    rng = np.random.default_rng(count)
    codes, q = random(rng, 48, 1536, 18)
    x_scales = scales(rng, 18, 6 if by_block else 1)
    matrix = packed(codes, scales(rng, 48))
    together = multiply(matrix, q, x_scales, range(count))
    for t in range(count):
        assert same_bits(together[t], multiply(matrix, q, x_scales, [t])[0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tokens=st.lists(st.integers(0, 6), min_size=1, max_size=18), seed=st.integers(0, 2**32 - 1))
def test_a_token_has_the_same_bits_anywhere_in_a_batch(tokens: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, q = random(rng, 18, 768, 7)
    matrix, x_scales = packed(codes, scales(rng, 18)), scales(rng, 7, 1)
    together = multiply(matrix, q, x_scales, tokens)
    for i, token in enumerate(tokens):
        assert same_bits(together[i], multiply(matrix, q, x_scales, [token])[0])


@pytest.mark.parametrize("at", [1, 3, 17, 63, 129])
def test_arena_offsets_need_no_alignment(at: int) -> None:
    rng = np.random.default_rng(at)
    codes, q = random(rng, 20, 512, 9)
    found = multiply(packed(codes, np.ones(20, np.float32), at), q, np.ones((9, 1), np.float32), range(9))
    assert same_bits(found, exact(codes, q))


def test_codes_lie_as_in_tl1() -> None:
    codes, _ = random(np.random.default_rng(3), 23, 512, 1)
    size = ternary.codes_nbytes(23, 512)
    arena = np.zeros(size + ternary.scales_nbytes(23, 512), np.uint8)
    ternary.pack(codes, np.zeros((23, 2), np.uint16), arena, 0, size)
    assert (packed(codes, np.ones(23, np.float32)).arena[:size] == arena[:size]).all()


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 9, 16])
def test_a_nan_poisons_its_token_or_row_and_no_other(count: int) -> None:
    rng = np.random.default_rng(9)
    codes, q = random(rng, 20, 512, count)
    x_scales, w_scales = scales(rng, count, 1), scales(rng, 20)
    x_scales[-1], w_scales[7] = np.nan, np.nan
    bad = np.isnan(multiply(packed(codes, w_scales), q, x_scales, range(count)))
    assert bad[-1].all()
    assert bad[:, 7].all()
    assert not np.delete(bad[:-1], 7, axis=1).any()
