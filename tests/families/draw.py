"""Seeded random tensors under their GGUF names: the parts that families of tiny models share.

In numpy's order (rows, columns) = (outputs, inputs). Not here: which family has which parts.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def uniform(seed: str, size: int) -> npt.NDArray[np.float64]:
    """Return `size` numbers in [-sqrt 3, sqrt 3): mean 0, variance 1, the same for ever.

    Only the raw words of a bit generator are promised to stay the same in later numpy.
    """
    words = np.random.PCG64(zlib.crc32(seed.encode())).random_raw(size)
    unit = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.asarray((unit - 0.5) * np.sqrt(12.0))


def tokens(name: str, count: int = 64) -> list[int]:
    """Return the token ids, bytes all, on which the model `name` is compared."""
    return [int(each) for each in (uniform(f"tokens of {name}", count) / np.sqrt(12.0) + 0.5) * 256]


class Draw:
    """Collects the tensors of one model; every tensor depends on the model's seed and its own name only."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self.tensors: dict[str, Floats] = {}

    def add(self, name: str, *shape: int, mean: float = 0.0, std: float) -> None:
        """Add a tensor with this mean and standard deviation."""
        values = uniform(f"{self._seed}/{name}", int(np.prod(shape)))
        self.tensors[name] = (mean + std * values).astype(np.float32).reshape(shape)

    def matrix(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Add a matrix (or stack of them) that turns inputs of variance 1 into outputs of gain^2."""
        self.add(f"{name}.weight", *shape, std=gain / float(np.sqrt(shape[-1])))

    def norm(self, name: str, size: int) -> None:
        """Add the weights of an RMS norm: around 1, not equal."""
        self.add(f"{name}.weight", size, mean=1.0, std=0.2)

    def ends(self, vocab: int, width: int, *, tied: bool = False) -> None:
        """Add embedding, last norm and, unless `tied`, head: logits of standard deviation 3."""
        self.add("token_embd.weight", vocab, width, std=3 / float(np.sqrt(width)) if tied else 1.0)
        self.norm("output_norm", width)
        if not tied:
            self.matrix("output", vocab, width, gain=3.0)

    def attention(
        self, layer: int, width: int, heads: int, kv_heads: int, head: int, *, biases: tuple[str, ...] = ()
    ) -> None:
        """Add the norm and the four projections of grouped attention, with the named projections' biases."""
        block = f"blk.{layer}."
        self.norm(block + "attn_norm", width)
        sizes = {"attn_q": heads * head, "attn_k": kv_heads * head, "attn_v": kv_heads * head}
        for name, rows in sizes.items():
            self.matrix(block + name, rows, width, gain=1.0 if name == "attn_v" else 1.5)
        self.matrix(block + "attn_output", width, heads * head, gain=1.5)
        for name in biases:
            self.add(f"{block}{name}.bias", {**sizes, "attn_output": width}[name], std=0.5)

    def ffn(self, layer: int, width: int, inner: int, suffix: str = "") -> None:
        """Add a gated feed-forward part; `suffix` is "_shexp" for a shared expert."""
        block = f"blk.{layer}."
        self.matrix(f"{block}ffn_gate{suffix}", inner, width, gain=1.5)
        self.matrix(f"{block}ffn_up{suffix}", inner, width)
        self.matrix(f"{block}ffn_down{suffix}", width, inner, gain=1.5)

    def experts(
        self, layer: int, width: int, inner: int, count: int, *, router: float = 3.0, gain: float = 1.5
    ) -> None:
        """Add a router with logits of standard deviation `router` and `count` routed experts."""
        block = f"blk.{layer}."
        self.matrix(block + "ffn_gate_inp", count, width, gain=router)
        self.matrix(block + "ffn_gate_exps", count, inner, width, gain=gain)
        self.matrix(block + "ffn_up_exps", count, inner, width, gain=gain)
        self.matrix(block + "ffn_down_exps", count, width, inner, gain=1.5)
