"""Which expert is held in which precision within a budget: between a plan and its slots.

Not in here: the allocator (`scheduler.residency.precision.budget`), the arithmetic of memory (`budget.py`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ...scheduler.model.plan import ModelPlan
from ...scheduler.residency.precision.plan import ExpertPrecisions, typical_errors
from .budget import SlotDecision, Wants, decide


def can_convert(plan: ModelPlan) -> bool:
    """Return whether any expert gets smaller in any precision of the plan: ternary ones never do."""
    return any(held != plan.experts[layer] for layer, tiers in plan.tiers.items() for held in tiers)


def assign(
    plan: ModelPlan,
    preset: str,
    counts: npt.NDArray[np.float64] | None,
    wants: Wants,
    budget: int,
    largest_read: int,
) -> tuple[ModelPlan, SlotDecision]:
    """Return `plan` with a precision for each expert, and how `budget` bytes are then spent.

    First all are as small as they get, which says what is left for slots; then that is spent on those that
    are used most. Where not even the smallest fit, there are fewer slots of that size than experts.
    counts: uses by key, None (or of another model's shape) for all alike. Raises as `decide`.
    """
    precisions = ExpertPrecisions(plan, preset, typical_errors(plan))
    if counts is None or counts.shape != (plan.num_experts,):
        counts = np.ones(plan.num_experts)
    least = precisions.allocator.smallest_bytes
    small = plan.assigned(precisions.rebalance(counts, least).tolist())
    first = decide(small, replace(wants, resident="auto"), budget, largest_read)
    room = first.rows["slots"] + budget - first.total
    chosen = small.assigned(precisions.rebalance(counts, max(room, least)).tolist())
    found = decide(chosen, first.settled(wants), budget, largest_read)
    return chosen, replace(found, smallest=first.smallest, notes=first.notes)
