"""A tiny random model for every model family: metadata and float32 tensors as llama.cpp names them.

The models have the traits of their family (3 layers, 8 experts of which 2 work) and sizes that let every
block format be used. Not here: writing files (`tiny_files`), other programs' view of them (`references`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from .draw import Draw, Floats

LAYERS: Final = 3
WIDTH: Final = 256
VOCAB: Final = 288
EXPERTS: Final = 8
USED: Final = 2
CONTEXT: Final = 256
EPS: Final = 0.01
"""Of the norms; large, so that it shows."""
DEEPSEEK_EPS: Final = 1e-6
"""What transformers' DeepSeek uses for the norms of its low ranks whatever the configuration says."""

Value = int | float | bool | str


@dataclass(frozen=True)
class Tiny:
    """A model: `keys` without the architecture's prefix, `tensors` in float32 and numpy's order."""

    name: str
    arch: str
    keys: Mapping[str, Value]
    tensors: Mapping[str, Floats]


def _keys(heads: int, kv_heads: int, head: int, base: float, **more: Value) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "vocab_size": VOCAB,
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": EPS,
        "rope.dimension_count": head,
        "rope.freq_base": base,
    }
    return {**keys, **{name.replace("__", "."): value for name, value in more.items()}}


def _moe_keys(inner: int, **more: Value) -> dict[str, Value]:
    return {"expert_count": EXPERTS, "expert_used_count": USED, "expert_feed_forward_length": inner, **more}


def _yarn_keys(factor: float, original: int, **more: Value) -> dict[str, Value]:
    keys: dict[str, Value] = {"type": "yarn", "factor": factor, "original_context_length": original, **more}
    return {f"rope.scaling.{name}": value for name, value in keys.items()}


def _mtp(draw: Draw, layer: int) -> None:
    """Add what a block for predicting further tokens has besides a layer's tensors."""
    block = f"blk.{layer}.nextn."
    draw.matrix(block + "eh_proj", WIDTH, 2 * WIDTH)
    for norm in ("enorm", "hnorm", "shared_head_norm"):
        draw.norm(block + norm, WIDTH)


def _deepseek2(
    name: str, inner: int, *, q_rank: int = 64, sigmoid: bool = True, mtp: int = 0, base: float = 1e4
) -> Tiny:
    """Latent attention, one dense layer, a shared expert; `q_rank` 0: lite. Heads 4: 32 + 16, values 32."""
    heads, nope, rope, value, rank = 4, 32, 16, 32, 64
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH)
    for layer in range(LAYERS + mtp):
        block = f"blk.{layer}."
        draw.norm(block + "attn_norm", WIDTH)
        if q_rank:
            draw.matrix(block + "attn_q_a", q_rank, WIDTH)
            draw.norm(block + "attn_q_a_norm", q_rank)
        draw.matrix(
            block + ("attn_q_b" if q_rank else "attn_q"), heads * (nope + rope), q_rank or WIDTH, gain=1.5
        )
        draw.matrix(block + "attn_kv_a_mqa", rank + rope, WIDTH, gain=1.5)
        draw.norm(block + "attn_kv_a_norm", rank)
        # attn_k_b is the transpose of the keys' half of what other programs keep as attn_kv_b.
        draw.add(block + "attn_k_b.weight", heads, rank, nope, std=1.5 / float(np.sqrt(rank)))
        draw.matrix(block + "attn_v_b", heads, value, rank)
        draw.matrix(block + "attn_output", WIDTH, heads * value, gain=1.5)
        draw.norm(block + "ffn_norm", WIDTH)
        if layer == 0:
            draw.ffn(layer, WIDTH, 256)
            continue
        draw.experts(layer, WIDTH, inner, EXPERTS, router=1.5 if sigmoid else 3.0)
        draw.ffn(layer, WIDTH, inner, "_shexp")
        if sigmoid:
            draw.add(block + "exp_probs_b.bias", EXPERTS, std=0.2)
        if layer >= LAYERS:
            _mtp(draw, layer)
    keys = _keys(heads, 1, rank + rope, base, rope__dimension_count=rope, feed_forward_length=256)
    keys |= {"attention.value_length": rank, "attention.kv_lora_rank": rank}
    keys |= {"attention.layer_norm_rms_epsilon": DEEPSEEK_EPS}
    keys |= {"attention.key_length_mla": nope + rope, "attention.value_length_mla": value}
    keys |= _moe_keys(inner, expert_shared_count=1, leading_dense_block_count=1)
    keys |= {"expert_weights_norm": sigmoid, "expert_weights_scale": 1.8 if sigmoid else 1.0}
    keys |= {"expert_gating_func": 2 if sigmoid else 1, "attention.q_lora_rank": q_rank}
    if mtp:
        keys |= {"block_count": LAYERS + mtp, "nextn_predict_layers": mtp}
    return Tiny(name, "deepseek2", keys, draw.tensors)


