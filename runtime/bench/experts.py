"""A whole expert for one token against its three matrix products: what the rest of it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ...shm.layout import align
from ...workers.checkpoint.held.packing import matrix_entry
from ...workers.checkpoint.types.table import TYPES_BY_NAME
from ...workers.kernels.layers import ffn
from ...workers.kernels.layers.activations import QuantizedRows
from ...workers.kernels.measure.bandwidth import allocate
from ...workers.kernels.scratch import product_nbytes
from ...workers.pinned import PinnedThreads
from .operands import Clock, Matrix, Product, TokenRows, time_call

MOST_EXPERTS = 8
LARGEST_NBYTES = 64 << 20
_ROUNDS = 3  # products and experts in turns


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRow:
    """One expert (d_model x d_ff), one token, one core, weights cached as far as the cache holds three.

    expert_seconds includes quantising its input and its middle, and SiLU; products_seconds are gate, up
    and down alone. Both are the best of several, over `experts` different ones.
    """

    format: str
    d_model: int
    d_ff: int
    experts: int
    expert_seconds: float
    products_seconds: float
    ratio: float


def measure_experts(
    down: Matrix, clock: Clock, seconds: float, threads: PinnedThreads, cache_nbytes: int
) -> Iterator[ExpertRow]:
    """Measure the expert whose last matrix has the shape of `down`, (d_model, d_ff).

    Yields nothing where the format cannot have it (both sizes must be whole blocks, multiples of 16),
    and where it would be far larger than the cache: that is no expert, but a head.
    """
    d_model, d_ff = down.rows, down.columns
    multiple = max(16, TYPES_BY_NAME[down.file_type].block_elements)
    if d_model % multiple or d_ff % multiple:
        return
    up = Matrix(down.form, d_ff, d_model)
    nbytes = 2 * up.shape.nbytes + down.shape.nbytes
    if nbytes > max(cache_nbytes, LARGEST_NBYTES):
        return
    # A small part of the cache: a virtual machine does not have all of it, and what does not fit is
    # read from memory by whichever of the two comes second.
    count = max(1, min(MOST_EXPERTS, cache_nbytes // 8 // nbytes))
    # All gates and ups, then all downs: so that one call multiplies all matrices of a shape.
    arena = allocate(align(count * nbytes))
    downs_at = 2 * count * up.shape.nbytes
    arena[:downs_at].reshape(2 * count, -1)[:] = up.packed
    arena[downs_at : count * nbytes].reshape(count, -1)[:] = down.packed
    gate_up = Product(up.shape, arena, up.shape.nbytes, 2 * count, TokenRows(up.form, 1, d_model))
    last = Product(down.shape, arena, down.shape.nbytes, count, TokenRows(down.form, 1, d_ff))
    expert = _Experts(up, down, arena, downs_at, count)

    # Two calls from Python each, over the same memory.
    def only_products() -> None:
        gate_up(0)
        last(downs_at)

    def whole() -> None:
        expert.tokens.quantise()
        expert.compute()

    best = {only_products: float("inf"), whole: float("inf")}
    for _ in range(_ROUNDS):
        for call in best:
            (timing,) = threads.run([partial(time_call, clock, seconds / len(best) / _ROUNDS, call)])
            best[call] = min(best[call], timing.best_s / count)
    yield ExpertRow(
        format=down.form.name,
        d_model=d_model,
        d_ff=d_ff,
        experts=count,
        expert_seconds=best[whole],
        products_seconds=best[only_products],
        ratio=best[whole] / best[only_products],
    )


class _Experts:
    """A batch of `count` experts that one token goes to, and the buffers for it."""

    def __init__(
        self, up: Matrix, down: Matrix, arena: npt.NDArray[np.uint8], downs_at: int, count: int
    ) -> None:
        d_model, d_ff = down.rows, down.columns
        self.tokens = TokenRows(up.form, 1, d_model)
        middle = QuantizedRows.allocate(1, d_ff, 32)
        x, q = self.tokens.x, self.tokens.q
        offsets = [
            (2 * i * up.shape.nbytes, (2 * i + 1) * up.shape.nbytes, downs_at + i * down.shape.nbytes)
            for i in range(count)
        ]
        matrices = [
            [matrix_entry(up.shape, gate), matrix_entry(up.shape, up_at), matrix_entry(down.shape, down_at)]
            for gate, up_at, down_at in offsets
        ]
        scratch = np.zeros(product_nbytes(max(d_model, d_ff), 1), np.uint8)
        self.compute = partial(
            ffn.expert_batch, arena, np.array(matrices, np.int64), np.full((count, 3), -1, np.int64),
            np.arange(count + 1, dtype=np.int64), np.zeros(count, np.int32), d_model, d_ff, 0, x,
            q.q, q.scales, q.sums, np.zeros((1, d_ff), np.float32), np.zeros((1, d_ff), np.float32),
            middle.q, middle.scales, middle.sums, np.zeros(1, np.int32), scratch,
            np.zeros((count, d_model), np.float32),
        )  # fmt: skip
