"""The decoder of all families: embedding, layers of attention and feed-forward, final norm and head.

Everything but the routed experts is computed here; tokens of different streams differ only in their
positions and block tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...workers.checkpoint.types.table import dequantize
from ...workers.kernels.layers.norms import add_rows, add_scaled_rows, gate_rows, rms_rows, scale_rows
from ..arrays import zeros
from ..kv import StreamMemory
from ..model.attention import GroupedAttention, LatentAttention
from ..model.plan import ModelPlan
from . import buffers
from .dense import DenseWeights, FeedForward, Linear, Rows
from .grouped_attention import GroupedBlock
from .latent_attention import LatentBlock
from .rotary import tables
from .token_batch import TokenBatch

F32 = npt.NDArray[np.float32]
Mixture = Callable[[int, Rows, int, F32, Callable[[], F32]], None]

_BLOCKS: Final[Mapping[type, Any]] = {LatentAttention: LatentBlock, GroupedAttention: GroupedBlock}


class Decoder:
    """The dense part of the model: everything but the routed experts, which `mixture` computes."""

    def __init__(self, plan: ModelPlan, dense: DenseWeights, streams: StreamMemory, capacity: int) -> None:
        h = plan.hyper
        self._h = h
        self._streams = streams
        self.capacity = capacity
        self._embedding = dense.entry("token_embd").tensor
        self._embedding_rows = dense.raw("token_embd").reshape(plan.vocab_size, -1)
        factors = dense.vector("rope_freqs") if dense.has("rope_freqs") else None
        turned = tables(h.rotation, streams.shape.context, factors)
        block = _BLOCKS[type(h.attention)]
        self._attention: LatentBlock | GroupedBlock = block(h, h.attention, dense, streams, capacity, turned)
        self._attn_norm = [dense.vector(f"{layer}.attn_norm") for layer in range(h.layers)]
        self._ffn_norm = [dense.vector(f"{layer}.ffn_norm") for layer in range(h.layers)]
        self._ffn = [self._load_ffn(dense, layer) for layer in range(h.layers)]
        self._shared_gates: dict[int, Linear] = {
            layer: dense.linear(f"{layer}.ffn_gate_inp_shexp") for layer in h.moe_layers if h.shared_gated
        }
        self._output_norm = dense.vector("output_norm")
        self._output = dense.linear("output")
        made = zeros(buffers.decoder(h, capacity))
        self.x, self._out, self._gate = made["x"], made["out"], made["gate"]
        self._one_head = made["one_head"]
        self._one_head[0] = np.arange(capacity)
        self._normed = Rows(capacity, h.d_model, dense.crew.threads)

    def _load_ffn(self, dense: DenseWeights, layer: int) -> FeedForward | None:
        """Return the network of a dense layer, or that of the shared experts, if there are any."""
        h = self._h
        pattern = "{}.ffn_{}" if layer < h.dense_layers else "{}.ffn_{}_shexp"
        gate, up, down = (pattern.format(layer, name) for name in ("gate", "up", "down"))
        if not dense.has(gate):
            return None
        key = f"{layer}.ffn_sub_norm"
        norm = (dense.vector(key), h.eps) if dense.has(key) else None
        return dense.feed_forward(gate, up, down, self.capacity, h.activation, norm)

    # ---- one step ----

    def forward(self, batch: TokenBatch, mixture: Mixture) -> F32:
        """Run all layers over `batch`; return the final hidden states (T, d_model), not yet normed.

        Appends each token to the cache. `mixture(layer, rows, count, x, shared)` adds the routed experts
        and the result of `shared()` to `x`. The array is valid until the next call.
        """
        h, count = self._h, len(batch.ids)
        self._embed(batch.ids)
        cache_rows = self._cache_rows(batch)
        for layer in range(h.layers):
            self._norm(self._attn_norm[layer], count)
            self._attention.attend(layer, self._normed, batch, cache_rows, self._out)
            self._add(self._out, count)
            self._norm(self._ffn_norm[layer], count)
            if layer < h.dense_layers:
                self._add(self._feed_forward(layer, count), count)
            else:
                mixture(layer, self._normed, count, self.x, lambda at=layer: self._shared(at, count))  # type: ignore[misc]
        return self.x[:count]

    def logits(self, rows: npt.NDArray[np.int32], out: F32) -> None:
        """Write the logits of the hidden states `rows` to `out` (len(rows), padded vocabulary)."""
        count = len(rows)
        self.normed(rows)
        self._output.apply(self._normed, self._one_head, count, out)
        if self._h.logit_scale != 1.0:
            scale_rows(out, np.float32(self._h.logit_scale), count, self._output.padded)

    def normed(self, rows: npt.NDArray[np.int32]) -> F32:
        """Return the hidden states `rows` after the final norm, (len(rows), d_model).

        The array is valid until the next call.
        """
        picked = np.ascontiguousarray(self.x[rows])
        width = self._h.d_model
        rms_rows(picked, width, self._output_norm, np.float32(self._h.eps), len(rows), width, self._normed.x)
        self._normed.changed()
        return self._normed.x[: len(rows)]

    @property
    def padded_vocabulary(self) -> int:
        """Width of a row of logits."""
        return self._output.padded

    def _embed(self, ids: npt.NDArray[np.int32]) -> None:
        raw = np.ascontiguousarray(self._embedding_rows[ids])
        count, width = len(ids), self._h.d_model
        self.x[:count] = dequantize(self._embedding.type, raw.reshape(-1), (count, width))
        if self._h.embedding_scale != 1.0:
            scale_rows(self.x, np.float32(self._h.embedding_scale), count, width)

    def _cache_rows(self, batch: TokenBatch) -> npt.NDArray[np.int64]:
        size = self._streams.shape.block_size
        blocks = self._streams.tables[batch.streams, batch.positions // size].astype(np.int64)
        return blocks * size + batch.positions % size

    def _norm(self, weight: F32, count: int) -> None:
        width = self._h.d_model
        rms_rows(self.x, width, weight, np.float32(self._h.eps), count, width, self._normed.x)
        self._normed.changed()

    def _add(self, out: F32, count: int) -> None:
        if self._h.residual_scale == 1.0:
            add_rows(self.x, out, count, self._h.d_model)
        else:
            add_scaled_rows(self.x, out, np.float32(self._h.residual_scale), count, self._h.d_model)

    def _feed_forward(self, layer: int, count: int) -> F32:
        ffn = self._ffn[layer]
        if ffn is None:
            self._out[:count] = 0.0
        else:
            ffn.apply(self._normed, self._one_head, count, self._out)
        return self._out

    def _shared(self, layer: int, count: int) -> F32:
        """Return what the shared experts add, gated and scaled as the model has it."""
        out = self._feed_forward(layer, count)
        if layer in self._shared_gates:
            gate = self._shared_gates[layer]
            gate.apply(self._normed, self._one_head, count, self._gate)
            gate_rows(out, self._gate, gate.padded, count, self._h.d_model)
        if self._h.residual_scale != 1.0:
            scale_rows(out, np.float32(self._h.residual_scale), count, self._h.d_model)
        return out
