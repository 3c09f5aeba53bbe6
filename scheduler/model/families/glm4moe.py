"""`glm4moe`: GLM-4.5 and 4.6, partly rotated heads, sigmoid gates with a bias, layers to predict ignored."""

from __future__ import annotations

from dataclasses import replace

from ....workers.gating import SIGMOID
from ..hyper import Hyperparameters
from .blocks import dense, grouped, rotation, with_experts, with_groups
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `glm4moe` file; only the large ones have norms of heads."""
    attention = grouped(keys, norm="head" if keys.has_tensor("attn_q_norm", 0) else "")
    rotated = rotation(keys, halves=True, dims=keys.integer("rope.dimension_count"))
    model = with_experts(
        keys,
        dense(keys, attention, rotated, leading=keys.integer("leading_dense_block_count")),
        normalise=keys.flag("expert_weights_norm"),
        gating=keys.integer("expert_gating_func", SIGMOID) or SIGMOID,
    )
    return replace(
        with_groups(keys, model),
        selection_biased=True,
        ffn_norm="post_attention_norm",
    )
