"""Which arrays routing and the mixture of experts work on; as `decoder.buffers`, without numba."""

from __future__ import annotations

import numpy as np

from ..arrays import Fields, array, nbytes
from ..decoder.buffers import rows
from ..model.hyper import Hyperparameters
from ..residency.buffers import predictor

LOOK_AHEAD_TOKENS = 8
"""Experts are only foreseen for steps of at most this many tokens."""


def router_window(h: Hyperparameters) -> int:
    """Return how many experts are ranked for each token: those selected, and those to trade them for."""
    return min(max(2 * h.experts_used, 8), h.experts)


def padded(experts: int) -> int:
    """Return the width of a row of router logits."""
    return -(-experts // 16) * 16


def router(num_experts: int, top_k: int, window: int, capacity: int) -> Fields:
    """`router.Router`."""
    return (
        array("work", np.float32, 3, num_experts),
        array("present", np.uint8, num_experts),
        array("selected", np.int32, capacity, top_k),
        array("weights", np.float32, capacity, top_k),
        array("ranked", np.int32, capacity, window),
        array("best", np.int32, capacity, top_k),
    )


def groups(num_experts: int, top_k: int, capacity: int) -> Fields:
    """`groups.MoeBatchScheduler`."""
    return (
        array("ends", np.int32, num_experts + 1),
        array("tokens", np.int32, capacity * top_k),
        array("ranks", np.int32, capacity * top_k),
    )


def foresight(h: Hyperparameters) -> Fields:
    """`foresight.Foresight`, without the rows that the gates read and without the predictor."""
    return (
        array("logits", np.float32, LOOK_AHEAD_TOKENS, padded(h.experts)),
        array("index", np.int32, 1, LOOK_AHEAD_TOKENS),
    )


def mixture(h: Hyperparameters, capacity: int) -> Fields:
    """`mixture.Mixture`, without router, groups, foresight and the biases of gates."""
    return (
        array("no_bias", np.float32, 0 if h.selection_biased else h.experts),
        array("logits", np.float32, capacity, padded(h.experts)),
        array("y", np.float32, capacity, h.experts_used, h.d_model),
        array("index", np.int32, 1, capacity),
        array("previous", np.int32, capacity, h.experts_used),
    )


def experts_nbytes(h: Hyperparameters, capacity: int) -> int:
    """Return the bytes of everything that a `Mixture` for `capacity` tokens holds."""
    biases = len(h.moe_layers) * padded(h.experts) if h.router_biased else 0
    fields = (
        *mixture(h, capacity),
        *router(h.experts, h.experts_used, router_window(h), capacity),
        *groups(h.experts, h.experts_used, capacity),
        *foresight(h),
        *predictor(len(h.moe_layers), h.experts),
    )
    return nbytes(fields) + rows(LOOK_AHEAD_TOKENS, h.d_model, 1, ()) + 4 * biases
