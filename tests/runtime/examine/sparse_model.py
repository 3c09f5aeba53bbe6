"""Writes model files of any size that take no room on the disk: a true header over zeros. No test in here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from sterna.runtime.config import embedded_model

Type = GGMLQuantizationType


def write_flash(
    path: Path,
    *,
    layers: int = 8,
    experts: int = 64,
    expert_type: Type = Type.TQ2_0,
    vocab: int | None = None,
    other: Mapping[int, Type] | None = None,
) -> Path:
    """Write a model with the sizes of GLM-4.7-Flash; experts of type `expert_type`, attention is Q8_0.

    layers: 47 is the whole of it, some 9 GB ternary and 18 GB as Q4_K; other: the type of some layers'
    experts. The vocabulary is the embedded model's, and `vocab` may only widen the matrices.
    """
    reader = GGUFReader(embedded_model())
    writer = GGUFWriter(path, "deepseek2")
    sizes = {
        "block_count": layers, "embedding_length": 2048, "feed_forward_length": 10_240,
        "attention.head_count": 20, "attention.head_count_kv": 1, "attention.q_lora_rank": 768,
        "attention.kv_lora_rank": 512, "rope.dimension_count": 64, "attention.key_length": 576,
        "attention.value_length": 512, "attention.key_length_mla": 256, "attention.value_length_mla": 256,
        "leading_dense_block_count": 1, "expert_count": experts, "expert_used_count": 4,
        "expert_shared_count": 1, "expert_feed_forward_length": 1536, "context_length": 202_752,
    }  # fmt: skip
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        short = field.name.removeprefix("deepseek2.")
        value = sizes.get(short, field.contents())
        sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=sub)
    words = vocab or len(reader.fields["tokenizer.ggml.tokens"].data)
    total = 0
    for name, shape, stored in _tensors(
        layers, experts, words, lambda layer: (other or {}).get(layer, expert_type)
    ):
        total += _add(writer, name, shape, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    alignment = 32
    os.truncate(path, -(-path.stat().st_size // alignment) * alignment + total)
    return path


def _add(writer: GGUFWriter, name: str, shape: tuple[int, ...], file_type: Type) -> int:
    block, nbytes = GGML_QUANT_SIZES[file_type]
    count = 1
    for length in shape:
        count *= length
    size = count // block * nbytes
    stored = (*shape[:-1], shape[-1] // block * nbytes)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=file_type)
    return -(-size // 32) * 32


def _tensors(
    layers: int, experts: int, vocab: int, type_of: Callable[[int], Type]
) -> list[tuple[str, tuple[int, ...], Type]]:
    d, ff, wide = 2048, 1536, 10_240
    f32, q8 = Type.F32, Type.Q8_0
    found: list[tuple[str, tuple[int, ...], Type]] = [
        ("token_embd.weight", (vocab, d), q8),
        ("output_norm.weight", (d,), f32),
        ("output.weight", (vocab, d), q8),
    ]
    for layer in range(layers):
        attention = [
            ("attn_norm", (d,), f32), ("attn_q_a", (768, d), q8), ("attn_q_a_norm", (768,), f32),
            ("attn_q_b", (20 * 256, 768), q8), ("attn_kv_a_mqa", (576, d), q8),
            ("attn_kv_a_norm", (512,), f32), ("attn_k_b", (20, 512, 192), q8),
            ("attn_v_b", (20, 256, 512), q8), ("attn_output", (d, 20 * 256), q8), ("ffn_norm", (d,), f32),
        ]  # fmt: skip
        if layer == 0:
            rest = [("ffn_gate", (wide, d), q8), ("ffn_up", (wide, d), q8), ("ffn_down", (d, wide), q8)]
        else:
            stored = type_of(layer)
            rest = [
                ("ffn_gate_inp", (experts, d), f32),
                ("ffn_gate_shexp", (ff, d), q8), ("ffn_up_shexp", (ff, d), q8),
                ("ffn_down_shexp", (d, ff), q8),
                ("ffn_gate_exps", (experts, ff, d), stored), ("ffn_up_exps", (experts, ff, d), stored),
                ("ffn_down_exps", (experts, d, ff), stored),
            ]  # fmt: skip
        found += [(f"blk.{layer}.{name}.weight", shape, stored) for name, shape, stored in attention + rest]
        if layer:
            found.append((f"blk.{layer}.exp_probs_b.bias", (experts,), f32))
    return found
