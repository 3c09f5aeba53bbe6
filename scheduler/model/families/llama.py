"""`llama`: Llama 1 to 3, Mistral and their like, dense, and Mixtral with experts in all layers."""

from __future__ import annotations

from ..hyper import Hyperparameters
from .blocks import dense, grouped, head_size, rotation, with_experts
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `llama` file; the experts of Mixtral are as wide as its dense layers would be."""
    attention = grouped(keys)
    # Files of Llama 2's time do not name the base that all models had then.
    rotated = rotation(keys, halves=False, dims=head_size(keys), base=10000.0)
    if not keys.integer("expert_count", 0):
        return dense(keys, attention, rotated)
    width = keys.integer("feed_forward_length")
    return with_experts(keys, dense(keys, attention, rotated, leading=0), normalise=True, d_ff=width)
