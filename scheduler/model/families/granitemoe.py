"""`granitemoe`: Granite 3 MoE, with factors of embeddings, scores, what layers add, and logits."""

from __future__ import annotations

from dataclasses import replace

from ..hyper import Hyperparameters
from .blocks import dense, grouped, head_size, rotation, with_experts
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `granitemoe` file; the file's logit_scale divides the logits."""
    if not keys.flag("rope.scaling.finetuned", True):
        raise keys.refuse("rope.scaling.finetuned", False, "true (layers without rotation are not supported)")
    attention = grouped(keys, scale=keys.number("attention.scale"))
    rotated = rotation(keys, halves=False, dims=head_size(keys))
    divisor = keys.number("logit_scale")
    if not divisor > 0.0:
        raise keys.refuse("logit_scale", divisor, "positive")
    model = dense(keys, attention, rotated, leading=0)
    return replace(
        with_experts(keys, model, normalise=True, d_ff=keys.integer("feed_forward_length")),
        d_ff_shared=keys.integer("expert_shared_feed_forward_length", 0),
        embedding_scale=keys.number("embedding_scale"),
        residual_scale=keys.number("residual_scale"),
        logit_scale=1.0 / divisor,
    )
