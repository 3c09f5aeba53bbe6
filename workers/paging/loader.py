"""Bringing one expert from the model file into its slot: read, convert, pack, compare, publish.

Not in here: in which order and by which thread (`paging`). Holds a clock: reads are timed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...shm.errors import InternalError, ModelFileError, ModelReadError
from ...shm.slots import SlotTable
from ..activation import Activation
from ..checkpoint.held.convert import Converter
from ..checkpoint.held.formats import Format, MatrixShape
from ..checkpoint.held.packing import pack_matrix
from ..checkpoint.held.precisions import conversion
from ..checkpoint.types.table import TENSOR_TYPES, Bytes, TensorType
from ..messages import Configure, ExpertPage
from .checksums import Checksums, combined, digest
from .reading import ModelFile, Staging

log = logging.getLogger("sterna.worker")

MATRICES = 3
"""Gate, up and down, the first parts of an expert."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """One layer's experts: for each precision gate, up, down with their byte offsets within a slot.

    The biases of these, if there are any, come behind them: columns of float32.
    """

    d_model: int
    d_ff: int
    precisions: tuple[tuple[tuple[MatrixShape, int], ...], ...]
    activation: Activation

    def __post_init__(self) -> None:
        """Raises InternalError for parts whose sizes do not fit each other: the kernels check nothing."""
        d, f = self.d_model, self.d_ff
        matrices = [(f, d), (f, d), (d, f)]
        biases = [(Format.F32, f, 1), (Format.F32, f, 1), (Format.F32, d, 1)]
        for parts in self.precisions:
            shapes = [shape for shape, _ in parts]
            sizes = [(shape.rows, shape.columns) for shape in shapes[:MATRICES]]
            behind = [(shape.form, shape.rows, shape.columns) for shape in shapes[MATRICES:]]
            if sizes != matrices or behind not in ([], biases):
                raise InternalError(f"experts of {d} and {f} values: parts of {sizes} and biases {behind}")


def shapes_of(message: Configure) -> dict[int, ExpertShape]:
    """Return the shape of each layer's experts.

    Raises InternalError for parts that do not fit each other, and for an activation that there is not.
    """
    shapes = {}
    for layer, shape in message.layers.items():
        precisions = tuple(
            tuple(
                (MatrixShape(form=Format(form), rows=rows, columns=columns), at)
                for form, rows, columns, at in matrices
            )
            for matrices in shape.precisions
        )
        if shape.activation not in tuple(map(int, Activation)):
            raise InternalError(f"layer {layer}: there is no activation {shape.activation}")
        activation = Activation(shape.activation)
        shapes[layer] = ExpertShape(shape.d_model, shape.d_ff, precisions, activation)
    return shapes


@dataclass(frozen=True, slots=True)
class Part:
    """One slab that was read and packed; `error`: what the packer said of it."""

    digest: int
    nbytes: int
    read_ns: int
    error: ModelFileError | None


class _OfThread(threading.local):
    """What each thread that reads has of its own."""

    def __init__(self) -> None:
        self.converter = Converter()


class ExpertLoader:
    """Fills slots from `file`: `begin`, a `part` for each slab, `finish`; or `load`, which is all of them.

    Several threads may do parts, of one expert or more, each with a staging of its own.
    """

    def __init__(self, slots: SlotTable, file: ModelFile, checksums: Checksums) -> None:
        self.file = file
        self.layers: dict[int, ExpertShape] = {}
        self._slots = slots
        self._checksums = checksums
        self._publishing = threading.Lock()
        self._of_thread = _OfThread()

    def load(self, page: ExpertPage, staging: Staging) -> tuple[int, int]:
        """Have `page.slot` hold the expert; return as `finish`, (0, 0) when it does already.

        Raises as `begin`, `part` and `finish`; the slot then counts as empty.
        """
        if not self.begin(page):
            return 0, 0
        return self.finish(page, self._parts(page, staging), staging)

    def begin(self, page: ExpertPage) -> bool:
        """Return whether the expert is to be read; then its slot counts as empty from now on.

        Raises InternalError for a page that contradicts the configuration: the packers check nothing.
        """
        self._check(page)
        slots = self._slots
        held = slots.holds(page.slot, page.layer, page.expert)
        if held and slots.headers[page.slot]["precision"] == page.precision:
            return False
        slots.begin(page.slot)
        return True

    def part(self, page: ExpertPage, index: int, staging: Staging) -> Part:
        """Read slab `index` and pack it into the slot; raises ModelReadError naming tensor and byte."""
        slab = page.slabs[index]
        matrix, at = self._matrices(page)[index]
        begin_ns = time.perf_counter_ns()
        raw = self.file.read(slab, staging)
        read_ns = time.perf_counter_ns() - begin_ns
        error = None
        try:
            self._pack(raw, TENSOR_TYPES[slab.type_id], index, matrix, self._slots.at(page.slot) + at)
        except ModelFileError as refused:  # counts only if the checksum says that these are the file's bytes
            error = ModelFileError(f"{slab.tensor}: expert {page.expert}: {refused}")
        return Part(digest(raw), slab.nbytes, read_ns, error)

    def _pack(self, raw: Bytes, file_type: TensorType, index: int, matrix: MatrixShape, at: int) -> None:
        """Pack part `index` to byte `at` of the arena, converted if the slot holds less than the file."""
        if index >= MATRICES:  # a bias: float32 in the file, or the planner refuses it, and in any precision
            used = at + 4 * matrix.rows
            self._slots.memory[at:used] = raw
            self._slots.memory[used : at + matrix.nbytes] = 0
            return
        target = conversion(file_type, matrix.form)
        if target is not None:
            convert = self._of_thread.converter.convert
            raw, file_type = convert(raw, file_type, matrix.rows, matrix.columns, target), target
        pack_matrix(raw, file_type, matrix, self._slots.memory, at)

    def finish(self, page: ExpertPage, parts: Sequence[Part], staging: Staging) -> tuple[int, int]:
        """Compare checksums and publish the slot; return (bytes read, ns that threads spent on reading).

        What differs from the first read is read again once. Raises ModelReadError if it still does,
        ModelFileError for weights that cannot be packed.
        """
        known = self._checksums.known(page.layer, page.expert)
        found = combined(part.digest for part in parts)
        done = list(parts)
        if known not in (0, found):
            log.warning(
                "expert.reread layer=%d expert=%d checksum=%016x first=%016x",
                page.layer, page.expert, found, known,
            )  # fmt: skip
            parts = self._parts(page, staging)
            found = combined(part.digest for part in parts)
            done += parts
            if found != known:
                raise ModelReadError(
                    f"blk.{page.layer} expert {page.expert}: the file's bytes changed since they were first"
                    f" read (checksum {found:016x}, first {known:016x})"
                )
        for part in parts:
            if part.error is not None:
                raise part.error
        if not known:
            self._checksums.record(page.layer, page.expert, found)
        self._publish(page, found)
        return sum(part.nbytes for part in done), sum(part.read_ns for part in done)

    def _publish(self, page: ExpertPage, found: int) -> None:
        matrices = self._matrices(page)
        # A lock also is the barrier that keeps aarch64 from showing the header before the contents.
        with self._publishing:
            self._slots.publish(
                page.slot,
                layer=page.layer,
                expert=page.expert,
                precision=page.precision,
                form=matrices[0][0].form,
                nbytes=sum(matrix.nbytes for matrix, _ in matrices),
                checksum=found,
            )

    def _parts(self, page: ExpertPage, staging: Staging) -> list[Part]:
        return [self.part(page, index, staging) for index in range(len(page.slabs))]

    def _matrices(self, page: ExpertPage) -> Sequence[tuple[MatrixShape, int]]:
        return self.layers[page.layer].precisions[page.precision]

    def _check(self, page: ExpertPage) -> None:
        where = f"layer {page.layer}"
        if page.layer not in self.layers:
            raise InternalError(f"{where} was never configured")
        num_precisions = len(self.layers[page.layer].precisions)
        if not 0 <= page.precision < num_precisions:
            raise InternalError(f"{where}: precision {page.precision}, there are {num_precisions}")
        if not 0 <= page.slot < self._slots.num_slots:
            raise InternalError(f"{where}: slot {page.slot}, there are {self._slots.num_slots}")
        matrices = self._matrices(page)
        end, room = max(at + matrix.nbytes for matrix, at in matrices), self._slots.nbytes(page.slot)
        if end > room or len(page.slabs) != len(matrices):
            raise InternalError(f"{where}: {len(page.slabs)} slabs, {end} bytes for a slot of {room}")
