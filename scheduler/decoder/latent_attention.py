"""Latent attention (MLA; DeepSeek-V2, arXiv:2405.04434, section 2.1), absorbed, for all tokens of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...workers.kernels.crew import job_address
from ...workers.kernels.layers.attention import (
    latent_attention,
    latent_chunk,
    latent_chunk_f32,
)
from ...workers.kernels.layers.norms import rms_rows, rope_pairs, store_latent
from ..arrays import zeros
from ..kv import StreamMemory
from ..model.attention import LatentAttention
from ..model.hyper import Hyperparameters
from .dense import DenseWeights, Linear, Rows
from .token_batch import TokenBatch

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _LatentLayer:
    q_a: Linear | None
    q_a_norm: F32 | None
    q_b: Linear
    kv_a: Linear
    kv_a_norm: F32
    k_b: Linear
    v_b: Linear
    output: Linear


class LatentBlock:
    """Attention of all layers: `attend` takes normed rows and gives what is added to the state."""

    def __init__(
        self,
        h: Hyperparameters,
        a: LatentAttention,
        dense: DenseWeights,
        streams: StreamMemory,
        capacity: int,
        tables: tuple[F32, F32],
    ) -> None:
        self._a = a
        self._eps = np.float32(h.eps)
        self._crew = dense.crew
        self._streams = streams
        self._cosine, self._sine = tables
        self._layers = [self._load(dense, layer) for layer in range(h.layers)]
        threads, context = dense.crew.threads, streams.shape.context
        self._rows = {name: Rows(r.capacity, r.width, threads) for name, r in a.rows(capacity).items()}
        self._q_low, self._q_nope = self._rows["q_low"], self._rows["q_nope"]
        self._context, self._values = self._rows["context"], self._rows["values"]
        made = zeros(a.buffers(capacity, threads, context))
        self._low, self._q, self._q_latent = made["low"], made["q"], made["q_latent"]
        self._kv, self._latent = made["kv"], made["latent"]
        self._scratch, self._offsets = made["scratch"], made["offsets"]
        self._one_head, self._head_index = made["one_head"], made["head_index"]
        self._one_head[0] = np.arange(capacity)
        self._head_index[:] = np.arange(capacity) * a.heads + np.arange(a.heads)[:, None]
        self._job = job_address(latent_chunk if streams.shape.value_nbytes == 2 else latent_chunk_f32)

    def _load(self, dense: DenseWeights, layer: int) -> _LatentLayer:
        a = self._a

        def linear(role: str, heads: int = 1) -> Linear:
            return dense.linear(f"{layer}.{role}", heads)

        return _LatentLayer(
            q_a=linear("attn_q_a") if a.q_rank else None,
            q_a_norm=dense.vector(f"{layer}.attn_q_a_norm") if a.q_rank else None,
            q_b=linear("attn_q_b" if a.q_rank else "attn_q"),
            kv_a=linear("attn_kv_a_mqa"),
            kv_a_norm=dense.vector(f"{layer}.attn_kv_a_norm"),
            k_b=linear("attn_k_b", a.heads),
            v_b=linear("attn_v_b", a.heads),
            output=linear("attn_output"),
        )

    def attend(
        self, layer: int, rows: Rows, batch: TokenBatch, cache_rows: npt.NDArray[np.int64], out: F32
    ) -> None:
        """out[t] = attn_output(attention(rows[t])); appends each token's latent and key to the cache.

        cache_rows: int64 (T,), the tokens' rows in a layer's cache; out: float32 (capacity, d_model).
        """
        a, w, count = self._a, self._layers[layer], len(batch.ids)
        layer_at = layer * self._streams.shape.layer_nbytes
        self._queries(w, rows, count)
        w.kv_a.apply(rows, self._one_head, count, self._kv)
        self._rotate_and_store(w, batch, cache_rows, layer_at)
        head = a.nope + a.rope
        self._q_nope.x[: count * a.heads] = self._q[:count].reshape(count * a.heads, head)[:, : a.nope]
        self._q_nope.changed()
        w.k_b.apply(self._q_nope, self._head_index, count, self._q_latent)
        latent_attention(
            self._crew.board, self._job, self._q_latent, self._q.reshape(-1), a.nope, a.heads * head, head,
            a.heads, a.kv_rank, a.cache_width, np.float32(a.scale), self._streams.cache, layer_at,
            self._streams.tables, batch.streams, batch.positions, self._streams.shape.block_size, count,
            self._scratch, self._offsets, self._context.x,
        )  # fmt: skip
        self._context.changed()
        w.v_b.apply(self._context, self._head_index, count, self._values.x)
        self._values.changed()
        w.output.apply(self._values, self._one_head, count, out)

    def _queries(self, w: _LatentLayer, rows: Rows, count: int) -> None:
        """Compute the heads' queries: q_b(rms(q_a h)) or q h."""
        if w.q_a is None or w.q_a_norm is None:
            w.q_b.apply(rows, self._one_head, count, self._q)
            return
        rank = self._a.q_rank
        w.q_a.apply(rows, self._one_head, count, self._low)
        rms_rows(self._low, rank, w.q_a_norm, self._eps, count, rank, self._q_low.x)
        self._q_low.changed()
        w.q_b.apply(self._q_low, self._one_head, count, self._q)

    def _rotate_and_store(
        self, w: _LatentLayer, batch: TokenBatch, cache_rows: npt.NDArray[np.int64], layer_at: int
    ) -> None:
        a, count, positions = self._a, len(batch.ids), batch.positions
        head, half, width = a.nope + a.rope, a.rope // 2, a.cache_width
        q, kv = self._q.reshape(-1), self._kv.reshape(-1)
        rope_pairs(q, a.nope, a.heads * head, a.heads, head, half, positions, self._cosine, self._sine, count)
        rope_pairs(kv, a.kv_rank, width, 1, 0, half, positions, self._cosine, self._sine, count)
        rms_rows(self._kv, width, w.kv_a_norm, self._eps, count, a.kv_rank, self._latent)
        store_latent(
            self._latent, kv, a.kv_rank, width, a.kv_rank, width, cache_rows, count, self._streams.cache,
            layer_at,
        )  # fmt: skip
