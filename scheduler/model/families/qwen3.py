"""`qwen3`: dense, with a norm of each head's queries and keys."""

from __future__ import annotations

from ..hyper import Hyperparameters
from .blocks import dense, grouped, head_size, rotation
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `qwen3` file."""
    return dense(keys, grouped(keys, norm="head"), rotation(keys, halves=True, dims=head_size(keys)))
