"""Where `sterna quantize` has its weights of columns from: a text that is run, or a file. Imports numba.

What was measured lies beside the unfinished file, as OUT.part.imatrix, so that a run that goes on does not
measure again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...shm.errors import ModelFileError, ModelNotFound, UsageError
from ...workers.checkpoint.file.gguf import GgufFile
from ..text.tokenizer import Tokenizer
from .activations import measure
from .imatrix import ColumnSums
from .journal import identify, side_path

Progress = Callable[[str, int, int], None]
Weights = dict[str, npt.NDArray[np.float32]]
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnWeights:
    """What finds weights of columns as `quantize` takes them, what they are of, and where they are kept."""

    weights: Callable[[], Weights] = dict
    source: str = ""
    kept_at: Path | None = None

    def drop(self) -> None:
        """Remove what was kept for a run that would have gone on."""
        if self.kept_at is not None:
            self.kept_at.unlink(missing_ok=True)


def from_text(file: GgufFile, text: str, tokens: int, out: Path, progress: Progress) -> ColumnWeights:
    """Have the first `tokens` tokens of `text` measured, unless an earlier run for `out` did that.

    Nothing is measured before the weights are asked for. Raises UsageError for fewer than two tokens; the
    weights raise what `measure` and `ColumnSums.save` do, and UsageError if something else lies in the way.
    """
    ids = Tokenizer.from_metadata(file.metadata, file.label).encode(text)[:tokens]
    if len(ids) < 2:
        raise UsageError("--calibrate: expected a text of at least two tokens, found fewer")
    source = f"{tokens} tokens of text {hashlib.sha256(text.encode()).hexdigest()}"
    path = side_path(out, ".part.imatrix")
    return ColumnWeights(
        weights=partial(_measured, file, ids, source, path, progress), source=source, kept_at=path
    )


def _measured(file: GgufFile, ids: list[int], source: str, path: Path, progress: Progress) -> Weights:
    of_input = f"{source} for {json.dumps(identify(file))}"
    sums = _kept(path, of_input)
    if sums is None:
        measure(file, ids, progress).save(path, of_input)
        sums = ColumnSums.load(path, of_input) or ColumnSums()  # as a run that goes on finds it, to the bit
    return sums.weights(file)


def _kept(path: Path, source: str) -> ColumnSums | None:
    """Return what lies at `path` if it is of this source, None if there is nothing or what is out of date."""
    try:
        return ColumnSums.load(path, source)
    except ModelNotFound:
        return None
    except ModelFileError as error:  # somebody else's, or a run was killed while it wrote
        raise UsageError(f"{error}; --restart throws it away") from None


def from_imatrix(file: GgufFile, path: Path) -> ColumnWeights:
    """Read an importance matrix. Raises UsageError if it knows no tensor of `file`."""
    sums = ColumnSums.load(path)
    weights = {} if sums is None else sums.weights(file)
    if not weights:
        raise UsageError(f"--imatrix {path}: knows no tensor of {file.label}")
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return ColumnWeights(weights=lambda: weights, source=f"imatrix {digest.hexdigest()}")
