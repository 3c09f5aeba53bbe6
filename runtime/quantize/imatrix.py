"""Importance matrices: sums of squares of what each column of a tensor was multiplied with, and their file.

The file is that of llama.cpp's `llama-imatrix` (GGUF, since 2025): for a tensor NAME the tensors
NAME.in_sum2, float32 (matrices, columns), and NAME.counts, float32 (matrices, 1), the rows summed over.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ...shm.errors import ModelFileError
from ...workers.checkpoint.file.gguf import GgufFile
from ...workers.checkpoint.file.writer import lay_out, string_value
from ...workers.checkpoint.types.table import TYPES_BY_NAME, dequantize
from .journal import write_error

Floats = npt.NDArray[np.float32]

# Tokens that are added to those of an expert, with the mean of all experts: few tokens alone tell little.
_BORROWED_ROWS: Final = 16.0
_LEAST: Final = 1e-3  # of a row's mean, so that no column is worth nothing
_SUMS, _COUNTS = ".in_sum2", ".counts"
_TEXT_KEY: Final = "sterna.imatrix.text"


class ColumnSums:
    """Sums by tensor name: float64 (matrices, columns), and how many rows they are of."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, name: str, rows: Floats, matrix: int, matrices: int) -> None:
        """Add rows (n, columns) that matrix `matrix` of the tensor's `matrices` was multiplied with."""
        if name not in self._sums:
            self._sums[name] = (np.zeros((matrices, rows.shape[1])), np.zeros(matrices))
        sums, counts = self._sums[name]
        sums[matrix] += np.square(rows, dtype=np.float64).sum(axis=0)
        counts[matrix] += len(rows)

    def weights(self, file: GgufFile) -> dict[str, Floats]:
        """Return the mean squares of tensors of `file`, as `quantize` takes them: 1-D, or one row a matrix.

        Every number is above 0. Raises ModelFileError for a tensor whose columns are not those summed over.
        """
        found: dict[str, Floats] = {}
        for name, (sums, counts) in self._sums.items():
            info = file.tensors.get(name)
            if info is None:
                continue
            if sums.shape[1] != info.shape[-1] or len(sums) not in (1, info.shape[0]):
                raise ModelFileError(
                    f"{file.label}: tensor {name!r}: has shape {info.shape}, expected {sums.shape[1]} columns"
                    f" in {len(sums)} matrices as in the importance matrix"
                )
            pooled = sums.sum(axis=0) / max(1.0, counts.sum())
            means = (sums + _BORROWED_ROWS * pooled) / (counts[:, np.newaxis] + _BORROWED_ROWS)
            means = np.maximum(means, _LEAST * means.mean(axis=1, keepdims=True))
            means[means.max(axis=1) <= 0] = 1.0  # nothing is known: all columns alike
            found[name] = (means[0] if len(sums) == 1 else means).astype(np.float32)
        return found

    def save(self, path: Path, text: str) -> None:
        """Write the file, or leave none; `text` names what was run. Raises NotPermitted, OutOfResources."""
        f32 = TYPES_BY_NAME["F32"]
        tensors = [
            (name + end, shape, f32)
            for name, (sums, _) in self._sums.items()
            for end, shape in ((_SUMS, sums.shape), (_COUNTS, (len(sums), 1)))
        ]
        keys = [("general.type", string_value("imatrix")), (_TEXT_KEY, string_value(text))]
        layout = lay_out(keys, tensors, 32)
        image = bytearray(layout.header.ljust(layout.nbytes, b"\0"))
        for info in layout.tensors:
            sums, counts = self._sums[info.name.removesuffix(_SUMS).removesuffix(_COUNTS)]
            raw = (sums if info.name.endswith(_SUMS) else counts).astype("<f4").tobytes()
            image[info.offset : info.offset + info.nbytes] = raw
        try:
            path.write_bytes(image)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise write_error(path, error) from None

    @classmethod
    def load(cls, path: Path, text: str | None = None) -> ColumnSums | None:
        """Read a file; None if it is of another `text` than that.

        Raises ModelFileError if it is no importance matrix or, with `text`, none that `save` wrote, and what
        `GgufFile.open` raises.
        """
        with GgufFile.open(path) as file:
            if file.get("general.type", str, "") != "imatrix":
                raise ModelFileError(f"{file.label}: no importance matrix (key 'general.type')")
            if text is not None and file.require(_TEXT_KEY, str) != text:
                return None
            found = cls()
            for name in file.tensors:
                if not name.endswith(_SUMS):
                    continue
                base = name.removesuffix(_SUMS)
                sums, counts = (_values(file, base + end) for end in (_SUMS, _COUNTS))
                sums = sums.reshape(-1, sums.shape[-1])
                if counts.size != len(sums) or not (np.isfinite(sums).all() and np.isfinite(counts).all()):
                    raise ModelFileError(f"{file.label}: tensor {name!r}: damaged sums or counts")
                found._sums[base] = (sums, counts.reshape(-1))
            return found


def _values(file: GgufFile, name: str) -> npt.NDArray[np.float64]:
    info = file.tensors.get(name)
    if info is None or info.type.name != "F32":
        raise ModelFileError(f"{file.label}: tensor {name!r}: expected F32 values, found none")
    return dequantize(info.type, file.data(info), info.shape).astype(np.float64)
