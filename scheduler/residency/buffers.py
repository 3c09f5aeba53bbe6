"""Which arrays prediction, policy and quality accounts keep; as `decoder.buffers`, without numba."""

from __future__ import annotations

import numpy as np

from ..arrays import Fields, array

ACCOUNT = 5
"""Figures of an account: see `workers.kernels.routing.top_k.CREDIT` and those after it."""


def predictor(num_layers: int, num_experts: int) -> Fields:
    """`predictor.ExpertPredictor`."""
    return (
        array("table", np.int32, num_layers, num_experts, num_experts),
        array("rows", np.int32, num_layers, num_experts),
        array("recency", np.float32, num_layers, num_experts),
        array("scratch", np.float64, 2, num_experts),
        array("nobody", np.bool_, num_experts),
        array("none", np.int32, 0),
    )


def ledger(streams: int) -> Fields:
    """`quality.QualityLedger`."""
    return (
        array("epsilon", np.float64, streams),
        array("accounts", np.float64, streams, ACCOUNT),
        array("kept", np.float64, streams, ACCOUNT),
        array("before", np.float64, streams, ACCOUNT),
    )
