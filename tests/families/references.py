"""The tiny models in transformers: their configurations and state dicts, and the logits that it computes.

Needs torch and transformers 5, in float32 on one core; only who regenerates the stored logits has them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from .draw import Floats, tokens
from .tiny_models import CONTEXT, EXPERTS, LAYERS, LLAMA3, USED, VOCAB, WIDTH, Tiny, merged_kv_b

DATA: Final = Path(__file__).parent / "data"
LENGTH: Final = 64
"""How many tokens the models are compared on."""
POSITIONS: Final = (0, 1, 2, 7, 31, 62, 63)
"""Whose logits are stored."""

APART: Final = ("bitnet-b1.58", "gpt-oss-between")
"""What llama.cpp does not know, and where it rounds what the model's own code does not."""

# What each family's class is called and what its layers call the parts; {} stands for the layer.
_CLASSES: Final = {
    "deepseek2-glm": "Glm4MoeLite",
    "deepseek2-lite": "DeepseekV2",
    "deepseek2-v3": "DeepseekV3",
    "deepseek2-legacy": "DeepseekV2",
    "qwen3moe": "Qwen3Moe",
    "qwen2moe": "Qwen2Moe",
    "olmoe": "Olmoe",
    "llama": "Llama",
    "llama-moe": "Mixtral",
    "granitemoe": "GraniteMoe",
    "granitemoe-shared": "GraniteMoeShared",
    "gpt-oss": "GptOss",
    "gpt-oss-between": "GptOss",
    "glm4moe": "Glm4Moe",
    "glm4moe-normed": "Glm4Moe",
    "bitnet-b1.58": "BitNet",
    "bitnet": "BitNet",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
_MODEL_PARTS: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_OTHER_PARTS: Final[Mapping[str, Mapping[str, str]]] = {
    "qwen2moe": {
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    },
    "granitemoe": {"ffn_gate_inp": "block_sparse_moe.router"},
    "granitemoe-shared": {
        "ffn_gate_inp": "block_sparse_moe.router",
        "ffn_down_shexp": "shared_mlp.output_linear",
    },
    "gpt-oss": {"ffn_gate_inp": "mlp.router"},
    "gpt-oss-between": {"ffn_gate_inp": "mlp.router"},
}
_PAIRED: Final = ("llama", "granitemoe")
"""Architectures whose queries and keys llama.cpp keeps with neighbours, not halves, rotated together."""


def transformers_logits(tiny: Tiny, prompt: Sequence[int]) -> Floats:
    """Return (len(prompt), vocabulary) logits of the model with `tiny`'s weights, in one forward pass.

    Skips the test if torch or transformers are not installed.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    prefix = _CLASSES[tiny.name]
    config = getattr(transformers, prefix + "Config")(**_config(tiny), attn_implementation="eager")
    model = getattr(transformers, prefix + "ForCausalLM")(config).float().eval()
    state = {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in state_dict(tiny).items()}
    absent, unknown = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if "output.weight" not in tiny.tensors else []
    assert (absent, unknown) == (tied, []), (absent, unknown)
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.tensor([list(prompt)]), use_cache=False).logits
    return np.asarray(logits[0].numpy(), np.float32)


def _config(tiny: Tiny) -> dict[str, Any]:
    keys = tiny.keys
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys["rope.freq_base"]}
    if keys.get("rope.scaling.type") == "yarn":
        scale = float(keys.get("rope.scaling.yarn_log_multiplier", 0.0)) * 10
        rope |= {"rope_type": "yarn", "factor": keys["rope.scaling.factor"]}
        rope |= {"original_max_position_embeddings": keys["rope.scaling.original_context_length"]}
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0}
        rope |= {"mscale": scale, "mscale_all_dim": scale} if scale else {}
        rope |= {"truncate": False} if tiny.arch == "gpt-oss" else {}  # as the published configurations
    config: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": keys["attention.head_count"],
        "num_key_value_heads": keys["attention.head_count_kv"],
        "intermediate_size": keys["feed_forward_length"],
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tiny.tensors,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    if "expert_count" in keys:
        count = "num_experts" if tiny.arch in ("olmoe", "qwen2moe", "qwen3moe") else "num_local_experts"
        config |= {count: EXPERTS, "num_experts_per_tok": USED}
        config["moe_intermediate_size"] = keys.get("expert_feed_forward_length")
    more = _ARCH_CONFIGS.get(tiny.arch)
    return config if more is None else config | more(tiny)


def _deepseek_config(tiny: Tiny) -> dict[str, Any]:
    keys = tiny.keys
    key_length = keys.get("attention.key_length_mla", keys["attention.key_length"])
    config = {
        "num_key_value_heads": keys["attention.head_count"],
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "q_lora_rank": keys["attention.q_lora_rank"] or None,
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_rope_head_dim": keys["rope.dimension_count"],
        "qk_nope_head_dim": int(key_length) - int(keys["rope.dimension_count"]),
        "v_head_dim": keys.get("attention.value_length_mla", keys["attention.value_length"]),
        "norm_topk_prob": keys["expert_weights_norm"],
        "routed_scaling_factor": keys["expert_weights_scale"],
        "n_group": keys.get("expert_group_count", 1),
        "topk_group": keys.get("expert_group_used_count", 1),
    }
    if _CLASSES[tiny.name] == "Glm4MoeLite":
        return config | {"mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1)}
    return config | {"first_k_dense_replace": 1}


_ARCH_CONFIGS: Final[Mapping[str, Callable[[Tiny], dict[str, Any]]]] = {
    "deepseek2": _deepseek_config,
    "qwen3moe": lambda tiny: {"head_dim": tiny.keys["attention.key_length"], "norm_topk_prob": True},
    "qwen2moe": lambda tiny: {
        "shared_expert_intermediate_size": tiny.keys["expert_shared_feed_forward_length"]
    },
    "llama": lambda tiny: (
        {} if "rope_freqs.weight" not in tiny.tensors else {"rope_parameters": _llama3(tiny)}
    ),
    "granitemoe": lambda tiny: {
        "embedding_multiplier": tiny.keys["embedding_scale"],
        "residual_multiplier": tiny.keys["residual_scale"],
        "attention_multiplier": tiny.keys["attention.scale"],
        "logits_scaling": tiny.keys["logit_scale"],
        "shared_intermediate_size": tiny.keys.get("expert_shared_feed_forward_length", 0),
    },
    "gpt-oss": lambda tiny: {
        "head_dim": tiny.keys["attention.key_length"],
        "sliding_window": tiny.keys["attention.sliding_window"],
    },
    "glm4moe": lambda tiny: {
        "head_dim": tiny.keys["attention.key_length"],
        "attention_bias": True,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tiny.tensors,
        "n_routed_experts": EXPERTS,
        "first_k_dense_replace": 1,
        "norm_topk_prob": tiny.keys["expert_weights_norm"],
        "routed_scaling_factor": tiny.keys["expert_weights_scale"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": tiny.keys["rope.freq_base"],
            "partial_rotary_factor": 0.5,
        },
    },
    "bitnet": lambda tiny: {"hidden_act": "silu"},
    "bitnet-b1.58": lambda tiny: {"hidden_act": "relu2"},
    "qwen3": lambda tiny: {"head_dim": tiny.keys["attention.key_length"]},
}


def _llama3(tiny: Tiny) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": tiny.keys["rope.freq_base"],
        "factor": LLAMA3["factor"],
        "low_freq_factor": LLAMA3["low"],
        "high_freq_factor": LLAMA3["high"],
        "original_max_position_embeddings": int(LLAMA3["original"]),
    }


def state_dict(tiny: Tiny) -> dict[str, Floats]:
    """Return the tensors as transformers names and orders them."""
    parts = {**_LAYER_PARTS, **_OTHER_PARTS.get(tiny.name, {})}
    state: dict[str, Floats] = {}
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        tensors = {
            name[len(prefix) :]: each for name, each in tiny.tensors.items() if name.startswith(prefix)
        }
        state |= {f"model.layers.{layer}.{name}": each for name, each in _layer(tiny, tensors, parts)}
    for name, each in tiny.tensors.items():
        part, _, suffix = name.rpartition(".")
        if part in _MODEL_PARTS:
            state[f"{_MODEL_PARTS[part]}.{suffix}"] = each
    return state


def _layer(tiny: Tiny, tensors: dict[str, Floats], parts: Mapping[str, str]) -> list[tuple[str, Floats]]:
    """Return one layer's tensors; those that are merged or split are taken out of `tensors`."""
    done: list[tuple[str, Floats]] = []
    if "attn_k_b.weight" in tensors:
        merged = merged_kv_b(tensors.pop("attn_k_b.weight"), tensors.pop("attn_v_b.weight"))
        done.append(("self_attn.kv_b_proj.weight", merged))
    if "exp_probs_b.bias" in tensors:
        done.append(("mlp.gate.e_score_correction_bias", tensors.pop("exp_probs_b.bias")))
    if "attn_sinks.weight" in tensors:
        done.append(("self_attn.sinks", tensors.pop("attn_sinks.weight")))
    if "ffn_gate_exps.weight" in tensors:
        done += _experts(tiny, tensors)
    if tiny.name == "granitemoe-shared":
        both = [tensors.pop("ffn_gate_shexp.weight"), tensors.pop("ffn_up_shexp.weight")]
        done.append(("shared_mlp.input_linear.weight", np.concatenate(both)))
    for name, each in tensors.items():
        part, _, suffix = name.rpartition(".")
        if part == "ffn_gate_inp_shexp":
            each = each[None]
        if tiny.arch in _PAIRED and part in ("attn_q", "attn_k"):
            each = _halves(each, int(tiny.keys["attention.key_length"]))
        done.append((f"{parts[part]}.{suffix}", each))
    return done


def _experts(tiny: Tiny, tensors: dict[str, Floats]) -> list[tuple[str, Floats]]:
    gate, up, down = (tensors.pop(f"ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
    if tiny.arch != "gpt-oss":
        merged = np.concatenate([gate, up], axis=1)
        where = "block_sparse_moe" if tiny.arch == "granitemoe" else "mlp"
        return [(f"{where}.experts.gate_up_proj", merged), (f"{where}.experts.down_proj", down)]
    # Gate and up take turns, and a matrix's rows are the inputs.
    biases = [tensors.pop(f"ffn_{part}_exps.bias") for part in ("gate", "up")]
    turns = np.stack([gate, up], axis=2).reshape(EXPERTS, -1, WIDTH)
    return [
        ("mlp.experts.gate_up_proj", turns.transpose(0, 2, 1)),
        ("mlp.experts.gate_up_proj_bias", np.stack(biases, axis=2).reshape(EXPERTS, -1)),
        ("mlp.experts.down_proj", down.transpose(0, 2, 1)),
        ("mlp.experts.down_proj_bias", tensors.pop("ffn_down_exps.bias")),
    ]


def _halves(rows: Floats, head: int) -> Floats:
    """Return rows (heads * head, width) with each head's even rows first, then its odd ones."""
    return rows.reshape(-1, head // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def fingerprint(tiny: Tiny) -> int:
    """Return a number that changes with the model's keys, tensors or tokens."""
    keys = (tiny.arch, sorted(tiny.keys.items()), tokens(tiny.name, LENGTH))
    check = zlib.crc32(repr(keys).encode())
    for name, values in sorted(tiny.tensors.items()):
        check = zlib.crc32(np.ascontiguousarray(values).tobytes(), zlib.crc32(name.encode(), check))
    return check


def store_logits(tiny: Tiny, logits: Floats) -> None:
    """Store the logits of POSITIONS, for `stored_logits`."""
    part = logits[list(POSITIONS)]
    np.savez_compressed(DATA / f"{tiny.name}.npz", logits=part, fingerprint=np.uint32(fingerprint(tiny)))


def stored_logits(tiny: Tiny) -> Floats:
    """Return the logits of POSITIONS as transformers computed them, (len(POSITIONS), VOCAB).

    Raises ValueError if they are those of another model of that name.
    """
    with np.load(DATA / f"{tiny.name}.npz") as stored:
        if int(stored["fingerprint"]) != fingerprint(tiny):
            raise ValueError(f"{tiny.name} has changed: store its logits anew (test_references.py)")
        return np.asarray(stored["logits"], np.float32)
