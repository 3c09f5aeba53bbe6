"""Where `sterna quantize` has its weights of columns from: a text that is run, or a file. Imports numba.

What was measured lies beside the unfinished file, so that a run that goes on does not measure again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..shm.errors import ModelFileError, ModelNotFound, UsageError
from ..workers.checkpoint.gguf import GgufFile
from .activation_means import measure
from .imatrix import ColumnSums
from .tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Weights of columns as `quantize` takes them, what they are of, and where they lie until it is done."""

    weights: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    source: str = ""
    kept_at: Path | None = None

    def drop(self) -> None:
        """Remove what was kept for a run that would have gone on."""
        if self.kept_at is not None:
            self.kept_at.unlink(missing_ok=True)


def from_text(file: GgufFile, text: str, tokens: int, out: Path, progress: Progress) -> Calibration:
    """Measure with the first `tokens` tokens of `text`, or take what an earlier run for `out` measured."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    source = f"{tokens} tokens of text {digest} for {file.size_bytes} bytes"
    path = out.with_name(out.name + ".part.imatrix")
    sums = _kept(path, source)
    if sums is None:
        ids = Tokenizer.from_metadata(file.metadata, file.label).encode(text)[:tokens]
        measure(file, ids, progress).save(path, source)
        sums = ColumnSums.load(path) or ColumnSums()  # as a run that goes on finds it, to the bit
    return Calibration(weights=sums.weights(file), source=source, kept_at=path)


def _kept(path: Path, source: str) -> ColumnSums | None:
    """Return what lies at `path` if it is whole and of this source."""
    try:
        return ColumnSums.load(path, source)
    except (ModelNotFound, ModelFileError):
        return None  # none was made, or a run ended while it wrote


def from_imatrix(file: GgufFile, path: Path) -> Calibration:
    """Read an importance matrix. Raises UsageError if it knows no tensor of `file`."""
    sums = ColumnSums.load(path)
    weights = {} if sums is None else sums.weights(file)
    if not weights:
        raise UsageError(f"--imatrix {path}: knows no tensor of {file.label}")
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return Calibration(weights=weights, source=f"imatrix {digest.hexdigest()}")
