"""`qwen3moe`: Qwen3's attention, softmax gates whose selected weights sum to one, no shared experts."""

from __future__ import annotations

from ..hyper import Hyperparameters
from .blocks import dense, grouped, head_size, rotation, with_experts
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `qwen3moe` file."""
    rotated = rotation(keys, halves=True, dims=head_size(keys))
    return with_experts(keys, dense(keys, grouped(keys, norm="head"), rotated, leading=0), normalise=True)
