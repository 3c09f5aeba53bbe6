"""RMS norm, rotation, the latent store and the row operations against float64."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.workers.kernels.layers.norms import (
    add_rows,
    add_scaled_rows,
    add_vector,
    first_bad_row,
    gate_rows,
    rms_rows,
    rope_halves,
    rope_pairs,
    scale_rows,
    store_latent,
)

from .... import oracles
from ..packed import F32, same_bits


@pytest.mark.parametrize(("width", "step"), [(16, 16), (128, 160), (256, 256), (2048, 2100)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rms_norm(width: int, step: int, size: float) -> None:
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((5, step)) * size).astype(np.float32)
    weight = rng.standard_normal(width).astype(np.float32)
    out = np.full((6, width), np.float32(7.0))
    rms_rows(x, step, weight, np.float32(1e-6), 5, width, out)
    np.testing.assert_allclose(out[:5], oracles.rms_rows(x[:, :width], weight, 1e-6), rtol=4e-7, atol=0)
    assert (out[5] == 7.0).all()


def test_rms_norm_of_zeros_is_zero_and_of_nan_is_nan() -> None:
    x = np.zeros((2, 32), np.float32)
    x[1, 17] = np.nan
    out = np.ones((2, 32), np.float32)
    rms_rows(x, 32, np.ones(32, np.float32), np.float32(1e-6), 2, 32, out)
    assert (out[0] == 0).all()
    assert np.isnan(out[1]).all()


def test_rms_norm_of_a_row_does_not_depend_on_the_others() -> None:
    x = np.random.default_rng(1).standard_normal((7, 256)).astype(np.float32)
    weight = np.ones(256, np.float32)
    together, alone = np.zeros((7, 256), np.float32), np.zeros((1, 256), np.float32)
    rms_rows(x, 256, weight, np.float32(1e-6), 7, 256, together)
    for row in range(7):
        rms_rows(np.ascontiguousarray(x[row : row + 1]), 256, weight, np.float32(1e-6), 1, 256, alone)
        assert same_bits(alone[0], together[row])


def test_heads_are_normed_in_place() -> None:
    """Rows of a head's width, out being x, as query and key norms do it."""
    x = np.random.default_rng(4).standard_normal((3, 4 * 64)).astype(np.float32)
    weight = np.random.default_rng(5).standard_normal(64).astype(np.float32)
    expected = np.zeros((10, 64), np.float32)
    rms_rows(x, 64, weight, np.float32(1e-5), 10, 64, expected)
    before = x.copy()
    rms_rows(x, 64, weight, np.float32(1e-5), 10, 64, x)
    assert same_bits(x.reshape(12, 64)[:10], expected)
    assert same_bits(x.reshape(12, 64)[10:], before.reshape(12, 64)[10:])


