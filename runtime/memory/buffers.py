"""What scheduler and workers allocate for a model and its settings: sums of what the allocators say.

No numba. The cache itself is `kv.StreamShape`'s. Not here: objects of Python. What passes through, frames
between processes and temporary arrays, is named below with its bound.
"""

from __future__ import annotations

from ...scheduler.arrays import nbytes
from ...scheduler.decoder import rotary
from ...scheduler.decoder.buffers import dense_nbytes
from ...scheduler.experts.buffers import experts_nbytes
from ...scheduler.kv import StreamShape
from ...scheduler.model.plan import ModelPlan
from ...scheduler.residency.buffers import ledger
from ...workers.buffers import batch_nbytes

UNEVEN = 1.5
"""A worker may get half more pairs than its part: experts are chosen unevenly."""


def scheduler_nbytes(plan: ModelPlan, shape: StreamShape, tokens: int, threads: int) -> int:
    """Return the bytes of all arrays that the scheduler keeps for steps of up to `tokens` tokens."""
    total = dense_nbytes(plan, tokens, shape.context, threads) + nbytes(ledger(shape.streams))
    total += rotary.nbytes(plan.hyper.rotation, shape.context)
    total += shape.layout().fields["tokens"].nbytes  # a copy
    return total + experts_nbytes(plan.hyper, tokens)


def step_nbytes(plan: ModelPlan, tokens: int) -> int:
    """Return the bytes that pass through the scheduler in a step of `tokens` tokens.

    The rows of embeddings; then, for each token, its state as workers read it (at most float32), and the
    outputs of its experts as they come in.
    """
    h = plan.hyper
    return 4 * tokens * h.d_model * (1 + (1 + h.experts_used if h.experts else 0))


def worker_nbytes(plan: ModelPlan, tokens: int, workers: int) -> int:
    """Return one worker's arrays for a step of `tokens` tokens, and the frames in and out."""
    h = plan.hyper
    pairs = int(tokens * h.experts_used * min(1.0, UNEVEN / max(1, workers)))
    frames = 4 * h.d_model * (pairs + min(pairs, tokens))
    return batch_nbytes(pairs, h.d_model, h.d_ff_expert) + frames if pairs else 0
