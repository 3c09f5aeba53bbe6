"""Write a random model of GLM-4.7-Flash's shape with ternary experts, to measure memory and paging with.

    python benchmarks/glm_shaped.py OUT.gguf [--layers 8] [--vocabulary 8192] [--flat] [--seed 1]

Eight layers take 1.45 GB, of which the experts 1.09 GB. Speeds, reads and memory are those of a real model of
this shape; what it says means nothing. Two things are made so that measurements resemble real ones:

* The router prefers some experts: `exp_probs_b` is -0.1 ln(rank), ranks shuffled in each layer. With gate
  logits of variance 1 an LRU cache of 1/8, 1/4, 1/2 of the experts then hits about 33, 57 and 85 %, as
  published for models with 64 experts. --flat leaves all experts alike: 11, 25 and 52 %.
* The best next token of t is 5 t + 3 modulo the vocabulary: the output matrix is the embedding with its rows
  moved there. So a greedy answer never falls into a loop, which would need few experts, and all engines
  and roundings choose the same tokens.

Weights have variance 1 / columns, so that every product of a normed vector has variance 1 and hidden states
stay within a few units. The vocabulary is byte-level BPE with random merges. Nothing is trained in here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

Array = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

LAYERS, VOCABULARY = 8, 8192
HIDDEN, DENSE_FFN, EXPERT_FFN, EXPERTS, USED = 2048, 10240, 1536, 64, 4
HEADS, Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 20, 768, 512, 192, 64, 256
CONTEXT, EPSILON, ROPE_BASE, EXPERT_SCALE = 202752, 1e-5, 1e6, 1.8
ZIPF_EXPONENT = 0.1
MULTIPLIER, INCREMENT = 5, 3  # a full cycle of every power of two
OUTPUT_GAIN = 1 / 64  # the right token's logit is then about 15, the others' within 3
CONTROL, NORMAL = 3, 1
FILE_TYPE_TQ2_0 = 37

# The bytes that hold four codes 0..2.
_FOUR_TRITS = np.array(
    [a | b << 2 | c << 4 | d << 6 for a in range(3) for b in range(3) for c in range(3) for d in range(3)],
    np.uint8,
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file: its shape with the rows' bytes last (or values, for F32), and who makes it."""

    name: str
    shape: tuple[int, ...]
    tensor_type: GGMLQuantizationType
    make: Callable[[np.random.Generator], Array]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * (4 if self.tensor_type == GGMLQuantizationType.F32 else 1)


def _scales(rng: np.random.Generator, blocks: int, middle: float) -> npt.NDArray[np.uint8]:
    """Return float16 scales within a tenth of `middle`: (blocks, 2)."""
    scales = (middle * rng.uniform(0.9, 1.1, blocks)).astype("<f2")
    return scales.view(np.uint8).reshape(blocks, 2)


