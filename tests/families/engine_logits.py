"""Logits of every position by our own engine, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sterna.scheduler.decoder.token_batch import TokenBatch

from ..scheduler.local_engine import LocalEngine
from .draw import Floats
from .tiny_models import VOCAB


class Loaded:
    """A model file loaded for one stream of up to `length` tokens."""

    def __init__(self, path: Path, length: int) -> None:
        self._local = LocalEngine(path, streams=1, context=length, max_batch_tokens=length, value_nbytes=4)
        table = self._local.streams.tables[0]
        table[:] = np.arange(len(table))

    def logits(self, tokens: Sequence[int], chunk: int) -> Floats:
        """Return (len(tokens), VOCAB) logits of a new run over `tokens`, `chunk` of them at a time."""
        engine = self._local.engine
        model, mixture = engine._model, engine._mixture
        out = np.zeros((len(tokens), model.padded_vocabulary), np.float32)
        for first in range(0, len(tokens), chunk):
            ids = np.array(tokens[first : first + chunk], np.int32)
            positions = np.arange(first, first + len(ids), dtype=np.int32)
            mixture.begin(None)
            model.forward(TokenBatch(ids, np.zeros(len(ids), np.int32), positions), mixture)
            model.logits(np.arange(len(ids), dtype=np.int32), out[first:])
        return out[:, :VOCAB]
