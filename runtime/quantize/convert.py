"""Writing a model file anew with other weight types: tensor by tensor, resumable, read back at the end.

Not in here: which tensor becomes what (`plan.py`), the unfinished file (`journal.py`),
measuring activations (`activations.py`), arguments and printing (`cli/commands/quantize.py`). Imports numba.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from ... import __version__
from ...shm.errors import ModelFileError, ModelReadError, OutOfResources
from ...workers.checkpoint.file.gguf import GgufFile, TensorInfo
from ...workers.checkpoint.file.tilings import find_tiling
from ...workers.checkpoint.file.writer import GgufLayout, lay_out, string_value, uint32_value
from ...workers.checkpoint.held.precisions import is_ternary
from ...workers.checkpoint.held.recode import Loss, Recoder, chunks_of
from ...workers.checkpoint.types.bitnet import TILED
from ...workers.checkpoint.types.table import TYPES_BY_NAME, Bytes, Floats, TensorType, ternary_matrix
from .journal import Done, PartFile, check_output, identify
from .plan import FILE_TYPES, QUANTIZATION_VERSION, Choice, Wanted, choose, is_quantized
from .report import Group, groups

Progress = Callable[[str, int, int], None]

_PIECE_ELEMENTS: Final = 1 << 22  # of a tensor at a time, which bounds the memory to some 40 MiB
_COPY_BYTES: Final = 16 << 20
_MEASURED_CHUNKS: Final = 64  # of a tensor: enough for three digits of its error

_Rows = Callable[[int, int], Bytes]  # first row, number of rows -> their bytes, read-only
Weights = Mapping[str, Floats]
"""Tensor name -> how much its columns matter: float32 (columns,) or (experts, columns), above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did; bytes are of tensors. resumed: tensors that an earlier run had written."""

    path: Path
    nbytes: int
    seconds: float
    resumed: int
    recoded_nbytes: int
    groups: tuple[Group, ...]


def quantize(
    file: GgufFile,
    out: Path,
    wanted: Wanted,
    *,
    weights: Callable[[], Weights] = dict,
    calibration: str = "",
    threads: int = 1,
    force: bool = False,
    restart: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Conversion:
    """Write `file` to `out` as `wanted`; what is under way lies in `out`.part and can be gone on with.

    weights: returns what `activation_means` finds, asked for when nothing else is in the way;
    calibration: what it finds it with, which a resumed run must repeat. force: replace what is at `out`;
    restart: begin anew. `progress(what, done, total)` in bytes.

    Raises UsageError, AlreadyRunning, NotPermitted, OutOfResources for files that are in the way or have no
    room; ModelFileError for what is in `file`; ModelReadError if it cannot be read, or if what is read back
    is not what was written.
    """
    check_output(file.paths, out, force=force)
    choices = choose(file, wanted)
    keys = _keys(file, wanted, choices)
    layout = lay_out(
        keys, ((choice.info.name, choice.info.shape, choice.target) for choice in choices), file.alignment
    )
    with PartFile(out, _identity(file, wanted, calibration), restart=restart) as part:
        _check_room(part, layout)
        resumed = set(part.done)
        conversion = _ConversionRun(file, part, wanted, weights(), threads, progress)
        began = time.monotonic()
        conversion.run(choices, layout)
        part.sync(layout.nbytes)
        _read_back(part, keys, layout, progress)
        part.finish()
    fresh = [choice for choice in choices if choice.info.name not in resumed]
    return Conversion(
        path=out,
        nbytes=layout.nbytes,
        seconds=time.monotonic() - began,
        resumed=len(resumed),
        recoded_nbytes=sum(choice.info.nbytes for choice in fresh if not choice.kept),
        groups=groups(choices, part.done),
    )


def _check_room(part: PartFile, layout: GgufLayout) -> None:
    taken = part.path.stat().st_blocks * 512
    free = shutil.disk_usage(part.path.parent).free
    if layout.nbytes - taken > free:
        missing = (layout.nbytes - taken - free) / 1e6
        raise OutOfResources(
            f"{part.path}: the file takes {layout.nbytes / 1e6:.0f} MB; {missing:.0f} MB more room is needed"
        )


def _keys(file: GgufFile, wanted: Wanted, choices: Sequence[Choice]) -> list[tuple[str, bytes]]:
    """Return the file's keys and values with what has changed; a split file becomes one."""
    changed = {
        "general.file_type": uint32_value(FILE_TYPES[wanted.type]),
        "general.quantized_by": string_value(f"Sterna {__version__}"),
    }
    if is_quantized(choices):
        changed["general.quantization_version"] = uint32_value(QUANTIZATION_VERSION)
    keys = {key: file.raw_value(key) for key in file.metadata if not key.startswith("split.")}
    return list((keys | changed).items())


