"""`qwen2moe`: Qwen2's attention, softmax gates as they are, a shared expert with a gate of its own."""

from __future__ import annotations

from dataclasses import replace

from ..hyper import Hyperparameters
from .blocks import dense, grouped, head_size, rotation, with_experts
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `qwen2moe` file."""
    rotated = rotation(keys, halves=True, dims=head_size(keys))
    # Files before these keys hold the width of the shared experts, which is that of those that a token uses.
    shared = keys.integer("expert_shared_feed_forward_length", keys.integer("feed_forward_length"))
    each = shared // max(1, keys.integer("expert_used_count"))
    width = keys.integer("expert_feed_forward_length", each)
    model = dense(keys, grouped(keys), rotated, leading=0)
    return replace(
        with_experts(keys, model, normalise=False, d_ff=width), d_ff_shared=shared, shared_gated=True
    )
