"""Latent and grouped attention: their sizes, and all that others ask of either without telling them apart.

No numba. The computation is in `decoder.latent_attention` and `decoder.grouped_attention`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np

from ...shm.layout import Field
from ...workers.kernels.scratch import attention_shapes

Rule = tuple[str, object, bool, str]  # key, found, whether it fits, what was expected

Needed = tuple[Literal["matrix", "vector", "joined"], str, tuple[int, ...]]
"""How a tensor is held, its role, and its shape; of a joined one heads, nope, v_dim and kv_rank."""

_PARTS: Final = re.compile(r"blk\.\d+\.attn_(kv_b|k_b|v_b)\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsShape:
    """Rows of activations that matrices read: how many, how wide, and the roles of the matrices."""

    capacity: int
    width: int
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Sizes of latent attention (MLA), computed absorbed: all heads read one latent of `kv_rank`."""

    heads: int
    q_rank: int
    """Width of the low-rank query, 0 without one."""
    kv_rank: int
    nope: int
    """Values of a head's query and key that are not rotated."""
    rope: int
    """Values that are, behind the others."""
    v_dim: int
    scale: float
    """Factor of the scores."""
    joined: bool = False
    """The file holds k_b and v_b in one `attn_kv_b`, as files written before April 2025 do."""

    inputs: ClassVar[tuple[str, ...]] = ("attn_q_a", "attn_q", "attn_kv_a_mqa")
    """Roles of the matrices that read the normed state."""

    @property
    def cache_width(self) -> int:
        """Values cached per token and layer: latent and rotated key."""
        return self.kv_rank + self.rope

    @property
    def rotated(self) -> int:
        """The most values of a head that may be rotated."""
        return self.rope

    def rules(self) -> Iterator[Rule]:
        """Yield what the kernels need of the sizes."""
        yield "attention.kv_lora_rank", self.kv_rank, multiple(self.kv_rank, 32), "a positive multiple of 32"
        yield "attention.q_lora_rank", self.q_rank, self.q_rank % 16 == 0, "a multiple of 16"
        key = self.nope + self.rope
        yield "attention.key_length_mla", key, multiple(self.nope, 16), "rope + a positive multiple of 16"
        yield (
            "attention.value_length_mla",
            self.v_dim,
            multiple(self.v_dim, 16),
            "a positive multiple of 16",
        )

    def tensors(self, d_model: int) -> Iterator[Needed]:
        """Yield what a layer's attention is made of."""
        query = self.heads * (self.nope + self.rope)
        if self.q_rank:
            yield "matrix", "attn_q_a", (self.q_rank, d_model)
            yield "vector", "attn_q_a_norm", (self.q_rank,)
            yield "matrix", "attn_q_b", (query, self.q_rank)
        else:
            yield "matrix", "attn_q", (query, d_model)
        yield "matrix", "attn_kv_a_mqa", (self.cache_width, d_model)
        yield "vector", "attn_kv_a_norm", (self.kv_rank,)
        if self.joined:
            yield "joined", "attn_kv_b", (self.heads, self.nope, self.v_dim, self.kv_rank)
        else:
            yield "matrix", "attn_k_b", (self.heads, self.kv_rank, self.nope)
            yield "matrix", "attn_v_b", (self.heads, self.v_dim, self.kv_rank)
        yield "matrix", "attn_output", (d_model, self.heads * self.v_dim)

    def spares(self, name: str) -> bool:
        """Return whether the model is the same without that tensor: one of two forms of the same matrices."""
        return _PARTS.fullmatch(name) is not None

    def rows(self, tokens: int) -> dict[str, RowsShape]:
        """Return the rows that its matrices read, for up to `tokens` tokens."""
        t, heads = tokens, self.heads
        return {
            "q_low": RowsShape(capacity=t, width=self.q_rank, readers=("attn_q_b",)),
            "q_nope": RowsShape(capacity=t * heads, width=self.nope, readers=("attn_k_b",)),
            "context": RowsShape(capacity=t * heads, width=self.kv_rank, readers=("attn_v_b",)),
            "values": RowsShape(capacity=t, width=heads * self.v_dim, readers=("attn_output",)),
        }

    def buffers(self, tokens: int, threads: int, context: int) -> tuple[Field, ...]:
        """Return its other arrays."""
        t, heads = tokens, self.heads
        scratch, offsets = attention_shapes(threads, context, self.kv_rank, self.cache_width)
        floats = {
            "low": (t, self.q_rank),
            "q": (t, heads * (self.nope + self.rope)),
            "q_latent": (t, heads * self.kv_rank),
            "kv": (t, self.cache_width),
            "latent": (t, self.kv_rank),
            "scratch": scratch,
        }
        return (
            *(Field(name=name, dtype=np.float32, shape=shape) for name, shape in floats.items()),
            Field(name="one_head", dtype=np.int32, shape=(1, t)),
            Field(name="head_index", dtype=np.int32, shape=(heads, t)),
            Field(name="offsets", dtype=np.int64, shape=offsets),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttention:
    """Sizes of grouped-query attention: heads / kv_heads queries share a key and a value of `head` values."""

    heads: int
    kv_heads: int
    head: int
    scale: float
    """Factor of the scores."""
    windows: tuple[int, ...]
    """For each layer how many positions a token sees, 0 for all."""
    biased: bool = False
    """q, k and v have biases."""
    output_biased: bool = False
    norm: str = ""
    """RMS norm of queries and keys: "head" by head, "row" over all heads, "" none."""
    sinks: bool = False
    """One more logit a head in the softmax, without a value."""
    sub_norm: bool = False
    """RMS norm of what the heads give (bitnet)."""

    inputs: ClassVar[tuple[str, ...]] = ("attn_q", "attn_k", "attn_v")
    """Roles of the matrices that read the normed state."""

    @property
    def cache_width(self) -> int:
        """Values cached per token and layer: keys, then values."""
        return 2 * self.kv_heads * self.head

    @property
    def rotated(self) -> int:
        """The most values of a head that may be rotated."""
        return self.head

    def rules(self) -> Iterator[Rule]:
        """Yield what the kernels need of the sizes."""
        fits = 1 <= self.kv_heads <= self.heads and self.heads % self.kv_heads == 0
        yield "attention.head_count_kv", self.kv_heads, fits, f"a divisor of {self.heads} heads"
        yield "attention.key_length", self.head, multiple(self.head, 16), "a positive multiple of 16"

    def tensors(self, d_model: int) -> Iterator[Needed]:
        """Yield what a layer's attention is made of."""
        widths = {"q": self.heads * self.head, "k": self.kv_heads * self.head, "v": self.kv_heads * self.head}
        for name, width in widths.items():
            yield "matrix", f"attn_{name}", (width, d_model)
            if self.biased:
                yield "vector", f"attn_{name}_bias", (width,)
            if self.norm and name != "v":
                yield "vector", f"attn_{name}_norm", (self.head if self.norm == "head" else width,)
        if self.sinks:
            yield "vector", "attn_sinks", (self.heads,)
        if self.sub_norm:
            yield "vector", "attn_sub_norm", (widths["q"],)
        yield "matrix", "attn_output", (d_model, widths["q"])
        if self.output_biased:
            yield "vector", "attn_output_bias", (d_model,)

    def spares(self, name: str) -> bool:
        """Return whether the model is the same without that tensor: of none that it knows."""
        return False

    def rows(self, tokens: int) -> dict[str, RowsShape]:
        """Return the rows that its matrices read, for up to `tokens` tokens."""
        width = self.heads * self.head
        return {"context": RowsShape(capacity=tokens, width=width, readers=("attn_output",))}

    def buffers(self, tokens: int, threads: int, context: int) -> tuple[Field, ...]:
        """Return its other arrays."""
        scratch, offsets = attention_shapes(threads, context, self.head, self.head)
        floats = {
            "q": (tokens, self.heads * self.head),
            "k": (tokens, self.kv_heads * self.head),
            "v": (tokens, self.kv_heads * self.head),
            "scratch": scratch,
        }
        return (
            *(Field(name=name, dtype=np.float32, shape=shape) for name, shape in floats.items()),
            Field(name="one_head", dtype=np.int32, shape=(1, tokens)),
            Field(name="offsets", dtype=np.int64, shape=offsets),
        )


Attention = LatentAttention | GroupedAttention


def multiple(value: int, of: int) -> bool:
    """Return whether `value` is a positive multiple."""
    return value > 0 and value % of == 0
