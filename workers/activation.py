"""What a feed-forward network does between its matrices, by number: plans name it, kernels compute it.

No numba: the daemon imports this. The kernels are in `kernels.layers.ffn`.
"""

from __future__ import annotations

from enum import IntEnum


class Activation(IntEnum):
    """How gate g and up u become the middle. A kernel takes the number: `int(Activation.SILU)`."""

    SILU = 0
    """silu(g) * u."""
    RELU2 = 1
    """relu(g)^2 * u (BitNet b1.58 2B-4T)."""
    CLAMPED = 2
    """g' sigmoid(1.702 g') (u' + 1) with g' = min(g, 7), u' in -7..7 (gpt-oss)."""


CLAMP = 7.0
"""`swiglu_limit` of gpt-oss's config.json; GGUF has no key for it."""

CLAMPED_SLOPE = 1.702
"""`alpha` of GptOssExperts in transformers (models/gpt_oss/modeling_gpt_oss.py)."""