def _deepseek_lite(name: str, inner: int) -> Tiny:
    """No low rank for queries, softmax, yarn as V2's: 0.707 for both of its scales."""
    tiny = _deepseek2(name, inner, q_rank=0, sigmoid=False)
    yarn = _yarn_keys(40.0, 32, yarn_log_multiplier=0.0707)
    return Tiny(name, tiny.arch, {**tiny.keys, **yarn}, tiny.tensors)


def _deepseek_v3(name: str, inner: int) -> Tiny:
    """Expert groups, yarn with its attention scale, a block for further tokens."""
    tiny = _deepseek2(name, inner, mtp=1)
    more = {"expert_group_count": 4, "expert_group_used_count": 2}
    return Tiny(
        name, tiny.arch, {**tiny.keys, **more, **_yarn_keys(40.0, 32, yarn_log_multiplier=0.1)}, tiny.tensors
    )


def _deepseek_legacy(name: str, inner: int) -> Tiny:
    """Files from before attn_kv_b was split: keys and values unpacked for every head."""
    tiny = _deepseek2(name, inner, sigmoid=False)
    keys, tensors = dict(tiny.keys), dict(tiny.tensors)
    heads = int(keys["attention.head_count"])
    keys |= {"attention.head_count_kv": heads}
    keys |= {"attention.key_length": keys.pop("attention.key_length_mla")}
    keys |= {"attention.value_length": keys.pop("attention.value_length_mla")}
    for layer in range(LAYERS):
        k_b, v_b = (tensors.pop(f"blk.{layer}.attn_{part}_b.weight") for part in "kv")
        tensors[f"blk.{layer}.attn_kv_b.weight"] = merged_kv_b(k_b, v_b)
    return Tiny(name, tiny.arch, keys, tensors)


def merged_kv_b(k_b: Floats, v_b: Floats) -> Floats:
    """Return attn_kv_b (heads * (nope + value), rank) of attn_k_b (heads, rank, nope) and attn_v_b."""
    both = np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1)
    return np.ascontiguousarray(both.reshape(-1, both.shape[-1]))


def _qwen3moe(name: str, inner: int) -> Tiny:
    """A norm for each head's query and key; heads * head size is not the width."""
    heads, kv_heads, head = 4, 2, 32
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH)
    for layer in range(LAYERS):
        draw.attention(layer, WIDTH, heads, kv_heads, head)
        draw.norm(f"blk.{layer}.attn_q_norm", head)
        draw.norm(f"blk.{layer}.attn_k_norm", head)
        draw.norm(f"blk.{layer}.ffn_norm", WIDTH)
        draw.experts(layer, WIDTH, inner, EXPERTS)
    keys = _keys(heads, kv_heads, head, 1e6, feed_forward_length=256) | _moe_keys(inner)
    return Tiny(name, "qwen3moe", keys, draw.tensors)


