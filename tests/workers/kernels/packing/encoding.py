"""Naive searches for the best scales of a block, and rows to try encoders on. No test in here."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from sterna.workers.checkpoint.held.encode import Encoder
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]


def encoded(name: str, values: F32, weights: F32 | None = None) -> U8:
    """Return the bytes of `values` as `name`, one row of blocks for each row."""
    file_type = TYPES_BY_NAME[name]
    out = np.zeros(file_type.nbytes(values.shape), np.uint8)
    Encoder().encode(values, file_type, out, weights)
    return out.reshape(len(values), -1)


def decoded(name: str, blocks: U8) -> F32:
    """Return the values as the gguf package reads them."""
    return np.asarray(dequantize(blocks, GGMLQuantizationType[name]), np.float32)


def through(name: str, values: F32, weights: F32 | None = None) -> F32:
    """Return `values` after encoding and decoding."""
    return decoded(name, encoded(name, values, weights))


def loss(values: npt.ArrayLike, after: npt.ArrayLike) -> float:
    """Return the relative squared error."""
    wide = np.asarray(values, np.float64)
    return float(((np.asarray(after, np.float64) - wide) ** 2).sum() / (wide**2).sum())


def rows(distribution: str, count: int, columns: int, seed: int = 1) -> F32:
    """Return random rows of about the size of weights: "gaussian", "heavy" tails, or "shifted"."""
    random = np.random.default_rng(seed)
    drawn = {
        "gaussian": lambda: random.standard_normal((count, columns)),
        "heavy": lambda: random.standard_t(3, (count, columns)),
        "shifted": lambda: random.standard_normal((count, columns)) + 2.0,
    }[distribution]()
    return (drawn * 0.02).astype(np.float32)


def best_affine(sub: F64, most: int, steps: int = 400) -> float:
    """Return the least squared error of scale * (0..most) - minimum with minimum >= 0, over a fine grid."""
    low, high = min(float(sub.min()), 0.0), float(sub.max())
    minima = -low * np.linspace(0.4, 1.1, 60)
    scales = (high - low) / most * np.linspace(0.4, 1.3, steps)
    codes = np.clip(np.rint((sub + minima[:, None, None]) / scales[:, None]), 0, most)
    errors = ((codes * scales[:, None] - minima[:, None, None] - sub) ** 2).sum(axis=-1)
    return float(errors.min())


def best_signed(sub: F64, steps: int = 2000) -> float:
    """Return the least squared error of scale * (-4..3), scales of both signs, over a fine grid."""
    scales = np.abs(sub).max() * np.linspace(0.1, 0.5, steps)
    scales = np.concatenate((scales, -scales))[:, None]
    errors = ((np.clip(np.rint(sub / scales), -4, 3) * scales - sub) ** 2).sum(axis=-1)
    return float(errors.min())


def best_ternary(block: F64) -> float:
    """Return the least squared error of scale * (-1, 0, 1): the k largest, for every k."""
    sizes = np.sort(np.abs(block))[::-1]
    gains = np.cumsum(sizes) ** 2 / np.arange(1, len(sizes) + 1)
    return float((block**2).sum() - gains.max())
