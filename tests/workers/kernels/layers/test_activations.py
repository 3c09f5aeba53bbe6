"""Quantised activations: the documented rounding bit for bit, and what is not finite."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.workers.kernels.layers.activations import Q8_BLOCK, TERNARY_BLOCK, QuantizedRows, quantize_rows

from .... import oracles
from ..packed import F32, Tokens, same_bits

BLOCKS = (Q8_BLOCK, TERNARY_BLOCK)


def rows_of_all_sorts(width: int) -> F32:
    """Return normal rows, huge and tiny ones, spikes, ties at .5, zeros and constants."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((12, width)).astype(np.float32)
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3] = 0.0
    x[4, width // 2 :] = 0.0
    x[5] = -1.0
    x[6] = np.arange(width) % 127 + 0.5
    x[6, 0] = 127.0
    x[7] = -0.0
    x[8] = rng.integers(-127, 128, width)
    x[9, 3] = 1e4
    return x


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("width", [256, 768, 2048])
def test_scales_codes_and_sums_are_those_documented(block: int, width: int) -> None:
    x = rows_of_all_sorts(width)
    with np.errstate(over="ignore"):  # 1e30 / 127 is no float16: the scale is infinite, and says so
        q, scales, sums = oracles.quantize_rows(x, block)
    found = Tokens.quantized(x, block)
    assert (found.q == q).all()
    assert (found.sums == sums).all()
    assert same_bits(found.scales, scales)


@pytest.mark.parametrize("block", BLOCKS)
def test_codes_are_never_minus_128_and_the_largest_is_127(block: int) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((500, 256)) * np.exp(rng.standard_normal((500, 1)) * 8)).astype(np.float32)
    q = Tokens.quantized(x, block).q.reshape(500, -1, block).astype(np.int16)
    assert q.min() == -127
    assert (np.abs(q).max(axis=2) == 127).all()


@pytest.mark.parametrize(("block", "bound"), [(Q8_BLOCK, 0.55), (TERNARY_BLOCK, 0.501)])
def test_a_value_comes_back_within_half_a_step(block: int, bound: float) -> None:
    """A float16 scale is off by up to 2^-11, which moves code 127 by 0.06 of a step."""
    x = np.random.default_rng(2).standard_normal((50, 512)).astype(np.float32)
    found = Tokens.quantized(x, block)
    back = found.q.reshape(50, -1, block).astype(np.float64) * found.scales[:, :, None]
    off = np.abs(back - x.reshape(50, -1, block)) / found.scales[:, :, None]
    assert off.max() <= bound


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 15, 16, 255])
def test_what_is_not_finite_makes_its_scale_nan_and_no_other(block: int, bad: float, column: int) -> None:
    x = np.random.default_rng(3).standard_normal((3, 512)).astype(np.float32)
    clean = Tokens.quantized(x, block)
    x[1, column] = bad
    scales = Tokens.quantized(x, block).scales
    assert np.isnan(scales[1, column // block])
    clean.scales[1, column // block] = scales[1, column // block]
    assert same_bits(scales, clean.scales)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_subnormal_block_vanishes_instead_of_growing(block: int) -> None:
    """127 / 1e-40 overflows: the scale must then be 0, for the codes mean nothing."""
    found = Tokens.quantized(np.full((1, 256), 1e-40, np.float32), block)
    assert (found.scales == 0).all()


def test_only_the_rows_asked_for_are_written() -> None:
    rows = QuantizedRows.allocate(4, 256, 32)
    rows.q[:], rows.scales[:], rows.sums[:] = 9, 9.0, 9
    rows.fill(np.ones((4, 256), np.float32), 2)
    assert (rows.q[:2] == 127).all()
    assert (rows.q[2:] == 9).all()
    assert (rows.scales[2:] == 9).all()
    assert (rows.sums[2:] == 9).all()


def test_wider_buffers_take_rows_one_after_the_other() -> None:
    """The middle of an expert is quantised into buffers made for smaller blocks."""
    x = np.random.default_rng(4).standard_normal((3, 512)).astype(np.float32)
    q, scales, sums = np.zeros((3, 512), np.int8), np.zeros((3, 16), np.float32), np.zeros((3, 16), np.int32)
    quantize_rows(x, 0, 3, 512, 256, q, scales, sums)
    expected = Tokens.quantized(x, 256)
    assert same_bits(scales.ravel()[:6], expected.scales.ravel())
    assert (sums.ravel()[:6] == expected.sums.ravel()).all()