def tables(positions: int, half: int, base: float) -> tuple[F32, F32]:
    angle = np.arange(positions)[:, None] * base ** (-np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.mark.parametrize(("heads", "gap"), [(1, 0), (4, 32), (3, 5)])
def test_rotation_turns_neighbouring_pairs_and_nothing_else(heads: int, gap: int) -> None:
    rng = np.random.default_rng(heads)
    rope, count, start = 32, 6, 7
    head_step = rope + gap
    step = heads * head_step + 3
    x = rng.standard_normal(start + count * step).astype(np.float32)
    before = x.copy()
    positions = np.array([0, 1, 2, 511, 100, 1], np.int32)
    rope_pairs(x, start, step, heads, head_step, rope // 2, positions, *tables(512, rope // 2, 1e4), count)
    untouched = np.ones(len(x), bool)
    for t in range(count):
        for h in range(heads):
            at = start + t * step + h * head_step
            untouched[at : at + rope] = False
            expected = oracles.rope_pairs(before[None, None, at : at + rope], positions[t : t + 1], 1e4)
            np.testing.assert_allclose(x[at : at + rope], expected[0, 0], atol=2e-6)
    assert same_bits(x[untouched], before[untouched])
    assert same_bits(x[start : start + rope], before[start : start + rope])  # position 0 stays


@pytest.mark.parametrize(
    ("rope", "heads", "gap"), [(32, 1, 0), (64, 4, 64), (128, 3, 5), (16, 3, 0), (48, 2, 16)]
)
def test_rotation_turns_the_two_halves_and_nothing_else(rope: int, heads: int, gap: int) -> None:
    rng = np.random.default_rng(heads)
    count, start = 6, 7
    head_step = rope + gap
    step = heads * head_step + 3
    x = rng.standard_normal(start + count * step).astype(np.float32)
    before = x.copy()
    positions = np.array([0, 1, 2, 511, 100, 1], np.int32)
    rope_halves(x, start, step, heads, head_step, rope // 2, positions, *tables(512, rope // 2, 1e4), count)
    untouched = np.ones(len(x), bool)
    for t in range(count):
        for h in range(heads):
            at = start + t * step + h * head_step
            untouched[at : at + rope] = False
            expected = oracles.rope_halves(before[None, None, at : at + rope], positions[t : t + 1], 1e4)
            np.testing.assert_allclose(x[at : at + rope], expected[0, 0], atol=2e-6)
    assert same_bits(x[untouched], before[untouched])
    assert same_bits(x[start : start + rope], before[start : start + rope])  # position 0 stays


def test_latents_are_stored_as_float16_in_their_rows() -> None:
    rng = np.random.default_rng(2)
    rank, width, count, step, at = 32, 48, 3, 20, 64
    latent = rng.standard_normal((count, rank)).astype(np.float32)
    rope = rng.standard_normal(5 + count * step).astype(np.float32)
    cache = np.zeros(at + 10 * width * 2, np.uint8)
    store_latent(latent, rope, 5, step, rank, width, np.array([7, 0, 4]), count, cache, at)
    rows = cache[at:].view(np.float16).reshape(10, width)
    for t, row in enumerate((7, 0, 4)):
        assert (rows[row, :rank] == latent[t].astype(np.float16)).all()
        assert (rows[row, rank:] == rope[5 + t * step :][: width - rank].astype(np.float16)).all()
    assert (cache[:at] == 0).all()
    assert (rows[[1, 2, 3, 5, 6, 8, 9]] == 0).all()


def test_rows_are_added() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 4, 48)).astype(np.float32)
    before = x.copy()
    add_rows(x, y, 3, 48)
    assert same_bits(x[:3], before[:3] + y[:3])
    assert same_bits(x[3], before[3])


@pytest.mark.parametrize("width", [16, 40, 7])
def test_vectors_and_factors_are_applied_to_the_first_rows(width: int) -> None:
    rng = np.random.default_rng(width)
    x, y = rng.standard_normal((2, 4, width)).astype(np.float32)
    vector, factor = rng.standard_normal(width).astype(np.float32), np.float32(0.22)
    added, scaled, summed = x.copy(), x.copy(), x.copy()
    add_vector(added, vector, 3, width)
    scale_rows(scaled, factor, 3, width)
    add_scaled_rows(summed, y, factor, 3, width)
    assert same_bits(added[:3], x[:3] + vector)
    assert same_bits(scaled[:3], x[:3] * factor)
    assert same_bits(summed[:3], x[:3] + factor * y[:3])
    for changed in (added, scaled, summed):
        assert same_bits(changed[3], x[3])


@pytest.mark.parametrize("width", [16, 40])
def test_rows_are_gated_by_the_sigmoid_of_their_logit(width: int) -> None:
    """As qwen2moe's shared expert: one logit a row, padded to 16 columns by its product."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((7, width)).astype(np.float32)
    logits = np.full((7, 16), np.nan, np.float32)
    logits[:, 0] = [0.0, 3.0, -3.0, 90.0, -120.0, 0.1, 5.0]
    found = x.copy()
    gate_rows(found, logits, 16, 6, width)
    factors = 1 / (1 + np.exp(-logits[:6, :1].astype(np.float64)))
    np.testing.assert_allclose(found[:6], x[:6] * factors, rtol=4e-7, atol=1e-37)
    assert same_bits(found[6], x[6])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 17, 255])
def test_the_first_bad_row_is_found(bad: float, column: int) -> None:
    x = np.full((5, 256), 3e38, np.float32)
    assert first_bad_row(x, 5, 256) == -1
    x[3, column] = x[4, 0] = bad
    assert first_bad_row(x, 5, 256) == 3
    assert first_bad_row(x, 3, 256) == -1