def _qwen2moe(name: str, inner: int) -> Tiny:
    """Biases of query, key and value; a shared expert with a gate; weights not normalised."""
    heads, kv_heads, head = 8, 2, 32
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH)
    for layer in range(LAYERS):
        draw.attention(layer, WIDTH, heads, kv_heads, head, biases=("attn_q", "attn_k", "attn_v"))
        draw.norm(f"blk.{layer}.ffn_norm", WIDTH)
        draw.experts(layer, WIDTH, inner, EXPERTS)
        draw.ffn(layer, WIDTH, 2 * inner, "_shexp")
        draw.matrix(f"blk.{layer}.ffn_gate_inp_shexp", WIDTH, gain=2.0)
    keys = _keys(heads, kv_heads, head, 1e6, feed_forward_length=256)
    keys |= _moe_keys(inner, expert_shared_feed_forward_length=2 * inner)
    return Tiny(name, "qwen2moe", keys, draw.tensors)


def _olmoe(name: str, inner: int) -> Tiny:
    """Norms over all heads' queries and keys at once; weights not normalised."""
    heads, head = 8, 32
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH)
    for layer in range(LAYERS):
        draw.attention(layer, WIDTH, heads, heads, head)
        draw.norm(f"blk.{layer}.attn_q_norm", heads * head)
        draw.norm(f"blk.{layer}.attn_k_norm", heads * head)
        draw.norm(f"blk.{layer}.ffn_norm", WIDTH)
        draw.experts(layer, WIDTH, inner, EXPERTS)
    keys = _keys(heads, heads, head, 1e4, feed_forward_length=inner) | _moe_keys(inner)
    del keys["expert_feed_forward_length"]
    return Tiny(name, "olmoe", keys, draw.tensors)


def _llama(name: str, inner: int) -> Tiny:
    """Dense, grouped queries, tied head, rotation slowed by factors in a tensor as Llama 3.1 has them."""
    heads, kv_heads, head = 8, 2, 32
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH, tied=True)
    for layer in range(LAYERS):
        draw.attention(layer, WIDTH, heads, kv_heads, head)
        draw.norm(f"blk.{layer}.ffn_norm", WIDTH)
        draw.ffn(layer, WIDTH, inner)
    draw.tensors["rope_freqs.weight"] = llama3_factors(head, 1e4, **LLAMA3)
    return Tiny(name, "llama", _keys(heads, kv_heads, head, 1e4, feed_forward_length=inner), draw.tensors)


LLAMA3: Final = {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 64.0}


def llama3_factors(
    head: int, base: float, *, factor: float, low: float, high: float, original: float
) -> Floats:
    """Return by what Llama 3.1 divides each frequency: 1 for fast ones, `factor` for slow ones."""
    wavelength = 2 * np.pi * base ** (np.arange(0, head, 2) / head)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    factors = 1 / ((1 - smooth) / factor + smooth)
    return factors.round(6).astype(np.float32)  # powers differ in the last bit between machines


def _mixtral(name: str, inner: int) -> Tiny:
    """The architecture of Llama with experts."""
    heads, kv_heads, head = 8, 2, 32
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH)
    for layer in range(LAYERS):
        draw.attention(layer, WIDTH, heads, kv_heads, head)
        draw.norm(f"blk.{layer}.ffn_norm", WIDTH)
        draw.experts(layer, WIDTH, inner, EXPERTS)
    keys = _keys(heads, kv_heads, head, 1e6, feed_forward_length=inner) | _moe_keys(inner)
    del keys["expert_feed_forward_length"]
    return Tiny(name, "llama", keys, draw.tensors)


