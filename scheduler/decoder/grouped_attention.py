"""Grouped-query attention, with what families vary: biases, norms, sinks, windows, partial rotation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...workers.kernels.crew import job_address
from ...workers.kernels.layers.attention import (
    grouped_attention,
    grouped_chunk,
    grouped_chunk_f32,
)
from ...workers.kernels.layers.norms import add_vector, rms_rows, rope_halves, rope_pairs, store_latent
from ..arrays import zeros
from ..kv import StreamMemory
from ..model.attention import GroupedAttention
from ..model.hyper import Hyperparameters
from .dense import DenseWeights, Linear, Rows
from .token_batch import TokenBatch

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Projection:
    """Queries, keys or values: matrix, and bias and norm where the model has them."""

    matrix: Linear
    bias: F32 | None
    norm: F32 | None


@dataclass(frozen=True, slots=True)
class _GroupedLayer:
    q: _Projection
    k: _Projection
    v: _Projection
    sinks: F32
    sub_norm: F32 | None
    output: Linear
    output_bias: F32 | None


class GroupedBlock:
    """Attention of all layers: `attend` takes normed rows and gives what is added to the state."""

    def __init__(
        self,
        h: Hyperparameters,
        a: GroupedAttention,
        dense: DenseWeights,
        streams: StreamMemory,
        capacity: int,
        tables: tuple[F32, F32],
    ) -> None:
        self._a = a
        self._d_model = h.d_model
        self._eps = np.float32(h.eps)
        self._rotation = h.rotation
        self._crew = dense.crew
        self._streams = streams
        self._cosine, self._sine = tables
        self._layers = [self._load(dense, layer) for layer in range(h.layers)]
        threads, context = dense.crew.threads, streams.shape.context
        self._rows = {name: Rows(r.capacity, r.width, threads) for name, r in a.rows(capacity).items()}
        self._context = self._rows["context"]
        made = zeros(a.buffers(capacity, threads, context))
        self._q, self._k, self._v = made["q"], made["k"], made["v"]
        self._scratch, self._offsets, self._one_head = made["scratch"], made["offsets"], made["one_head"]
        self._one_head[0] = np.arange(capacity)
        self._job = job_address(grouped_chunk if streams.shape.value_nbytes == 2 else grouped_chunk_f32)

    def _load(self, dense: DenseWeights, layer: int) -> _GroupedLayer:
        def vector(role: str) -> F32 | None:
            key = f"{layer}.{role}"
            return dense.vector(key) if dense.has(key) else None

        def projection(name: str) -> _Projection:
            matrix = dense.linear(f"{layer}.attn_{name}")
            return _Projection(matrix, vector(f"attn_{name}_bias"), vector(f"attn_{name}_norm"))

        sinks = vector("attn_sinks")
        return _GroupedLayer(
            q=projection("q"),
            k=projection("k"),
            v=projection("v"),
            sinks=np.zeros(0, np.float32) if sinks is None else sinks,
            sub_norm=vector("attn_sub_norm"),
            output=dense.linear(f"{layer}.attn_output"),
            output_bias=vector("attn_output_bias"),
        )

    def attend(
        self, layer: int, rows: Rows, batch: TokenBatch, cache_rows: npt.NDArray[np.int64], out: F32
    ) -> None:
        """out[t] = attn_output(attention(rows[t])); appends each token's keys and values to the cache.

        cache_rows: int64 (T,), the tokens' rows in a layer's cache; out: float32 (capacity, d_model).
        """
        a, w, count = self._a, self._layers[layer], len(batch.ids)
        self._project(w.q, rows, a.heads, count, self._q)
        self._project(w.k, rows, a.kv_heads, count, self._k)
        self._project(w.v, rows, a.kv_heads, count, self._v)
        self._rotate(self._q, a.heads, batch.positions)
        self._rotate(self._k, a.kv_heads, batch.positions)
        cache, width = self._streams.cache, a.kv_heads * a.head
        layer_at = layer * self._streams.shape.layer_nbytes
        store_latent(
            self._k, self._v.reshape(-1), 0, width, width, 2 * width, cache_rows, count, cache, layer_at
        )
        grouped_attention(
            self._crew.board, self._job, self._q, a.heads, a.kv_heads, a.head, np.float32(a.scale),
            a.windows[layer], w.sinks, cache, layer_at, self._streams.tables, batch.streams,
            batch.positions, self._streams.shape.block_size, count, self._scratch, self._offsets,
            self._context.x,
        )  # fmt: skip
        if w.sub_norm is not None:
            x, wide = self._context.x, a.heads * a.head
            rms_rows(x, wide, w.sub_norm, self._eps, count, wide, x)
        self._context.changed()
        w.output.apply(self._context, self._one_head, count, out)
        if w.output_bias is not None:
            add_vector(out, w.output_bias, count, self._d_model)

    def _project(self, w: _Projection, rows: Rows, heads: int, count: int, out: F32) -> None:
        """Compute queries, keys or values of all heads into `out`."""
        width = heads * self._a.head
        w.matrix.apply(rows, self._one_head, count, out)
        if w.bias is not None:
            add_vector(out, w.bias, count, width)
        if w.norm is not None:
            each = len(w.norm)
            rms_rows(out, each, w.norm, self._eps, count * width // each, each, out)

    def _rotate(self, x: F32, heads: int, positions: npt.NDArray[np.int32]) -> None:
        """Rotate the first values of each head in place."""
        head, half, turn = self._a.head, self._rotation.dims // 2, rope_pairs
        if self._rotation.halves:
            turn = rope_halves
        turn(
            x.reshape(-1), 0, heads * head, heads, head, half, positions, self._cosine, self._sine,
            len(positions),
        )  # fmt: skip
