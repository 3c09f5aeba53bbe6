"""What the kernel benchmark multiplies: packed matrices, rings of copies, tokens; and how it times a call.

A call goes over several matrices, so that what Python costs per call (some 3 us) does not count.
Not in here: what is measured (`bench_kernels`), clocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ...scheduler.decoder.crew import Crew
from ...shm.errors import OutOfResources
from ...workers.checkpoint.held.formats import ActivationKind, Format, MatrixShape, activation_kind
from ...workers.checkpoint.held.packing import matrix_entry, pack_matrix
from ...workers.checkpoint.held.samples import file_type_of, sample
from ...workers.checkpoint.types.table import TYPES_BY_NAME
from ...workers.kernels.layers import shared_dense
from ...workers.kernels.layers.activations import QuantizedRows
from ...workers.kernels.measure.bandwidth import allocate, available_nbytes
from ...workers.kernels.scratch import product_nbytes

Bytes = npt.NDArray[np.uint8]
Clock = Callable[[], float]

MIN_REPETITIONS = 3
# Multiply-accumulates of one call: about 0.2 ms with the fastest kernel.
_MACS_PER_CALL = 1 << 25
_NO_Q = QuantizedRows.allocate(1, 32, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of a call: the best, the median, and of how many."""

    best_s: float
    median_s: float
    repetitions: int

    def per(self, number: float) -> Timing:
        """Return the times of a `number`-th of what was called."""
        return Timing(
            best_s=self.best_s / number, median_s=self.median_s / number, repetitions=self.repetitions
        )


def _nothing() -> None:
    """Do nothing between two calls."""


def time_call(
    clock: Clock, seconds: float, call: Callable[[], object], between: Callable[[], object] = _nothing
) -> Timing:
    """Call for about `seconds`, at least MIN_REPETITIONS times, after one call that does not count.

    `between` is called after each call and not timed.
    """
    call()
    between()
    end = clock() + seconds
    times: list[float] = []
    while len(times) < MIN_REPETITIONS or clock() < end:
        began = clock()
        call()
        times.append(max(clock() - began, 1e-9))
        between()
    return Timing(best_s=min(times), median_s=statistics.median(times), repetitions=len(times))


@dataclass(frozen=True)
class Matrix:
    """A random matrix of a format, as the file holds it; packed when that is first asked for."""

    form: Format
    rows: int
    columns: int

    @property
    def file_type(self) -> str:
        """Name of the file type that is packed."""
        return file_type_of(self.form)

    @property
    def shape(self) -> MatrixShape:
        """Where its parts lie once packed."""
        return MatrixShape(form=self.form, rows=self.rows, columns=self.columns)

    @property
    def num_weights(self) -> int:
        """Weights without padding."""
        return self.rows * self.columns

    @cached_property
    def raw(self) -> Bytes:
        """The file's bytes."""
        return sample(
            TYPES_BY_NAME[self.file_type], self.rows, self.columns, np.random.default_rng(self.rows)
        )

    @cached_property
    def packed(self) -> Bytes:
        """The packed bytes, on a page of their own."""
        return self.ring(1)

    def pack_into(self, out: Bytes) -> None:
        """Pack the file's bytes to the start of `out`."""
        pack_matrix(self.raw, TYPES_BY_NAME[self.file_type], self.shape, out, 0)

    def ring(self, copies: int) -> Bytes:
        """Return `copies` of the packed matrix one after the other, shape.nbytes apart.

        Raises OutOfResources when they would take more than half of the available memory.
        """
        nbytes = self.shape.nbytes
        if copies * nbytes > available_nbytes() // 2:
            raise OutOfResources(
                f"{copies} matrices of {self.rows}x{self.columns} {self.form.name} need {copies * nbytes} "
                "bytes, more than half of the available memory; ask for a smaller shape"
            )
        arena = allocate(copies * nbytes)
        self.pack_into(arena)
        arena.reshape(copies, nbytes)[1:] = arena[:nbytes]
        return arena


class TokenRows:
    """`count` random activation rows of `columns` values, quantised as `form` reads them."""

    def __init__(self, form: Format, count: int, columns: int) -> None:
        self.count = count
        self.x = np.random.default_rng(count).standard_normal((count, columns)).astype(np.float32)
        reads = activation_kind(form)
        quantised = reads is not ActivationKind.FLOAT
        self.q = QuantizedRows.allocate(count, columns, reads.block(columns)) if quantised else _NO_Q
        self.quantise()

    def quantise(self) -> None:
        """Quantise all rows; nothing for a format that reads floats."""
        if self.q is not _NO_Q:
            self.q.fill(self.x, self.count)


class Product:
    """The product of `heads` matrices, `step` bytes apart in an arena, with tokens; owns its buffers.

    step 0 is the same matrix again and again. Every thread needs one of its own.
    """

    def __init__(self, shape: MatrixShape, arena: Bytes, step: int, heads: int, tokens: TokenRows) -> None:
        self._shape, self._arena, self._step, self._heads = shape, arena, step, heads
        self._tokens = tokens
        self._alone = Crew(1)
        self._product, self._form, _, self._scales_at, _ = matrix_entry(shape, 0)
        self._scratch = np.zeros(product_nbytes(shape.columns, tokens.count), np.uint8)
        self._out = np.zeros((tokens.count, heads * 16 * shape.groups), np.float32)
        self._index = np.tile(np.arange(tokens.count, dtype=np.int32), (heads, 1))

    def __call__(self, at: int = 0) -> None:
        """Multiply the matrices from byte `at` of the arena."""
        shape, tokens, q = self._shape, self._tokens, self._tokens.q
        shared_dense.multiply_heads(
            self._alone.board, self._alone.heads_job, self._product, self._form, self._arena, at,
            at + self._scales_at, self._step, self._step, self._heads, shape.groups, shape.columns, tokens.x,
            q.q, q.scales, q.sums, self._index, tokens.count, self._scratch, self._out,
        )  # fmt: skip


def heads_for(matrix: Matrix, tokens: int) -> int:
    """Return how many matrices one call goes over."""
    return max(1, min(64, _MACS_PER_CALL // (matrix.num_weights * tokens)))
