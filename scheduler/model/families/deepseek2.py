"""`deepseek2`: DeepSeek V2, V2-Lite, V3, GLM-4.7-Flash and others with latent attention (MLA).

Sigmoid or softmax gates, groups of experts, leading dense layers.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ....workers.gating import SIGMOID, SOFTMAX
from ..attention import LatentAttention
from ..hyper import Hyperparameters, Rotation
from .blocks import dense, rotation, with_experts, with_groups, yarn_magnitude
from .keys import Keys


def read(keys: Keys) -> Hyperparameters:
    """Return the model of a `deepseek2` file."""
    if temperature := keys.number("attention.temperature_scale", 0.0):
        raise keys.refuse(
            "attention.temperature_scale", temperature, "0: queries scaled by position are not supported"
        )
    rope = keys.integer("rope.dimension_count")
    rotated, scale = _scaled(keys, rotation(keys, halves=False, dims=rope, multiplied=True))
    joined = keys.has_tensor("attn_kv_b", 0) and not keys.has("attention.key_length_mla")
    # Files with attn_kv_b have no *_mla keys: there key_length is what those are elsewhere.
    key = keys.integer("attention.key_length" if joined else "attention.key_length_mla")
    attention = LatentAttention(
        heads=keys.integer("attention.head_count"),
        q_rank=0 if keys.has_tensor("attn_q", 0) else keys.integer("attention.q_lora_rank"),
        kv_rank=keys.integer("attention.kv_lora_rank"),
        nope=key - rope,
        rope=rope,
        v_dim=keys.integer("attention.value_length" if joined else "attention.value_length_mla"),
        scale=scale / math.sqrt(max(1, key)),
        joined=joined,
    )
    model = dense(keys, attention, rotated, leading=keys.integer("leading_dense_block_count", 0))
    if model.dense_layers == model.layers:
        return model
    normalise = keys.flag("expert_weights_norm", False)
    return with_groups(keys, with_experts(keys, model, normalise=normalise, gating=_gating(keys)))


def _scaled(keys: Keys, rotated: Rotation) -> tuple[Rotation, float]:
    """Return the rotation, and the factor of the scores: YaRN's correction moves from one to the other.

    The file holds 0.1 * mscale_all_dim; cosine and sine keep the ratio of mscale and mscale_all_dim, which
    is 1 in all published models, and the scores get mscale_all_dim's correction squared.
    """
    if not rotated.yarn:
        return rotated, 1.0
    multiplier = keys.number("rope.scaling.yarn_log_multiplier") / 0.1
    correction = yarn_magnitude(rotated.factor, multiplier)
    return replace(rotated, magnitude=keys.number("rope.scaling.attn_factor", 1.0)), correction**2


def _gating(keys: Keys) -> int:
    """Return the gating function; early files lack the key, GLM-4.7-Flash's too."""
    glm = keys.integer("block_count") in (47, 48) and keys.integer("vocab_size", keys.vocabulary) == 154880
    return keys.integer("expert_gating_func", 0) or (SIGMOID if glm else SOFTMAX)
