"""`gpt-oss`: sinks, every second layer with a sliding window, biases everywhere, a clamped SwiGLU."""

from __future__ import annotations

from dataclasses import replace

from ....workers.activation import Activation
from ....workers.gating import SOFTMAX_SELECTED
from ..hyper import Hyperparameters
from .blocks import dense, grouped, head_size, rotation, with_experts
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `gpt-oss` file: layers 0, 2, 4, ... see `attention.sliding_window` positions."""
    window = keys.integer("attention.sliding_window")
    if window < 1:
        raise keys.refuse("attention.sliding_window", window, "1 or more")
    if keys.has("attention.sliding_window_pattern") and keys.integer("attention.sliding_window_pattern") != 2:
        found = keys.integer("attention.sliding_window_pattern")
        raise keys.refuse("attention.sliding_window_pattern", found, "2")
    plain = grouped(keys)
    windows = tuple(0 if layer % 2 else window for layer in range(len(plain.windows)))
    # The model's own code does not round the pairs between which YaRN mixes.
    rotated = replace(rotation(keys, halves=True, dims=head_size(keys)), whole=False)
    attention = replace(plain, windows=windows, sinks=True, biased=True, output_biased=True)
    model = with_experts(
        keys, dense(keys, attention, rotated, leading=0), normalise=False, gating=SOFTMAX_SELECTED
    )
    return replace(
        model,
        expert_biased=True,
        router_biased=True,
        activation=Activation.CLAMPED,
        ffn_norm="post_attention_norm",
    )
