"""The `deepseek2` family: latent attention (MLA, absorbed), sigmoid-gated experts, dense first layers.

The computation is that of spec section 4.4, for all tokens of a batch at once; tokens of different
streams differ only in their positions and block tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...workers.checkpoint.types import dequantize
from ...workers.kernels.attention import latent_attention, latent_chunk, scratch_shapes
from ...workers.kernels.crew import job_address
from ...workers.kernels.norms import add_rows, rms_rows, rope_pairs, store_latent
from ..dense import DenseWeights, FeedForward, Linear, Rows
from ..kv import StreamMemory
from .plan import ModelPlan

Mixture = Callable[[int, Rows, int, npt.NDArray[np.float32], Callable[[], npt.NDArray[np.float32]]], None]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The tokens of one step: ids, and for each its stream record and position (all int32, (T,))."""

    ids: npt.NDArray[np.int32]
    streams: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Attention:
    norm: npt.NDArray[np.float32]
    q_a: Linear | None
    q_a_norm: npt.NDArray[np.float32] | None
    q_b: Linear
    kv_a: Linear
    kv_a_norm: npt.NDArray[np.float32]
    k_b: Linear
    v_b: Linear
    output: Linear


class Deepseek2:
    """The dense part of the model: everything but the routed experts, which `mixture` computes."""

    def __init__(self, plan: ModelPlan, dense: DenseWeights, streams: StreamMemory, capacity: int) -> None:
        h = plan.hyper
        self._h = h
        self._dense = dense
        self._streams = streams
        self.capacity = capacity
        self._embedding = dense.entry("token_embd").tensor
        self._embedding_rows = dense.raw("token_embd").reshape(plan.vocab_size, -1)
        self._attention = [self._load_attention(layer) for layer in range(h.layers)]
        self._ffn_norm = [dense.vector(f"{layer}.ffn_norm") for layer in range(h.layers)]
        self._ffn = [
            self._load_ffn(layer, "ffn_{}" if layer < h.dense_layers else "ffn_{}_shexp")
            for layer in range(h.layers)
        ]
        self._output_norm = dense.vector("output_norm")
        self._output = dense.linear("output")
        self._make_buffers()
        self._make_rotation()

    def _load_attention(self, layer: int) -> _Attention:
        def linear(role: str, heads: int = 1) -> Linear:
            return self._dense.linear(f"{layer}.{role}", heads)

        def vector(role: str) -> npt.NDArray[np.float32]:
            return self._dense.vector(f"{layer}.{role}")

        h = self._h
        return _Attention(
            norm=vector("attn_norm"),
            q_a=linear("attn_q_a") if h.q_rank else None,
            q_a_norm=vector("attn_q_a_norm") if h.q_rank else None,
            q_b=linear("attn_q_b" if h.q_rank else "attn_q"),
            kv_a=linear("attn_kv_a_mqa"),
            kv_a_norm=vector("attn_kv_a_norm"),
            k_b=linear("attn_k_b", h.heads),
            v_b=linear("attn_v_b", h.heads),
            output=linear("attn_output"),
        )

    def _load_ffn(self, layer: int, pattern: str) -> FeedForward | None:
        gate, up, down = (f"{layer}.{pattern.format(name)}" for name in ("gate", "up", "down"))
        if not self._dense.has(gate):
            return None
        return self._dense.feed_forward(gate, up, down, self.capacity)

    def _make_buffers(self) -> None:
        h, t, threads = self._h, self.capacity, self._dense.crew.threads
        self.x = np.zeros((t, h.d_model), np.float32)
        self._normed = Rows(t, h.d_model, threads)
        self._low = np.zeros((t, h.q_rank), np.float32)
        self._q_low = Rows(t, h.q_rank, threads)
        self._q = np.zeros((t, h.heads * (h.nope + h.rope)), np.float32)
        self._q_nope = Rows(t * h.heads, h.nope, threads)
        self._q_latent = np.zeros((t, h.heads * h.kv_rank), np.float32)
        self._kv = np.zeros((t, h.cache_width), np.float32)
        self._latent = np.zeros((t, h.kv_rank), np.float32)
        self._context = Rows(t * h.heads, h.kv_rank, threads)
        self._values = Rows(t, h.heads * h.v_dim, threads)
        self._out = np.zeros((t, h.d_model), np.float32)
        self._index = np.arange(t, dtype=np.int32)
        self._one_head = self._index.reshape(1, t)
        self._head_index = np.ascontiguousarray(
            (np.arange(t)[None, :] * h.heads + np.arange(h.heads)[:, None]).astype(np.int32)
        )
        scratch, places = scratch_shapes(threads, self._streams.shape.context, h.kv_rank, h.cache_width)
        self._scratch = np.zeros(scratch, np.float32)
        self._places = np.zeros(places, np.int64)
        self._attention_job = job_address(latent_chunk)

    def _make_rotation(self) -> None:
        """Tabulate cos and sin of p * base^(-2i/n) for every position p and pair i.

        The angle of pair i is that of pair i - 1 times base^(-2/n), in float32: llama.cpp's
        recurrence, so that the same file gives the same logits there.
        """
        half, context = self._h.rope // 2, self._streams.shape.context
        rate = np.float32(self._h.rope_base) ** np.float32(-2.0 / self._h.rope)
        angles = np.empty((context, half), np.float32)
        angles[:, 0] = np.arange(context)
        for i in range(1, half):
            angles[:, i] = angles[:, i - 1] * rate
        self._cosine = np.cos(angles)
        self._sine = np.sin(angles)

    # ---- one step ----

    def forward(self, batch: TokenBatch, mixture: Mixture) -> npt.NDArray[np.float32]:
        """Run all layers over `batch`; return the final hidden states (T, d_model), not yet normed.

        Appends each token's latent to the cache. `mixture(layer, rows, count, x, shared)` adds the
        routed experts and the result of `shared()` to `x`. The array is valid until the next call.
        """
        count = len(batch.ids)
        self._embed(batch.ids)
        places = self._cache_places(batch)
        for layer in range(self._h.layers):
            self._attend(layer, batch, places)
            rms_rows(
                self.x, self._h.d_model, self._ffn_norm[layer], np.float32(self._h.eps), count,
                self._h.d_model, self._normed.x,
            )  # fmt: skip
            self._normed.changed()
            if layer < self._h.dense_layers:
                add_rows(self.x, self._feed_forward(layer, count), count, self._h.d_model)
            else:
                mixture(layer, self._normed, count, self.x, lambda at=layer: self._feed_forward(at, count))  # type: ignore[misc]
        return self.x[:count]

    def logits(self, rows: npt.NDArray[np.int32], out: npt.NDArray[np.float32]) -> None:
        """Write the logits of the hidden states `rows` to `out` (len(rows), padded vocabulary)."""
        count = len(rows)
        picked = np.ascontiguousarray(self.x[rows])
        rms_rows(
            picked, self._h.d_model, self._output_norm, np.float32(self._h.eps), count, self._h.d_model,
            self._normed.x,
        )  # fmt: skip
        self._normed.changed()
        self._output.apply(self._normed, self._one_head, count, out)

    @property
    def padded_vocabulary(self) -> int:
        """Width of a row of logits."""
        return self._output.padded

    def _embed(self, ids: npt.NDArray[np.int32]) -> None:
        raw = np.ascontiguousarray(self._embedding_rows[ids])
        self.x[: len(ids)] = dequantize(self._embedding.type, raw.reshape(-1), (len(ids), self._h.d_model))

    def _cache_places(self, batch: TokenBatch) -> npt.NDArray[np.int64]:
        size = self._streams.shape.block_size
        blocks = self._streams.tables[batch.streams, batch.positions // size].astype(np.int64)
        return blocks * size + batch.positions % size

    def _feed_forward(self, layer: int, count: int) -> npt.NDArray[np.float32]:
        ffn = self._ffn[layer]
        if ffn is None:
            self._out[:count] = 0.0
        else:
            ffn.apply(self._normed, self._one_head, count, self._out)
        return self._out

    def _queries(self, a: _Attention, count: int) -> None:
        """Compute the heads' queries from the normed input: q_b(rms(q_a h)) or q h."""
        if a.q_a is None or a.q_a_norm is None:
            a.q_b.apply(self._normed, self._one_head, count, self._q)
            return
        a.q_a.apply(self._normed, self._one_head, count, self._low)
        rms_rows(
            self._low, self._h.q_rank, a.q_a_norm, np.float32(self._h.eps), count, self._h.q_rank,
            self._q_low.x,
        )  # fmt: skip
        self._q_low.changed()
        a.q_b.apply(self._q_low, self._one_head, count, self._q)

    def _attend(self, layer: int, batch: TokenBatch, places: npt.NDArray[np.int64]) -> None:
        """x += attn_output(attention(rms(x))) for all tokens; appends to this layer's cache."""
        h, a, count = self._h, self._attention[layer], len(batch.ids)
        eps = np.float32(h.eps)
        rms_rows(self.x, h.d_model, a.norm, eps, count, h.d_model, self._normed.x)
        self._normed.changed()
        self._queries(a, count)
        a.kv_a.apply(self._normed, self._one_head, count, self._kv)
        head = h.nope + h.rope
        q, kv = self._q.reshape(-1), self._kv.reshape(-1)
        rope_pairs(
            q,
            h.nope,
            h.heads * head,
            h.heads,
            head,
            h.rope // 2,
            batch.positions,
            self._cosine,
            self._sine,
            count,
        )
        rope_pairs(
            kv, h.kv_rank, h.cache_width, 1, 0, h.rope // 2, batch.positions, self._cosine, self._sine, count
        )
        rms_rows(self._kv, h.cache_width, a.kv_a_norm, eps, count, h.kv_rank, self._latent)
        layer_at = layer * self._streams.shape.layer_nbytes
        store_latent(
            self._latent, kv, h.kv_rank, h.cache_width, h.kv_rank, h.cache_width, places, count,
            self._streams.kv, layer_at,
        )  # fmt: skip
        self._q_nope.x[: count * h.heads] = self._q[:count].reshape(count * h.heads, head)[:, : h.nope]
        self._q_nope.changed()
        a.k_b.apply(self._q_nope, self._head_index, count, self._q_latent)
        latent_attention(
            self._dense.crew.board, self._attention_job, self._q_latent, q, h.nope, h.heads * head, head,
            h.heads, h.kv_rank, h.cache_width, np.float32(1.0 / np.sqrt(head)), self._streams.kv, layer_at,
            self._streams.tables, batch.streams, batch.positions, self._streams.shape.block_size, count,
            self._scratch, self._places, self._context.x,
        )  # fmt: skip
        self._context.changed()
        a.v_b.apply(self._context, self._head_index, count, self._values.x)
        self._values.changed()
        a.output.apply(self._values, self._one_head, count, self._out)
        add_rows(self.x, self._out, count, h.d_model)