def _identity(file: GgufFile, wanted: Wanted, calibration: str) -> dict[str, Any]:
    """Return what an unfinished file depends on; a name that differs is what the user is told."""
    return {
        "input": identify(file),
        "type": wanted.type,
        "scales": wanted.scales,
        "choice of experts": wanted.experts_only,
        "tensor types": [list(override) for override in wanted.overrides],
        "calibration": calibration,
        "version of Sterna": __version__,
    }


@contextlib.contextmanager
def _named(file: GgufFile, info: TensorInfo) -> Iterator[None]:
    """Have the errors of codecs, which see rows only, say which tensor they are about."""
    try:
        yield
    except ModelFileError as error:
        raise ModelFileError(f"{file.label_of(info)}: tensor {info.name!r}: {error}") from None


class _ConversionRun:
    """One run: writes every tensor that is not done yet."""

    def __init__(
        self,
        file: GgufFile,
        part: PartFile,
        wanted: Wanted,
        weights: Weights,
        threads: int,
        progress: Progress,
    ) -> None:
        self._file = file
        self._part = part
        self._wanted = wanted
        self._weights = weights
        self._progress = progress
        self._recoders = [Recoder() for _ in range(threads)]
        self._buffer = np.empty(0, np.uint8)
        self._read_nbytes = self._total = 0

    def run(self, choices: Sequence[Choice], layout: GgufLayout) -> None:
        self._total = sum(choice.info.nbytes for choice in choices)
        self._part.write(layout.header, 0)
        with ThreadPoolExecutor(len(self._recoders), thread_name_prefix="quantize") as pool:
            for choice, placed in zip(choices, layout.tensors, strict=True):
                if choice.info.name in self._part.done:
                    self._advance(choice.info.nbytes)
                    continue
                done = (
                    self._copy(choice, placed.offset)
                    if choice.kept
                    else self._recode(choice, placed.offset, pool)
                )
                self._part.note(choice.info.name, done)

    def _advance(self, nbytes: int) -> None:
        self._read_nbytes += nbytes
        self._progress("converting", self._read_nbytes, self._total)

    def _copy(self, choice: Choice, offset: int) -> Done:
        info, crc = choice.info, 0
        for at in range(0, info.nbytes, _COPY_BYTES):
            piece = self._read(info, at, min(_COPY_BYTES, info.nbytes - at))
            crc = zlib.crc32(piece.data, crc)
            self._part.write(piece.data, offset + at)
            self._advance(piece.size)
        return Done(crc, 0.0, 0.0)

    def _read(self, info: TensorInfo, at: int, count: int) -> Bytes:
        """Return `count` bytes of a tensor from its byte `at` on, read-only, valid until the next call.

        Not from the mapping, where a medium that fails and a file that shrinks kill the process. Raises
        ModelReadError for these.
        """
        if self._buffer.size < count:
            self._buffer = np.empty(count, np.uint8)
        found, label, done = self._buffer[:count], self._file.label_of(info), 0
        while done < count:
            offset = info.offset + at + done
            try:
                nbytes = os.preadv(self._file.fds[info.file], [found.data[done:]], offset)
            except OSError as error:
                raise ModelReadError(f"{label}: byte {offset}: reading failed: {error.strerror}") from None
            if not nbytes:
                raise ModelReadError(f"{label}: byte {offset}: the file ends here, it has shrunk")
            done += nbytes
        found.flags.writeable = False
        return found

    def _recode(self, choice: Choice, offset: int, pool: ThreadPoolExecutor) -> Done:
        columns, target = choice.info.shape[-1], choice.target
        rows_at_once = max(1, _PIECE_ELEMENTS // columns)
        out = np.empty(target.nbytes((rows_at_once, columns)), np.uint8)
        crc, loss = 0, Loss()
        for rows_of, source, first_row, rows, weights in self._slabs(choice):
            for row in range(0, rows, rows_at_once):
                count = min(rows_at_once, rows - row)
                part = rows_of(row, count)
                written = out[: target.nbytes((count, columns))]
                with _named(self._file, choice.info):
                    loss += self._spread(pool, choice, part, source, written, weights, first_row + row)
                crc = zlib.crc32(written.data, crc)
                self._part.write(written.data, offset)
                offset += written.size
                self._advance(part.size if source is choice.info.type else 0)
        if choice.info.type.matrix is not None:
            self._advance(choice.info.nbytes)
        return Done(crc, loss.lost, loss.whole)

    def _slabs(self, choice: Choice) -> Iterator[tuple[_Rows, TensorType, int, int, Floats | None]]:
        """Yield what reads rows, their type, the first, their number and weights: whole, or by experts."""
        info = choice.info
        weights = self._weights.get(info.name)
        matrix, columns = info.type.matrix, info.shape[-1]
        apart = (weights is not None and weights.ndim == 2) or (matrix is not None and matrix.has_slices)
        count = info.shape[0] if apart and len(info.shape) == 3 else 1
        rows = math.prod(info.shape[:-1]) // count
        for index in range(count):
            source, start = info.type, index * (info.nbytes // count)
            rows_of = partial(self._rows, info, start)
            if matrix is not None:  # no rows can be taken out of these
                source = TYPES_BY_NAME["F32"]
                rows_of = partial(_cut, self._values(info, start, rows, columns), source.row_bytes(columns))
            own = weights[index] if weights is not None and weights.ndim == 2 else weights
            yield rows_of, source, index * rows, rows, own

    def _rows(self, info: TensorInfo, start: int, row: int, count: int) -> Bytes:
        """Read rows from the one that lies `row` rows behind byte `start` of the tensor."""
        nbytes = info.type.row_bytes(info.shape[-1])
        return self._read(info, start + row * nbytes, count * nbytes)

    def _values(self, info: TensorInfo, start: int, rows: int, columns: int) -> Bytes:
        """Return float32 values of a matrix whose type is decoded as a whole, as read-only bytes."""
        file_type, shape = info.type, (rows, columns)
        raw = self._read(info, start, info.nbytes * rows // math.prod(info.shape[:-1]))
        with _named(self._file, info):
            tiling = (
                find_tiling(self._file, file_type.name, rows, columns) if file_type.name in TILED else None
            )
            values = ternary_matrix(file_type, raw, shape, tiling).values().reshape(-1).view(np.uint8)
        values.flags.writeable = False
        return values

    def _spread(
        self,
        pool: ThreadPoolExecutor,
        choice: Choice,
        raw: Bytes,
        source: TensorType,
        out: Bytes,
        weights: Floats | None,
        first_row: int,
    ) -> Loss:
        """Recode some rows, an equal share in each thread."""
        columns, target = choice.info.shape[-1], choice.target
        rows = raw.size // source.row_bytes(columns)
        every = max(1, chunks_of(math.prod(choice.info.shape[:-1]), columns) // _MEASURED_CHUNKS)
        # A ternary block comes back whole from its own codes only, whichever rule others get.
        scales = "lloyd-max" if is_ternary(choice.info.type) else self._wanted.scales

        def share(index: int) -> Loss:
            first, end = (rows * part // len(self._recoders) for part in (index, index + 1))
            row_from, row_to = source.row_bytes(columns), target.row_bytes(columns)
            return self._recoders[index].recode(
                raw[first * row_from : end * row_from],
                source,
                target,
                columns,
                out[first * row_to : end * row_to],
                weights=weights,
                scales=scales,
                first_row=first_row + first,
                measure_every=every,
            )

        return sum(pool.map(share, range(len(self._recoders))), Loss())


def _cut(values: Bytes, row_nbytes: int, row: int, count: int) -> Bytes:
    return values[row * row_nbytes : (row + count) * row_nbytes]


def _read_back(
    part: PartFile, keys: Sequence[tuple[str, bytes]], layout: GgufLayout, progress: Progress
) -> None:
    """Read the file as any reader would, and compare it with what was meant and what was written."""
    read = 0
    with GgufFile.open(part.path) as file:
        wrong = "its header" if tuple(file.tensors.values()) != layout.tensors else ""
        if [(key, file.raw_value(key)) for key in file.metadata] != list(keys):
            wrong = "its metadata"
        for info in () if wrong else layout.tensors:
            crc = 0
            for at in range(info.offset, info.offset + info.nbytes, _COPY_BYTES):
                block = os.pread(file.fd, min(_COPY_BYTES, info.offset + info.nbytes - at), at)
                crc = zlib.crc32(block, crc)
                read += len(block)
                progress("checking", read, layout.nbytes)
            if crc != part.done[info.name].crc:
                wrong = f"tensor {info.name!r}"
                break
    if wrong:
        part.forget()
        raise ModelReadError(
            f"{part.path}: {wrong} reads back as something else than was written; the next run begins anew"
        )