def ternary(name: str, *shape: int) -> Tensor:
    """Return a TQ2_0 matrix, or a stack of them: blocks of 64 bytes of codes and a scale for 256 weights."""
    columns = shape[-1]
    blocks = math.prod(shape) // 256
    stored = (*shape[:-1], columns // 256 * 66)

    def make(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        data = np.empty((blocks, 66), np.uint8)
        data[:, :64] = _FOUR_TRITS[rng.integers(0, len(_FOUR_TRITS), (blocks, 64), np.uint8)]
        data[:, 64:] = _scales(rng, blocks, math.sqrt(3 / 2 / columns))
        return data.reshape(stored)

    return Tensor(f"{name}.weight", stored, GGMLQuantizationType.TQ2_0, make)


def eight_bit(name: str, *shape: int, deviation: float | None = None) -> Tensor:
    """Return a Q8_0 matrix, or a stack: blocks of a scale and 32 weights; deviation: 1 / sqrt(columns)."""
    columns = shape[-1]
    blocks = math.prod(shape) // 32
    stored = (*shape[:-1], columns // 32 * 34)
    spread = columns**-0.5 if deviation is None else deviation

    def make(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        data = np.empty((blocks, 34), np.uint8)
        data[:, :2] = _scales(rng, blocks, spread * math.sqrt(3) / 127)
        data[:, 2:] = rng.integers(-127, 128, (blocks, 32), np.int8).view(np.uint8)
        return data.reshape(stored)

    return Tensor(f"{name}.weight", stored, GGMLQuantizationType.Q8_0, make)


def floats(
    name: str, shape: tuple[int, ...], make: Callable[[np.random.Generator], npt.NDArray[np.floating]]
) -> Tensor:
    """Return a tensor of float32."""
    return Tensor(name, shape, GGMLQuantizationType.F32, lambda rng: make(rng).astype(np.float32))


def norm(name: str, width: int) -> Tensor:
    """Return the weights of a norm, about 1."""
    return floats(f"{name}.weight", (width,), lambda rng: rng.uniform(0.9, 1.1, width))


def _embedding_and_output(vocabulary: int, seed: int) -> Iterator[Tensor]:
    """Yield both; the output's rows are the embedding's, moved from t to the token that follows t."""
    embedding = eight_bit("token_embd", vocabulary, HIDDEN, deviation=1.0)

    def embed(_: np.random.Generator) -> Array:
        return embedding.make(np.random.default_rng((seed, vocabulary)))

    def project(rng: np.random.Generator) -> Array:
        moved = np.empty(embedding.shape, np.uint8)
        moved[(np.arange(vocabulary) * MULTIPLIER + INCREMENT) % vocabulary] = embed(rng)
        blocks = moved.reshape(-1, 34)
        scales = np.ascontiguousarray(blocks[:, :2]).view("<f2") * np.float16(OUTPUT_GAIN)
        blocks[:, :2] = scales.view(np.uint8)
        return moved

    yield Tensor(embedding.name, embedding.shape, embedding.tensor_type, embed)
    yield norm("output_norm", HIDDEN)
    yield Tensor("output.weight", embedding.shape, embedding.tensor_type, project)


def _attention(blk: str) -> Iterator[Tensor]:
    yield norm(f"{blk}.attn_norm", HIDDEN)
    yield eight_bit(f"{blk}.attn_q_a", Q_RANK, HIDDEN)
    yield norm(f"{blk}.attn_q_a_norm", Q_RANK)
    yield eight_bit(f"{blk}.attn_q_b", HEADS * (NOPE + ROPE), Q_RANK)
    yield eight_bit(f"{blk}.attn_kv_a_mqa", KV_RANK + ROPE, HIDDEN)
    yield norm(f"{blk}.attn_kv_a_norm", KV_RANK)
    # Rows are the latent's: of 192 columns, while the keys that they make are sums over the 512 rows.
    yield eight_bit(f"{blk}.attn_k_b", HEADS, KV_RANK, NOPE, deviation=KV_RANK**-0.5)
    yield eight_bit(f"{blk}.attn_v_b", HEADS, VALUE, KV_RANK)
    yield eight_bit(f"{blk}.attn_output", HIDDEN, HEADS * VALUE)
    yield norm(f"{blk}.ffn_norm", HIDDEN)


def _preferences(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    return rng.permutation(-ZIPF_EXPONENT * np.log(np.arange(1, EXPERTS + 1)))


def _alike(_: np.random.Generator) -> npt.NDArray[np.float64]:
    return np.zeros(EXPERTS)


def _experts(blk: str, flat: bool) -> Iterator[Tensor]:
    yield floats(
        f"{blk}.ffn_gate_inp.weight",
        (EXPERTS, HIDDEN),
        lambda rng: rng.standard_normal((EXPERTS, HIDDEN)) * HIDDEN**-0.5,
    )
    yield floats(f"{blk}.exp_probs_b.bias", (EXPERTS,), _alike if flat else _preferences)
    for name in ("ffn_gate", "ffn_up"):
        yield ternary(f"{blk}.{name}_exps", EXPERTS, EXPERT_FFN, HIDDEN)
        yield eight_bit(f"{blk}.{name}_shexp", EXPERT_FFN, HIDDEN)
    yield ternary(f"{blk}.ffn_down_exps", EXPERTS, HIDDEN, EXPERT_FFN)
    yield eight_bit(f"{blk}.ffn_down_shexp", HIDDEN, EXPERT_FFN)


def tensors(layers: int, vocabulary: int, flat: bool, seed: int) -> Iterator[Tensor]:
    """Yield all tensors in the order of the file."""
    yield from _embedding_and_output(vocabulary, seed)
    for layer in range(layers):
        blk = f"blk.{layer}"
        yield from _attention(blk)
        if layer == 0:
            yield eight_bit(f"{blk}.ffn_gate", DENSE_FFN, HIDDEN)
            yield eight_bit(f"{blk}.ffn_up", DENSE_FFN, HIDDEN)
            yield eight_bit(f"{blk}.ffn_down", HIDDEN, DENSE_FFN)
        else:
            yield from _experts(blk, flat)


def tokenizer(vocabulary: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Return tokens (one control token, 256 bytes, merged letters) and merges."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", "\u0120"]  # the last one is a space
    tokens = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    known, merges = set(tokens), []
    while len(tokens) < vocabulary:
        left, right = (letters[i] for i in rng.integers(0, len(letters), 2))
        merged = left + right
        if len(merged) <= 8 and "\u0120" not in right and merged not in known:
            known.add(merged)
            letters.append(merged)
            tokens.append(merged)
            merges.append(f"{left} {right}")
    return tokens, merges


def _write_settings(writer: GGUFWriter, layers: int, vocabulary: int, rng: np.random.Generator) -> None:
    writer.add_name("glm-shaped-random")
    writer.add_file_type(FILE_TYPE_TQ2_0)
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(DENSE_FFN)
    writer.add_vocab_size(vocabulary)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_q_lora_rank(Q_RANK)
    writer.add_kv_lora_rank(KV_RANK)
    writer.add_key_length(KV_RANK + ROPE)
    writer.add_value_length(KV_RANK)
    writer.add_key_length_mla(NOPE + ROPE)
    writer.add_value_length_mla(VALUE)
    writer.add_rope_dimension_count(ROPE)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(USED)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(EXPERT_FFN)
    writer.add_expert_weights_scale(EXPERT_SCALE)
    writer.add_expert_weights_norm(True)
    writer.add_expert_group_count(1)
    writer.add_expert_group_used_count(1)
    writer.add_uint32("deepseek2.expert_gating_func", 2)
    tokens, merges = tokenizer(vocabulary, rng)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] + [NORMAL] * (vocabulary - 1))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


def write(path: Path, layers: int, vocabulary: int, flat: bool, seed: int) -> int:
    """Write the model to `path`, one tensor in memory at a time; return the size of all tensors, in bytes."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "deepseek2")
    _write_settings(writer, layers, vocabulary, rng)
    everything = list(tensors(layers, vocabulary, flat, seed))
    for tensor in everything:
        dtype = np.dtype(np.float32 if tensor.tensor_type == GGMLQuantizationType.F32 else np.uint8)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in everything:
        writer.write_tensor_data(tensor.make(rng))
    writer.close()
    return sum(tensor.nbytes for tensor in everything)


def main() -> None:
    """Parse the arguments and write the file."""
    parser = argparse.ArgumentParser(description="Write a random model of GLM-4.7-Flash's shape.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"2 to 47 [{LAYERS}]")
    parser.add_argument(
        "--vocabulary", type=int, default=VOCABULARY, help=f"a power of two, 512 or more [{VOCABULARY}]"
    )
    parser.add_argument("--flat", action="store_true", help="no expert is preferred")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if not 2 <= given.layers <= 47:
        parser.error(f"--layers {given.layers}: expected 2 to 47")
    if given.vocabulary < 512 or given.vocabulary & (given.vocabulary - 1):
        parser.error(f"--vocabulary {given.vocabulary}: expected a power of two, 512 or more")
    nbytes = write(given.out, given.layers, given.vocabulary, given.flat, given.seed)
    print(f"{given.out}: {nbytes / 1e9:.3f} GB in {given.layers} layers")


if __name__ == "__main__":
    main()
