"""What a worker does with a message: compute experts from slots, or read experts into slots.

No sockets here: `process` feeds messages and sends what comes back.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..shm.errors import InternalError, ModelReadError
from ..shm.slots import SlotTable
from .checkpoint.formats import ActivationKind, Format, MatrixShape, activation_kind
from .checkpoint.packing import matrix_entry, pack_matrix
from .checkpoint.types import TENSOR_TYPES
from .kernels.ffn import expert_batch
from .kernels.products import scratch_nbytes
from .kernels.routing import all_below
from .messages import Compute, Configure, ExpertPage, FileSlab, Outputs, Paged, PageIn

MAX_PREAD = 16 * 2**20

_NO_X = np.zeros((1, 1), np.float32)
_NO_Q = np.zeros((1, 1), np.int8)
_NO_SUMS = np.zeros((1, 1), np.int32)


@dataclass(frozen=True, slots=True)
class _Expert:
    """One layer's experts: for each precision gate, up, down with their byte offsets within a slot."""

    d_model: int
    d_ff: int
    precisions: tuple[tuple[tuple[MatrixShape, int], ...], ...]


class _Scratch:
    """Buffers for one batch; grown when a larger one comes, then kept."""

    def __init__(self) -> None:
        self._pairs = -1

    def fit(self, pairs: int, d_model: int, d_ff: int) -> None:
        if pairs <= self._pairs:
            return
        self._pairs = pairs
        self.gate = np.zeros((pairs, d_ff), np.float32)
        self.up = np.zeros((pairs, d_ff), np.float32)
        self.q = np.zeros((pairs, d_ff), np.int8)
        self.scales = np.zeros((pairs, max(1, d_ff // 32)), np.float32)
        self.sums = np.zeros((pairs, max(1, d_ff // 32)), np.int32)
        self.identity = np.arange(pairs, dtype=np.int32)
        self.scratch = np.zeros(scratch_nbytes(max(d_model, d_ff), pairs), np.uint8)
        self.out = np.zeros((pairs, d_model), np.float32)


class ExpertWorker:
    """One worker's work, over the arena that all workers share."""

    def __init__(self, slots: SlotTable, model_fd: int) -> None:
        self._slots = slots
        self._model_fd = model_fd
        self._scratch = _Scratch()
        self._layers: dict[int, _Expert] = {}
        self._places: dict[tuple[int, int, int], list[tuple[int, int, int, int, int]]] = {}

    def configure(self, message: Configure) -> None:
        """Take the shapes of all layers."""
        for layer, shape in message.layers.items():
            precisions = tuple(
                tuple(
                    (MatrixShape(form=Format(form), rows=rows, columns=columns), at)
                    for form, rows, columns, at in matrices
                )
                for matrices in shape.precisions
            )
            self._layers[layer] = _Expert(shape.d_model, shape.d_ff, precisions)

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
        s = self._scratch
        s.fit(pairs, shape.d_model, shape.d_ff)
        expert_batch(
            self._slots.memory, self._matrices(message, shape), starts, rows, shape.d_model, shape.d_ff,
            x, q, scales, sums, s.gate, s.up, s.q, s.scales, s.sums, s.identity, s.scratch, s.out,
        )  # fmt: skip
        busy_ns = time.perf_counter_ns() - begin_ns
        return Outputs(seq=message.seq, busy_ns=busy_ns), s.out[:pairs]

    def page_in(self, message: PageIn) -> Paged:
        """Read an expert into its slot; raises ModelFileError or ModelReadError."""
        begin_ns = time.perf_counter_ns()
        page = message.page
        if not self._slots.holds(page.slot, page.layer, page.expert):
            self._fill(page)
        busy_ns = time.perf_counter_ns() - begin_ns
        nbytes = sum(slab.nbytes for slab in page.slabs)
        return Paged(seq=message.seq, nbytes=nbytes, read_ns=busy_ns, busy_ns=busy_ns)

    def _layer(self, layer: int) -> _Expert:
        if layer not in self._layers:
            raise InternalError(f"layer {layer} was never configured")
        return self._layers[layer]

    def _matrices(self, message: Compute, shape: _Expert) -> npt.NDArray[np.int64]:
        table = np.empty((len(message.experts), 3, 5), np.int64)
        for i, (expert, slot) in enumerate(zip(message.experts, message.slots, strict=True)):
            in_range = 0 <= slot < self._slots.num_slots
            if not in_range or not self._slots.holds(slot, message.layer, expert):
                raise InternalError(f"expert {expert} of layer {message.layer} is not in slot {slot}")
            table[i] = self._places_in(message, slot, shape)
        return table

    def _places_in(self, message: Compute, slot: int, shape: _Expert) -> list[tuple[int, int, int, int, int]]:
        """Return the entries of gate, up, down in a slot; remembered."""
        key = (message.layer, message.precision, slot)
        if key not in self._places:
            base, matrices = self._slots.at(slot), shape.precisions[message.precision]
            self._places[key] = [matrix_entry(matrix, base + at) for matrix, at in matrices]
        return self._places[key]

    def _fill(self, page: ExpertPage) -> None:
        shape = self._layer(page.layer)
        base = self._slots.at(page.slot)
        self._slots.begin(page.slot)
        crc = 0
        for slab, (matrix, at) in zip(page.slabs, shape.precisions[page.precision], strict=True):
            raw = _read(self._model_fd, slab)
            crc = zlib.crc32(raw.data, crc)
            pack_matrix(raw, TENSOR_TYPES[slab.type_id], matrix, self._slots.memory, base + at)
        self._slots.publish(
            page.slot,
            layer=page.layer,
            expert=page.expert,
            precision=page.precision,
            form=shape.precisions[page.precision][0][0].form,
            nbytes=sum(matrix.nbytes for matrix, _ in shape.precisions[page.precision]),
            checksum=crc,
        )


def _check(message: Compute, frames: Sequence[memoryview], shape: _Expert) -> int:
    """Return the number of pairs; raises InternalError unless counts, kind and sizes fit together."""
    starts, kind, tokens = message.starts, message.kind, message.tokens
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
    """Return (x, q, scales, sums) over the frames; those that the kind lacks are empty."""
    tokens = message.tokens
    if message.kind == ActivationKind.FLOAT:
        x = np.frombuffer(frames[0], np.float32).reshape(tokens, d_model)
        return x, _NO_Q, _NO_X, _NO_SUMS
    q = np.frombuffer(frames[0], np.int8).reshape(tokens, d_model)
    blocks = d_model // ActivationKind(message.kind).block(d_model)
    scales = np.frombuffer(frames[1], np.float32).reshape(tokens, blocks)
    sums = np.frombuffer(frames[2], np.int32).reshape(tokens, blocks)
    return _NO_X, q, scales, sums


def _read(fd: int, slab: FileSlab) -> npt.NDArray[np.uint8]:
    """Read a slab whole; raises ModelReadError on a short file or an I/O error."""
    parts: list[bytes] = []
    at, end = slab.offset, slab.offset + slab.nbytes
    while at < end:
        try:
            part = os.pread(fd, min(MAX_PREAD, end - at), at)
        except OSError as error:
            raise ModelReadError(f"{slab.tensor}: reading at byte {at} failed: {error.strerror}") from error
        if not part:
            raise ModelReadError(f"{slab.tensor}: the model file ends at byte {at}, expected {end}")
        parts.append(part)
        at += len(part)
    return np.frombuffer(b"".join(parts), np.uint8)
