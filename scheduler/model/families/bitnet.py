"""`bitnet`: ternary dense models with a norm in front of each output; BitNet b1.58 2B-4T squares a ReLU."""

from __future__ import annotations

from dataclasses import replace

from ....workers.activation import Activation
from ..hyper import Hyperparameters
from .blocks import dense, grouped, head_size, rotation
from .keys import Keys

SQUARED = ("bitnet-b1.58", "bitnet-25")
"""Names under which BitNet b1.58 2B-4T is published; `bitnet` itself has a SiLU."""


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `bitnet` file."""
    attention = replace(grouped(keys), sub_norm=True)
    rotated = rotation(keys, halves=True, dims=head_size(keys))
    squared = keys.architecture in SQUARED
    return replace(
        dense(keys, attention, rotated),
        ffn_sub_norm=True,
        activation=Activation.RELU2 if squared else Activation.SILU,
    )