def _granitemoe(name: str, inner: int, *, shared: bool = False) -> Tiny:
    """Scales of embedding, residual, attention and logits; tied head."""
    heads, kv_heads, head = 8, 2, 32
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH, tied=True)
    for layer in range(LAYERS):
        draw.attention(layer, WIDTH, heads, kv_heads, head)
        draw.norm(f"blk.{layer}.ffn_norm", WIDTH)
        draw.experts(layer, WIDTH, inner, EXPERTS)
        if shared:
            draw.ffn(layer, WIDTH, 2 * inner, "_shexp")
    keys = _keys(heads, kv_heads, head, 1e4, feed_forward_length=inner) | _moe_keys(inner)
    del keys["expert_feed_forward_length"]
    keys |= {"embedding_scale": 6.0, "residual_scale": 0.7, "attention.scale": 0.125, "logit_scale": 1.5}
    if shared:
        keys["expert_shared_feed_forward_length"] = 2 * inner
    return Tiny(name, "granitemoe", keys, draw.tensors)


def _gpt_oss(name: str, inner: int, base: float) -> Tiny:
    """Sinks, a window in every second layer (the first one too), biases everywhere, yarn."""
    heads, kv_heads, head = 8, 2, 64
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        biases = ("attn_q", "attn_k", "attn_v", "attn_output")
        draw.attention(layer, WIDTH, heads, kv_heads, head, biases=biases)
        draw.add(block + "attn_sinks.weight", heads, mean=1.0, std=1.0)
        draw.norm(block + "post_attention_norm", WIDTH)
        # A gain of 3: some of the values reach the clamp at 7.
        draw.experts(layer, WIDTH, inner, EXPERTS, gain=3.0)
        draw.add(block + "ffn_gate_inp.bias", EXPERTS, std=0.5)
        for part, rows in (("gate", inner), ("up", inner), ("down", WIDTH)):
            draw.add(f"{block}ffn_{part}_exps.bias", EXPERTS, rows, std=0.5)
    keys = _keys(heads, kv_heads, head, base, feed_forward_length=inner) | _moe_keys(inner)
    keys |= {"attention.sliding_window": 16} | _yarn_keys(32.0, 64)
    return Tiny(name, "gpt-oss", keys, draw.tensors)


def _glm4moe(name: str, inner: int, *, normed: bool = False) -> Tiny:
    """Half of each head rotated, biases, a dense first layer, an expert for all, a block to ignore."""
    heads, kv_heads, head = 4, 2, 32
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH)
    for layer in range(LAYERS + 1):
        block = f"blk.{layer}."
        draw.attention(layer, WIDTH, heads, kv_heads, head, biases=("attn_q", "attn_k", "attn_v"))
        if normed:
            draw.norm(block + "attn_q_norm", head)
            draw.norm(block + "attn_k_norm", head)
        draw.norm(block + "post_attention_norm", WIDTH)
        if layer == 0:
            draw.ffn(layer, WIDTH, 256)
            continue
        draw.experts(layer, WIDTH, inner, EXPERTS, router=1.5)
        draw.ffn(layer, WIDTH, inner, "_shexp")
        draw.add(block + "exp_probs_b.bias", EXPERTS, std=0.2)
    _mtp(draw, LAYERS)
    keys = _keys(heads, kv_heads, head, 1e6, feed_forward_length=256, rope__dimension_count=head // 2)
    keys |= _moe_keys(inner, expert_shared_count=1, leading_dense_block_count=1, expert_gating_func=2)
    keys |= {"expert_weights_norm": True, "expert_weights_scale": 2.5}
    keys |= {"block_count": LAYERS + 1, "nextn_predict_layers": 1}
    return Tiny(name, "glm4moe", keys, draw.tensors)


def _bitnet(name: str, inner: int) -> Tiny:
    """A second norm before each part's last projection, tied head."""
    heads, kv_heads, head = 8, 2, 32
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH, tied=True)
    for layer in range(LAYERS):
        draw.attention(layer, WIDTH, heads, kv_heads, head)
        draw.norm(f"blk.{layer}.attn_sub_norm", WIDTH)
        draw.norm(f"blk.{layer}.ffn_norm", WIDTH)
        draw.ffn(layer, WIDTH, inner)
        draw.norm(f"blk.{layer}.ffn_sub_norm", inner)
    keys = _keys(heads, kv_heads, head, 5e5, feed_forward_length=inner)
    keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}
    return Tiny(name, name, keys, draw.tensors)


