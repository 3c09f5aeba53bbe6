"""What the scheduler allocates for a context whatever it computes. Pure arithmetic, no numba.

Not here: buffers of a step's tokens (`budget.batch_nbytes`) and the cache itself (`kv.StreamShape`).
"""

from __future__ import annotations

from ...scheduler.kv import StreamShape
from ...scheduler.model.hyper import GroupedAttention
from ...scheduler.model.plan import ModelPlan


def context_nbytes(plan: ModelPlan, shape: StreamShape, threads: int) -> int:
    """Return the bytes of the streams' tokens, both tables of `model.rotary`, and attention's scratch.

    The scratch is that of `kernels.attention.scratch_shapes`: for each thread four heads' queries, scores and
    sums in float32, and the places of positions in int64.
    """
    h, a = plan.hyper, plan.hyper.attention
    rank, width = (a.head, a.head) if isinstance(a, GroupedAttention) else (a.kv_rank, a.cache_width)
    tables = 2 * 4 * shape.context * (h.rotation.dims // 2)
    positions = shape.context + 16
    scratch = threads * (4 * 4 * (width + positions + rank) + 8 * positions)
    return 4 * shape.streams * shape.context + tables + scratch
