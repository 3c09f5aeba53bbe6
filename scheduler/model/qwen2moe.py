"""`qwen2moe`: Qwen2's attention, softmax gates as they are, a shared expert with a gate of its own."""

from __future__ import annotations

from dataclasses import replace

from .blocks import dense, grouped, head_size, rotation, with_experts
from .hyper import Hyperparameters
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `qwen2moe` file."""
    rotated = rotation(keys, halves=True, dims=head_size(keys))
    model = with_experts(keys, dense(keys, grouped(keys), rotated, leading=0), normalise=False)
    return replace(model, d_ff_shared=keys.integer("expert_shared_feed_forward_length"), shared_gated=True)
