"""How a router's logits become probabilities, by GGUF's `expert_gating_func`. No numba: plans import this."""

from __future__ import annotations

SOFTMAX = 1
"""Softmax over all experts; the best of these are selected."""

SIGMOID = 2
"""A sigmoid of each logit; the best of these are selected."""

SOFTMAX_SELECTED = 3
"""The best logits are selected; the weights are the softmax over these alone (gpt-oss)."""
