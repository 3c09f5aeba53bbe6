"""What a worker does with a message: compute experts from slots.

No sockets here: `process` feeds messages and sends what comes back. Reading experts while
others are computed is in `paging`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..shm.errors import InternalError
from ..shm.slots import SlotTable
from .buffers import batch
from .checkpoint.held.formats import ActivationKind, activation_kind
from .checkpoint.held.packing import matrix_entry
from .kernels.layers.ffn import expert_batch
from .kernels.routing.top_k import all_below
from .messages import Compute, Configure, Outputs, Paged, PageIn
from .paging.checksums import Checksums
from .paging.loader import MATRICES, ExpertLoader, ExpertShape, shapes_of
from .paging.reading import ModelFile, Staging

_NO_X = np.zeros((1, 1), np.float32)
_NO_Q = np.zeros((1, 1), np.int8)
_NO_SUMS = np.zeros((1, 1), np.int32)

_PartOffsets = tuple[list[tuple[int, int, int, int, int]], list[int]]
"""Entries of gate, up and down, as `kernels.ffn` names them, and the bytes of their biases, -1: none."""


class _Scratch:
    """Buffers for a batch of at most `pairs` pairs; -1 is none."""

    def __init__(self, pairs: int = -1, d_model: int = 0, d_ff: int = 0) -> None:
        self.pairs = pairs
        count = max(0, pairs)
        made = {f.name: np.zeros(f.shape, f.dtype) for f in batch(count, d_model, d_ff)}
        self.gate, self.up, self.out = made["gate"], made["up"], made["out"]
        self.q, self.scales, self.sums = made["q"], made["scales"], made["sums"]
        self.scratch, self.identity = made["scratch"], made["identity"]
        self.identity[:] = np.arange(count)


class ExpertWorker:
    """One worker's work, over the arena that all workers share."""

    def __init__(
        self, slots: SlotTable, model_fds: Sequence[int], checksums: Checksums | None = None
    ) -> None:
        """Serve from `slots`; experts come from `model_fds` and are compared with `checksums`."""
        self.loader = ExpertLoader(slots, ModelFile(*model_fds), checksums or Checksums())
        self._slots = slots
        self._staging = Staging()
        self._scratch = _Scratch()
        self._offsets: dict[tuple[int, int, int], _PartOffsets] = {}

    def configure(self, message: Configure) -> None:
        """Take the shapes of all layers."""
        self.loader.layers = shapes_of(message)

    def compute(
        self, message: Compute, frames: Sequence[memoryview]
    ) -> tuple[Outputs, npt.NDArray[np.float32]]:
        """Run `message` and return its answer; the array is valid until the next call.

        `frames` are writable (numba has a type of its own for read-only arrays).

        Raises InternalError when an expert is not in its slot or the message contradicts itself: the
        kernels check nothing.
        """
        begin_ns = time.perf_counter_ns()
        shape = self._layer(message.layer)
        pairs = _check(message, frames, shape)
        rows = np.frombuffer(frames[-1], np.int32)
        if not all_below(rows, message.tokens):
            raise InternalError(f"layer {message.layer}: a routing row is not among {message.tokens} tokens")
        starts = np.asarray(message.starts, np.int64)
        x, q, scales, sums = _activations(message, frames[:-1], shape.d_model)
        if pairs > self._scratch.pairs:  # grown when a larger batch comes, then kept
            self._scratch = _Scratch()  # first the smaller ones go
            self._scratch = _Scratch(pairs, shape.d_model, shape.d_ff)
        s = self._scratch
        matrices, biases = self._parts(message, shape)
        expert_batch(
            self._slots.memory, matrices, biases, starts, rows, shape.d_model, shape.d_ff,
            int(shape.activation), x, q, scales, sums, s.gate, s.up, s.q, s.scales, s.sums,
            s.identity, s.scratch, s.out,
        )  # fmt: skip
        busy_ns = time.perf_counter_ns() - begin_ns
        return Outputs(seq=message.seq, busy_ns=busy_ns), s.out[:pairs]

    def page_in(self, message: PageIn) -> Paged:
        """Read an expert into its slot before returning: for who has nothing to compute meanwhile.

        Raises as `ExpertLoader.load`.
        """
        begin_ns = time.perf_counter_ns()
        nbytes, read_ns = self.loader.load(message.page, self._staging)
        busy_ns = time.perf_counter_ns() - begin_ns
        return Paged(seq=message.seq, nbytes=nbytes, read_ns=read_ns, busy_ns=busy_ns)

    def _layer(self, layer: int) -> ExpertShape:
        if layer not in self.loader.layers:
            raise InternalError(f"layer {layer} was never configured")
        return self.loader.layers[layer]

    def _parts(
        self, message: Compute, shape: ExpertShape
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        matrices = np.empty((len(message.experts), MATRICES, 5), np.int64)
        biases = np.empty((len(message.experts), MATRICES), np.int64)
        for i, (expert, slot) in enumerate(zip(message.experts, message.slots, strict=True)):
            in_range = 0 <= slot < self._slots.num_slots
            if not in_range or not self._slots.holds(slot, message.layer, expert):
                raise InternalError(f"expert {expert} of layer {message.layer} is not in slot {slot}")
            matrices[i], biases[i] = self._offsets_in(message, slot, shape)
        return matrices, biases

    def _offsets_in(self, message: Compute, slot: int, shape: ExpertShape) -> _PartOffsets:
        """Return where an expert's parts lie in a slot; remembered."""
        key = (message.layer, message.precision, slot)
        if key not in self._offsets:
            base, parts = self._slots.at(slot), shape.precisions[message.precision]
            self._offsets[key] = (
                [matrix_entry(matrix, base + at) for matrix, at in parts[:MATRICES]],
                [base + at for _, at in parts[MATRICES:]] or [-1] * MATRICES,
            )
        return self._offsets[key]


def _check(message: Compute, frames: Sequence[memoryview], shape: ExpertShape) -> int:
    """Return the number of pairs; raises InternalError unless counts, activations and sizes fit together."""
    starts, kind, tokens = message.starts, message.activation_kind, message.tokens
    where = f"layer {message.layer}"
    if not len(message.experts) == len(message.slots) == len(starts) - 1:
        raise InternalError(
            f"{where}: {len(message.experts)} experts, {len(message.slots)} slots and {len(starts)} starts"
        )
    if starts[0] != 0 or any(a > b for a, b in pairwise(starts)) or tokens < 0:
        raise InternalError(f"{where}: {tokens} tokens, and pairs start at {starts}")
    if not 0 <= message.precision < len(shape.precisions):
        raise InternalError(f"{where}: precision {message.precision}, there are {len(shape.precisions)}")
    expected = activation_kind(shape.precisions[message.precision][0][0].form)
    if kind != expected:
        raise InternalError(f"{where}: activations of kind {kind}, expected {int(expected)}")
    values = tokens * shape.d_model
    blocks = values // expected.block(shape.d_model) if expected else 0
    sizes = [4 * values] if kind == ActivationKind.FLOAT else [values, 4 * blocks, 4 * blocks]
    found = [frame.nbytes for frame in frames]
    if found != [*sizes, 4 * starts[-1]]:
        raise InternalError(f"{where}: arrays of {found} bytes, expected {[*sizes, 4 * starts[-1]]}")
    return starts[-1]


def _activations(
    message: Compute, frames: Sequence[memoryview], d_model: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Return (x, q, scales, sums) over the frames; those that this kind of activations lacks are empty."""
    tokens = message.tokens
    if message.activation_kind == ActivationKind.FLOAT:
        x = np.frombuffer(frames[0], np.float32).reshape(tokens, d_model)
        return x, _NO_Q, _NO_X, _NO_SUMS
    q = np.frombuffer(frames[0], np.int8).reshape(tokens, d_model)
    blocks = d_model // ActivationKind(message.activation_kind).block(d_model)
    scales = np.frombuffer(frames[1], np.float32).reshape(tokens, blocks)
    sums = np.frombuffer(frames[2], np.int32).reshape(tokens, blocks)
    return _NO_X, q, scales, sums
