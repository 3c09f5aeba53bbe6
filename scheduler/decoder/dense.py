"""Dense weights: filling the arena once, and the linear layers over it.

The arena belongs to the daemon. Its first 64 bytes say whether it is complete, so that a scheduler
that replaces a dead one finds the weights there and loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...shm.errors import ModelFileError
from ...workers.activation import Activation
from ...workers.checkpoint.file.gguf import GgufFile
from ...workers.checkpoint.file.tilings import find_tiling
from ...workers.checkpoint.held.formats import ActivationKind, MatrixShape, activation_kind
from ...workers.checkpoint.held.packing import matrix_entry, pack_matrix
from ...workers.checkpoint.types.bitnet import TILED
from ...workers.checkpoint.types.table import TYPES_BY_NAME, TensorType, dequantize
from ...workers.kernels.layers.activations import QuantizedRows
from ...workers.kernels.layers.shared_dense import multiply_heads, shared_feed_forward
from ..arrays import zeros
from ..model.plan import DENSE_HEADER_NBYTES, Cut, DenseTensor, ModelPlan
from . import buffers
from .crew import Crew

_COMPLETE = 1
_NO_NORM = np.zeros(0, np.float32)


def fill_dense(
    plan: ModelPlan, file: GgufFile, memory: npt.NDArray[np.uint8], progress: Callable[[int, int], None]
) -> None:
    """Copy and pack all dense tensors, unless a predecessor did; reports (done, total) tensors."""
    if memory[0] == _COMPLETE:
        return
    weights = memory[DENSE_HEADER_NBYTES:]
    for done, entry in enumerate(plan.dense.values(), 1):
        raw = file.data(entry.tensor)
        if entry.cut is not None and entry.shape is not None:
            part, file_type = _part(entry, entry.cut, raw)
            pack_matrix(part, file_type, entry.shape, weights, entry.at)
        elif entry.shape is not None:
            file_type, rows, columns = entry.tensor.type, entry.shape.rows, entry.shape.columns
            tiling = find_tiling(file, file_type.name, rows, columns) if file_type.name in TILED else None
            pack_matrix(raw, file_type, entry.shape, weights, entry.at, tiling)
        elif entry.held == "vector":
            values = dequantize(entry.tensor.type, raw, entry.tensor.shape)
            weights[entry.at : entry.at + entry.nbytes] = values.view(np.uint8)
        else:
            weights[entry.at : entry.at + entry.nbytes] = raw
        progress(done, len(plan.dense))
    memory[0] = _COMPLETE


MiddleNorm = tuple[npt.NDArray[np.float32], float]
"""Weights (d_ff,) and epsilon of an RMS norm."""


def _part(
    entry: DenseTensor, cut: Cut, raw: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8], TensorType]:
    """Cut the heads' values out of a joined matrix, or their keys, transposed; return bytes and type."""
    file_type = entry.tensor.type
    if entry.held == "values":
        rows = raw.reshape(cut.heads, cut.nope + cut.v_dim, -1)[:, cut.nope :]
        # Read-only like a file's bytes: numba compiles a function anew for each array type.
        return np.frombuffer(rows.tobytes(), np.uint8), file_type
    values = dequantize(file_type, raw, entry.tensor.shape).reshape(cut.heads, cut.nope + cut.v_dim, cut.rank)
    width = np.float32 if file_type.name == "F32" else np.float16
    with np.errstate(over="ignore"):
        keys = values[:, : cut.nope].swapaxes(1, 2).astype(width)
    if not np.isfinite(keys).all():
        raise ModelFileError(f"{entry.tensor.name}: a weight that is not finite, or beyond float16")
    return np.frombuffer(keys.tobytes(), np.uint8), TYPES_BY_NAME["F32" if width is np.float32 else "F16"]


