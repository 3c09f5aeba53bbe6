"""What families share in reading their keys: rotation, grouped-query attention, dense layers, experts."""

from __future__ import annotations

import math
from dataclasses import replace

from ....workers.gating import SOFTMAX
from ..attention import GroupedAttention, LatentAttention
from ..hyper import Hyperparameters, Rotation
from .keys import Keys


def yarn_magnitude(factor: float, multiplier: float = 1.0) -> float:
    """Return 0.1 * multiplier * ln(factor) + 1, YaRN's correction of attention, 1 for a factor below 1."""
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rotation(
    keys: Keys, *, halves: bool, dims: int, base: float | None = None, multiplied: bool = False
) -> Rotation:
    """Read the rotary embedding; dims, base: where files may leave their keys out.

    multiplied: whether the family reads `yarn_log_multiplier`, which counts for attention, itself.

    Raises ModelFileError for a scaling that is not supported: all but none, linear and yarn.
    """
    plain = Rotation(
        dims=keys.integer("rope.dimension_count", dims),
        base=keys.number("rope.freq_base", base),
        halves=halves,
    )
    # Files that do not name a scaling mean the linear one, by a factor that is 1 unless given.
    scaling = keys.text("rope.scaling.type", "linear") or "none"
    if scaling == "none":
        return plain
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if multiplier and not multiplied:
        raise keys.refuse("rope.scaling.yarn_log_multiplier", multiplier, "0 in this architecture")
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise keys.refuse("rope.scaling.yarn_ext_factor", keys.number("rope.scaling.yarn_ext_factor"), "1")
    if scaling not in ("linear", "yarn"):
        raise keys.refuse("rope.scaling.type", scaling, "none, linear or yarn")
    linear = keys.number("rope.scale_linear", 1.0)
    factor = keys.number("rope.scaling.factor", linear if scaling == "linear" else None) or 1.0
    magnitude = keys.number("rope.scaling.attn_factor", 1.0)
    if scaling == "linear" or factor == 1.0:
        return replace(plain, factor=factor, magnitude=magnitude)
    return replace(
        plain,
        factor=factor,
        yarn=True,
        original_context=keys.integer("rope.scaling.original_context_length"),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        magnitude=magnitude * yarn_magnitude(factor),
    )


def head_size(keys: Keys) -> int:
    """Return the values of a head: `attention.key_length`, by its definition embedding_length / head_count.

    Raises ModelFileError where keys and values differ in size.
    """
    heads = keys.integer("attention.head_count")
    size = keys.integer("attention.key_length", keys.integer("embedding_length") // max(1, heads))
    values = keys.integer("attention.value_length", size)
    if values != size:
        raise keys.refuse("attention.value_length", values, f"{size}, as keys have")
    return size


def grouped(keys: Keys, *, norm: str = "", scale: float | None = None) -> GroupedAttention:
    """Read grouped-query attention; biases of q, k and v where the file has them."""
    heads, head = keys.integer("attention.head_count"), head_size(keys)
    layers = main_layers(keys)
    return GroupedAttention(
        heads=heads,
        kv_heads=keys.integer("attention.head_count_kv", heads),
        head=head,
        scale=1.0 / math.sqrt(max(1, head)) if scale is None else scale,
        windows=(0,) * max(0, layers),
        biased=keys.has_tensor("attn_q_bias", 0),
        output_biased=keys.has_tensor("attn_output_bias", 0),
        norm=norm,
    )


def main_layers(keys: Keys) -> int:
    """Return the number of layers without those that predict further tokens, which are not used."""
    return keys.integer("block_count") - keys.integer("nextn_predict_layers", 0)


def dense(
    keys: Keys,
    attention: LatentAttention | GroupedAttention,
    rotated: Rotation,
    *,
    leading: int | None = None,
) -> Hyperparameters:
    """Return a model whose first `leading` layers are dense; the others get theirs from `with_experts`."""
    if not keys.flag("attention.causal", True):
        raise keys.refuse("attention.causal", False, "true: only causal attention is supported")
    layers = main_layers(keys)
    first = layers if leading is None else leading
    return Hyperparameters(
        architecture=keys.architecture,
        layers=layers,
        d_model=keys.integer("embedding_length"),
        eps=keys.number("attention.layer_norm_rms_epsilon"),
        context_length=keys.integer("context_length"),
        attention=attention,
        rotation=rotated,
        d_ff_dense=keys.integer("feed_forward_length") if first else 0,
        dense_layers=first,
    )


def with_experts(
    keys: Keys, model: Hyperparameters, *, normalise: bool, gating: int = SOFTMAX, d_ff: int | None = None
) -> Hyperparameters:
    """Return `model` with experts in all layers behind its dense ones.

    d_ff: width of an expert where the family keeps it under another key than `expert_feed_forward_length`.
    """
    return replace(
        model,
        experts=keys.integer("expert_count"),
        experts_used=keys.integer("expert_used_count"),
        d_ff_expert=keys.integer("expert_feed_forward_length") if d_ff is None else d_ff,
        weights_norm=normalise,
        weights_scale=keys.number("expert_weights_scale", 1.0) or 1.0,  # 0 is written for none
        gating=gating,
        selection_biased=keys.has_tensor("exp_probs_b", model.dense_layers),
    )


def with_groups(keys: Keys, model: Hyperparameters) -> Hyperparameters:
    """Return `model` with shared experts as wide as `expert_shared_count` routed ones, and expert groups."""
    groups = keys.integer("expert_group_count", 1) or 1
    return replace(
        model,
        d_ff_shared=model.d_ff_expert * keys.integer("expert_shared_count"),
        groups=groups,
        groups_used=keys.integer("expert_group_used_count") if groups > 1 else 1,
    )
