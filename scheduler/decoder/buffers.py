"""Which arrays the dense part of a step works on: shapes and dtypes, to make them and to plan memory.

No numba: the daemon counts with these what the scheduler will allocate. Each function stands for one
allocator, named in its docstring, which makes its arrays from what the function returns.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ...shm.layout import Field, align
from ...workers.checkpoint.held.formats import ActivationKind, activation_kind
from ...workers.kernels.scratch import product_nbytes
from ..arrays import Fields, array, nbytes
from ..model.hyper import Hyperparameters
from ..model.plan import ModelPlan

LOGIT_ROWS = 32
"""Rows of logits that are computed at once."""

STATE_READERS = ("ffn_gate", "ffn_gate_shexp", "ffn_gate_inp", "ffn_gate_inp_shexp", "output")
"""Roles of the matrices that read the normed state, other than attention's."""


def quantized(capacity: int, width: int, block: int) -> Fields:
    """`QuantizedRows`: rows of int8 with a scale and a sum for each `block` values."""
    blocks = width // block
    return (
        array("q", np.int8, capacity, width),
        array("scales", np.float32, capacity, blocks),
        array("sums", np.int32, capacity, blocks),
    )


def rows(capacity: int, width: int, threads: int, activations: Collection[ActivationKind]) -> int:
    """Return the bytes of `dense.Rows` when it was read as each of `activations`."""
    each = (quantized(capacity, width, activation.block(width)) for activation in activations if activation)
    own = (array("x", np.float32, capacity, width), product_scratch(threads, width, capacity))
    return nbytes((*own, *quantized(1, 1, 1))) + sum(map(nbytes, each))


def product_scratch(threads: int, columns: int, tokens: int) -> Field:
    """Return the scratch of a product in each of `threads` threads."""
    return array("scratch", np.uint8, threads * align(product_nbytes(columns, tokens)))


def feed_forward(capacity: int, d_model: int, d_ff: int, block: int, threads: int) -> Fields:
    """`dense.FeedForwardBuffers`; block: of the middle's activations, 0 for float."""
    return (
        array("gate", np.float32, capacity, d_ff),
        array("up", np.float32, capacity, d_ff),
        product_scratch(threads, max(d_model, d_ff), capacity),
        *quantized(capacity, d_ff, block or d_ff),
    )


def network() -> Fields:
    """`dense.FeedForward`: where its three matrices lie, as kernels take it."""
    return array("matrices", np.int64, 3, 5), array("sizes", np.int64, 3, 2)


def decoder(h: Hyperparameters, capacity: int) -> Fields:
    """`decoder.Decoder`, without the rows that matrices read and without attention."""
    return (
        array("x", np.float32, capacity, h.d_model),
        array("out", np.float32, capacity, h.d_model),
        array("gate", np.float32, capacity, 16),
        array("one_head", np.int32, 1, capacity),
    )


def logits(plan: ModelPlan) -> Field:
    """`engine.Engine`: the rows of logits."""
    return array("logits", np.float32, LOGIT_ROWS, -(-plan.vocab_size // 16) * 16)


# ---- sums over a model ----


def dense_nbytes(plan: ModelPlan, capacity: int, context: int, threads: int) -> int:
    """Return the bytes of everything that a `Decoder` for `capacity` tokens and an engine's logits hold.

    Without the rotary tables: see `rotary.nbytes`.
    """
    h = plan.hyper
    total = nbytes((*decoder(h, capacity), *h.attention.buffers(capacity, threads, context), logits(plan)))
    read_as = _read_as(plan)

    def activations(roles: Collection[str]) -> set[ActivationKind]:
        return set().union(*(read_as.get(role, ()) for role in roles))

    readers = (*h.attention.inputs, *STATE_READERS)
    total += rows(capacity, h.d_model, threads, activations(readers) | _by_experts(plan))
    for each in h.attention.rows(capacity).values():
        total += rows(each.capacity, each.width, threads, activations(each.readers))
    networks = _networks(plan)
    total += len(networks) * nbytes(network())
    return total + sum(nbytes(feed_forward(capacity, *sizes, threads)) for sizes in set(networks))


def _read_as(plan: ModelPlan) -> dict[str, set[ActivationKind]]:
    """Return for each role as what its matrices, in all layers, read their rows."""
    found: dict[str, set[ActivationKind]] = {}
    for key, tensor in plan.dense.items():
        if tensor.shape is not None:
            found.setdefault(key.rpartition(".")[2], set()).add(activation_kind(tensor.shape.form))
    return found


def _by_experts(plan: ModelPlan) -> set[ActivationKind]:
    """Return as what routed experts read the state."""
    h, found = plan.hyper, set()
    for layer in h.moe_layers:
        first = plan.key_of(layer, 0)
        for precision in set(plan.assignment[first : first + h.experts]) or {0}:
            found.add(plan.expert_activation(layer, precision))
    return found


def _networks(plan: ModelPlan) -> list[tuple[int, int, int]]:
    """Return (d_model, d_ff, block) of each dense and shared network; those that agree share buffers."""
    found = []
    for layer in range(plan.hyper.layers):
        suffix = "" if layer < plan.hyper.dense_layers else "_shexp"
        first, last = (plan.dense.get(f"{layer}.ffn_{name}{suffix}") for name in ("gate", "down"))
        if first is not None and last is not None and first.shape is not None and last.shape is not None:
            d_ff, d_model = first.shape.rows, first.shape.columns
            found.append((d_model, d_ff, activation_kind(last.shape.form).block(d_ff)))
    return found
