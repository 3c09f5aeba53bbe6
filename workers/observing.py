"""A worker that shows what its experts are multiplied with, for measuring activations. Not for serving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from ..shm.slots import SlotTable
from .checkpoint.held.formats import ActivationKind
from .messages import Compute, Outputs
from .serve import ExpertWorker

Floats = npt.NDArray[np.float32]
SeeExpert = Callable[[int, int, Floats, Floats], None]
"""Called with layer, expert, what gate and up read, (n, d_model), and what down reads, (n, d_ff)."""


class ObservingWorker(ExpertWorker):
    """Computes a batch expert by expert, which changes no bit, and calls `see` after each."""

    def __init__(self, slots: SlotTable, model_fds: Sequence[int], see: SeeExpert) -> None:
        """See `ExpertWorker`."""
        super().__init__(slots, model_fds)
        self._see = see

    def compute(
        self, message: Compute, frames: Sequence[memoryview]
    ) -> tuple[Outputs, npt.NDArray[np.float32]]:
        """As `ExpertWorker.compute`; the arrays that `see` gets are valid during the call."""
        x, rows = _inputs(message, frames), np.frombuffer(frames[-1], np.int32)
        outs = []
        for i, (first, last) in enumerate(pairwise(message.starts)):
            alone = msgspec.structs.replace(
                message, experts=[message.experts[i]], slots=[message.slots[i]], starts=[0, last - first]
            )
            own = memoryview(bytearray(rows[first:last].tobytes()))
            _, out = super().compute(alone, [*frames[:-1], own])
            outs.append(out.copy())
            self._see(
                message.layer, message.experts[i], x[rows[first:last]], self._scratch.gate[: last - first]
            )
        whole = np.concatenate(outs) if outs else np.zeros((0, x.shape[1]), np.float32)
        return Outputs(seq=message.seq, busy_ns=0), whole


def _inputs(message: Compute, frames: Sequence[memoryview]) -> Floats:
    """Return the activations of a batch as float32 (tokens, d_model), as its kernels read them."""
    if message.activation_kind == ActivationKind.FLOAT:
        return np.frombuffer(frames[0], np.float32).reshape(message.tokens, -1)
    q = np.frombuffer(frames[0], np.int8).reshape(message.tokens, -1)
    scales = np.frombuffer(frames[1], np.float32).reshape(message.tokens, -1)
    blocks = q.astype(np.float32).reshape(*scales.shape, -1) * scales[:, :, np.newaxis]
    return blocks.reshape(q.shape)