class Rows:
    """Activation rows (float32) and their int8 forms, each made at most once per filling.

    `x` is (capacity, width). After writing to it call `changed()`. `scratch` is for a product in each of
    `threads` threads.
    """

    def __init__(self, capacity: int, width: int, threads: int = 1) -> None:
        self.x = np.zeros((capacity, width), np.float32)
        self.width = width
        self._quantized: dict[ActivationKind, QuantizedRows] = {}
        self._fresh: set[ActivationKind] = set()
        self._none = QuantizedRows.allocate(1, 1, 1)
        scratch = buffers.product_scratch(threads, width, capacity)
        self.scratch = np.zeros(scratch.shape, np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays made up to now; `buffers.rows` says how many there will be."""
        held: list[npt.NDArray[Any]] = [self.x, self.scratch]
        for q in (self._none, *self._quantized.values()):
            held += [q.q, q.scales, q.sums]
        return sum(array.nbytes for array in held)

    def changed(self) -> None:
        """Say that `x` holds new values."""
        self._fresh.clear()

    def quantized(self, reads: ActivationKind, count: int) -> QuantizedRows:
        """Return the first `count` rows quantised as `reads` says (empty buffers for FLOAT)."""
        if reads is ActivationKind.FLOAT:
            return self._none
        if reads not in self._quantized:
            self._quantized[reads] = QuantizedRows.allocate(len(self.x), self.width, reads.block(self.width))
        rows = self._quantized[reads]
        if reads not in self._fresh:
            rows.fill(self.x, count)
            self._fresh.add(reads)
        return rows


class Linear:
    """A matrix of the dense arena: `apply` computes out[t] = W @ rows[index[t]].

    With `heads` > 1 it holds one matrix per head, lying under each other, and head h reads the row
    t * heads + h. `padded` is the width of an output row: `shape.rows` rounded up to 16.
    """

    def __init__(
        self, weights: npt.NDArray[np.uint8], shape: MatrixShape, at: int, crew: Crew, heads: int = 1
    ) -> None:
        self.weights = weights
        self.shape = shape
        self.reads = activation_kind(shape.form)
        self.entry = matrix_entry(shape, at)
        self.padded = shape.groups * 16
        self._heads = heads
        self._crew = crew
        self._head = MatrixShape(form=shape.form, rows=shape.rows // heads, columns=shape.columns)
        self.sizes = (self._head.codes_nbytes, self._head.scales_nbytes)
        self._extent = (
            heads,
            self._head.groups,
            shape.columns,
        )

    def apply(
        self, rows: Rows, index: npt.NDArray[np.int32], count: int, out: npt.NDArray[np.float32]
    ) -> None:
        """Write `count` rows of `padded` float32 to `out` (contiguous rows of that width).

        `index` is (heads, capacity): which of `rows` head h of token t reads.
        """
        q = rows.quantized(self.reads, count * self._heads)
        product, form, codes_at, scales_at, _ = self.entry
        multiply_heads(
            self._crew.board, self._crew.heads_job, product, form, self.weights, codes_at, scales_at,
            *self.sizes, *self._extent, rows.x, q.q, q.scales, q.sums, index, count, rows.scratch, out,
        )  # fmt: skip


class FeedForwardBuffers:
    """What a feed-forward network of one width needs, without its weights; networks take turns with it."""

    def __init__(self, capacity: int, d_model: int, d_ff: int, block: int, threads: int) -> None:
        made = zeros(buffers.feed_forward(capacity, d_model, d_ff, block, threads))
        self.gate, self.up = made["gate"], made["up"]
        self.scratch = made["scratch"]
        self.middle = QuantizedRows(made["q"], made["scales"], made["sums"], block or d_ff)


class FeedForward:
    """Gate, up and down of a dense layer or of the shared experts: one expert that every token uses.

    Made by `DenseWeights.feed_forward`.
    """

    def __init__(
        self,
        gate: Linear,
        up: Linear,
        down: Linear,
        buffers: FeedForwardBuffers,
        crew: Crew,
        activation: Activation,
        norm: MiddleNorm | None,
    ) -> None:
        self._weights = gate.weights
        self._crew = crew
        self._reads = gate.reads
        self._d_model, self._d_ff = gate.shape.columns, gate.shape.rows
        self._matrices = np.array([gate.entry, up.entry, down.entry], np.int64)
        self._sizes = np.array([gate.sizes, up.sizes, down.sizes], np.int64)
        self._buffers = buffers
        self._activation = int(activation)
        weight, eps = norm or (_NO_NORM, 0.0)
        self._norm, self._eps = weight, np.float32(eps)

    def apply(
        self, rows: Rows, index: npt.NDArray[np.int32], count: int, out: npt.NDArray[np.float32]
    ) -> None:
        """Write down(norm(activation(gate x, up x))) of the first `count` rows to `out` (count, d_model).

        `index` is int32 (1, capacity): 0, 1, 2, ...
        """
        q = rows.quantized(self._reads, count)
        b, m, crew = self._buffers, self._buffers.middle, self._crew
        shared_feed_forward(
            crew.board, crew.heads_job, crew.middle_job, self._weights, self._matrices, self._sizes,
            self._d_model, self._d_ff, self._activation, self._norm, self._eps, rows.x, q.q, q.scales, q.sums,
            index, count, b.gate, b.up, m.q, m.scales, m.sums, b.scratch, out,
        )  # fmt: skip


class Observer(Protocol):
    """Puts something around matrices as they are made, to see what they are multiplied with."""

    def linear(self, key: str, made: Linear) -> Linear:
        """Return what stands for the matrix `key`."""

    def feed_forward(self, keys: tuple[str, str, str], made: FeedForward) -> FeedForward:
        """Return what stands for the network of these matrices: gate, up, down."""


class DenseWeights:
    """Looks tensors of the dense arena up by their key in the plan; `observer` is for measuring only."""

    def __init__(
        self, plan: ModelPlan, memory: npt.NDArray[np.uint8], crew: Crew, observer: Observer | None = None
    ) -> None:
        self._plan = plan
        self.crew = crew
        self._weights = memory[DENSE_HEADER_NBYTES:]
        self._observer = observer
        self._buffers: dict[tuple[int, int, int, int], FeedForwardBuffers] = {}

    def entry(self, key: str) -> DenseTensor:
        """Return the plan's entry of `key`."""
        return self._plan.dense[key]

    def linear(self, key: str, heads: int = 1) -> Linear:
        """Return the matrix `key`, made of one matrix for each of `heads`."""
        entry = self.entry(key)
        if entry.shape is None:
            raise KeyError(f"{key} is not a matrix")
        made = Linear(self._weights, entry.shape, entry.at, self.crew, heads)
        return made if self._observer is None else self._observer.linear(key, made)

    def feed_forward(
        self,
        gate: str,
        up: str,
        down: str,
        capacity: int,
        activation: Activation = Activation.SILU,
        norm: MiddleNorm | None = None,
    ) -> FeedForward:
        """Return the network of three matrices, for `capacity` tokens; networks of a width share buffers.

        norm: (weights, epsilon) of an RMS norm of the middle, before it is quantised for `down`.
        """
        first, last = self.linear(gate), self.linear(down)
        d_ff, d_model = first.shape.rows, first.shape.columns
        key = (capacity, d_model, d_ff, last.reads.block(d_ff))
        if key not in self._buffers:
            self._buffers[key] = FeedForwardBuffers(*key, self.crew.threads)
        made = FeedForward(first, self.linear(up), last, self._buffers[key], self.crew, activation, norm)
        return made if self._observer is None else self._observer.feed_forward((gate, up, down), made)

    def vector(self, key: str) -> npt.NDArray[np.float32]:
        """Return the float32 vector `key`."""
        return self.raw(key).view(np.float32)

    def raw(self, key: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of `key`."""
        entry = self.entry(key)
        return self._weights[entry.at : entry.at + entry.nbytes]

    def has(self, key: str) -> bool:
        """Return whether the model has a tensor `key`."""
        return key in self._plan.dense