def _qwen(name: str, inner: int, *, biased: bool, normed: bool) -> Tiny:
    """Dense: Qwen 2 with biases and a tied head, Qwen 3 with a norm for each head's query and key."""
    heads, kv_heads, head = 8, 2, 32
    draw = Draw(name)
    draw.ends(VOCAB, WIDTH, tied=biased)
    for layer in range(LAYERS):
        biases = ("attn_q", "attn_k", "attn_v") if biased else ()
        draw.attention(layer, WIDTH, heads, kv_heads, head, biases=biases)
        if normed:
            draw.norm(f"blk.{layer}.attn_q_norm", head)
            draw.norm(f"blk.{layer}.attn_k_norm", head)
        draw.norm(f"blk.{layer}.ffn_norm", WIDTH)
        draw.ffn(layer, WIDTH, inner)
    return Tiny(name, name, _keys(heads, kv_heads, head, 1e6, feed_forward_length=inner), draw.tensors)


_BUILDERS: Final[Mapping[str, Callable[[str, int], Tiny]]] = {
    "deepseek2-glm": lambda name, inner: _deepseek2(name, inner, base=1e6),
    "deepseek2-lite": _deepseek_lite,
    "deepseek2-v3": _deepseek_v3,
    "deepseek2-legacy": _deepseek_legacy,
    "qwen3moe": _qwen3moe,
    "qwen2moe": _qwen2moe,
    "olmoe": _olmoe,
    "llama": _llama,
    "llama-moe": _mixtral,
    "granitemoe": _granitemoe,
    "granitemoe-shared": lambda name, inner: _granitemoe(name, inner, shared=True),
    # The model mixes frequencies between pairs 0 and x, llama.cpp between 0 and the next whole number:
    # x is 6.99998 with the first base, so that both agree, and 6.23 with the second one.
    "gpt-oss": lambda name, inner: _gpt_oss(name, inner, 40552.13),
    "gpt-oss-between": lambda name, inner: _gpt_oss(name, inner, 150000.0),
    "glm4moe": _glm4moe,
    "glm4moe-normed": lambda name, inner: _glm4moe(name, inner, normed=True),
    "bitnet-b1.58": _bitnet,
    "bitnet": _bitnet,
    "qwen2": lambda name, inner: _qwen(name, inner, biased=True, normed=False),
    "qwen3": lambda name, inner: _qwen(name, inner, biased=False, normed=True),
}
NAMES: Final = tuple(_BUILDERS)


def tiny_model(name: str, inner: int | None = None) -> Tiny:
    """Return the model `name` of NAMES; `inner`: the size of an expert (a dense model's feed-forward part).

    The default keeps files small; rows of 256 are for types with blocks of 256.
    """
    dense = name in ("llama", "bitnet", "bitnet-b1.58", "qwen2", "qwen3")
    return _BUILDERS[name](name, inner or (256 if dense else 32))


def calmer(tiny: Tiny) -> Tiny:
    """Return the model with a third of its head (or of the embedding tied to it) and half of what layers add.

    A random model is sensitive: the error of 0.4 % of activations held in 8 bits moves its logits by as
    much as 0.2. Where two programs round differently, only a model more like a trained one can be compared.
    """
    head = "output.weight" if "output.weight" in tiny.tensors else "token_embd.weight"
    factors = {name: 0.5 for name in tiny.tensors if "attn_output.weight" in name or "ffn_down" in name}
    factors[head] = 1 / 3
    tensors = {name: each * np.float32(factors.get(name, 1.0)) for name, each in tiny.tensors.items()}
    return replace(tiny, tensors=tensors)
