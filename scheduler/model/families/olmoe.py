"""`olmoe`: a norm over all queries and all keys, softmax gates as they are, no shared experts."""

from __future__ import annotations

from ..hyper import Hyperparameters
from .blocks import dense, grouped, head_size, rotation, with_experts
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of an `olmoe` file; `feed_forward_length` is the width of an expert."""
    rotated = rotation(keys, halves=True, dims=head_size(keys))
    model = dense(keys, grouped(keys, norm="row"), rotated, leading=0)
    return with_experts(keys, model, normalise=False, d_ff=keys.integer("feed_forward_length"))
