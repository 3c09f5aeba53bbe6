"""exp and SiLU on vectors against float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from sterna.workers.kernels.simd.mathematics import exp_f32, silu_f32
from sterna.workers.kernels.simd.ops import load_f32, store_f32

from .... import oracles

F32 = npt.NDArray[np.float32]


@njit
def _exp_all(x: F32, out: F32) -> None:
    for i in range(0, len(x), 16):
        store_f32(out, 4 * i, exp_f32(load_f32(x, 4 * i)))


@njit
def _silu_all(x: F32, out: F32) -> None:
    for i in range(0, len(x), 16):
        store_f32(out, 4 * i, silu_f32(load_f32(x, 4 * i)))


def exp(values: npt.ArrayLike) -> F32:
    return _through(_exp_all, values)


def silu(values: npt.ArrayLike) -> F32:
    return _through(_silu_all, values)


def _through(kernel: object, values: npt.ArrayLike) -> F32:
    x = np.asarray(values, np.float32)
    padded = np.zeros(-(-len(x) // 16) * 16, np.float32)
    padded[: len(x)] = x
    out = np.empty_like(padded)
    kernel(padded, out)  # type: ignore[operator]
    return out[: len(x)]


def test_exp_is_accurate_over_its_whole_range() -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate((
        np.linspace(-87.0, 88.0, 1_000_001),
        rng.uniform(-1.0, 1.0, 200_000),
        (np.arange(-125, 127) + 0.5) * np.log(2.0),  # where the exponent changes
    )).astype(np.float32)  # fmt: skip
    x = np.clip(x, np.float32(-87.0), np.float32(88.0))
    true = np.exp(x.astype(np.float64))
    assert (np.abs(exp(x) - true) / true).max() < 3e-7


def test_exp_of_special_values() -> None:
    assert exp([0.0, -0.0]).tolist() == [1.0, 1.0]
    edge = exp([-87.0, 88.0])
    assert exp([-88.0, 89.0]).tolist() == edge.tolist()
    assert exp([-np.inf, np.inf]).tolist() == edge.tolist()
    assert np.isnan(exp([np.nan])[0])
    assert np.isfinite(exp([np.nan, 1.0])[1])


def test_silu_is_accurate() -> None:
    x = np.linspace(-80.0, 200.0, 500_001).astype(np.float32)
    true = oracles.silu(x)
    found = silu(x)
    apart = np.abs(found - true)
    assert (apart / np.maximum(np.abs(true), 1e-30)).max() < 1e-6
    assert silu([0.0])[0] == 0.0
    assert (silu([100.0, 1e30]) == np.array([100.0, 1e30], np.float32)).all()
    assert np.abs(silu([-100.0, -1e4])).max() < 1e-30
    assert np.isnan(silu([np.nan])[0])
