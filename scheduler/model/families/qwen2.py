"""`qwen2`: dense, with biases of queries, keys and values."""

from __future__ import annotations

from ..hyper import Hyperparameters
from .blocks import dense, grouped, head_size, rotation
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `qwen2` file."""
    return dense(keys, grouped(keys), rotation(keys, halves=True, dims=head_size(keys)))
