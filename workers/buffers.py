"""Which arrays a worker computes a batch in; what `serve` makes and the daemon counts. No numba."""

from __future__ import annotations

import numpy as np

from ..shm.layout import Field
from .kernels.scratch import product_nbytes


def batch(pairs: int, d_model: int, d_ff: int) -> tuple[Field, ...]:
    """Return the arrays for up to `pairs` pairs of a token and an expert."""
    blocks = max(1, d_ff // 32)
    return (
        Field(name="gate", dtype=np.float32, shape=(pairs, d_ff)),
        Field(name="up", dtype=np.float32, shape=(pairs, d_ff)),
        Field(name="q", dtype=np.int8, shape=(pairs, d_ff)),
        Field(name="scales", dtype=np.float32, shape=(pairs, blocks)),
        Field(name="sums", dtype=np.int32, shape=(pairs, blocks)),
        Field(name="identity", dtype=np.int32, shape=(pairs,)),
        Field(name="scratch", dtype=np.uint8, shape=(product_nbytes(max(d_model, d_ff), pairs),)),
        Field(name="out", dtype=np.float32, shape=(pairs, d_model)),
    )


def batch_nbytes(pairs: int, d_model: int, d_ff: int) -> int:
    """Return the bytes of `batch`."""
    return sum(field.nbytes for field in batch(pairs, d_model, d_ff))
