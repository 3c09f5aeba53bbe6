"""Hyperparameters of the `deepseek2` family from GGUF metadata, checked; no tensors, no numba."""

from __future__ import annotations

from dataclasses import dataclass

from ...shm.errors import ModelFileError
from ...workers.checkpoint.gguf import GgufFile

ARCHITECTURES = ("deepseek2",)
SOFTMAX, SIGMOID = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """Sizes and constants of one model; all lengths in elements."""

    architecture: str
    layers: int
    d_model: int
    d_ff_dense: int
    heads: int
    q_rank: int  # 0: no low-rank query (attn_q instead of attn_q_a, attn_q_b)
    kv_rank: int
    nope: int
    rope: int
    v_dim: int
    eps: float
    rope_base: float
    dense_layers: int
    experts: int
    experts_used: int
    shared_experts: int
    d_ff_expert: int
    weights_scale: float
    weights_norm: bool
    gating: int
    context_length: int

    @property
    def cache_width(self) -> int:
        """Values cached per token and layer: latent and rotated key."""
        return self.kv_rank + self.rope

    @property
    def moe_layers(self) -> range:
        """The layers that have experts."""
        return range(self.dense_layers, self.layers)

    @classmethod
    def from_gguf(cls, file: GgufFile) -> Hyperparameters:
        """Read and cross-check the keys of spec section 4.2.

        Raises ModelFileError naming file and key for what is missing, misshapen or not supported.
        """
        architecture = file.require("general.architecture", str)
        if architecture not in ARCHITECTURES:
            raise ModelFileError(
                f"{file.label}: general.architecture is {architecture!r}; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        _refuse_unsupported(file, architecture)
        read = _Keys(file, architecture)
        rope = read.int("rope.dimension_count")
        hyper = cls(
            architecture=architecture,
            layers=read.int("block_count") - read.int("nextn_predict_layers", 0),
            d_model=read.int("embedding_length"),
            d_ff_dense=read.int("feed_forward_length"),
            heads=read.int("attention.head_count"),
            q_rank=read.int("attention.q_lora_rank", 0),
            kv_rank=read.int("attention.kv_lora_rank"),
            nope=read.int("attention.key_length_mla") - rope,
            rope=rope,
            v_dim=read.int("attention.value_length_mla"),
            eps=read.float("attention.layer_norm_rms_epsilon"),
            rope_base=read.float("rope.freq_base"),
            dense_layers=read.int("leading_dense_block_count", 0),
            experts=read.int("expert_count"),
            experts_used=read.int("expert_used_count"),
            shared_experts=read.int("expert_shared_count", 0),
            d_ff_expert=read.int("expert_feed_forward_length"),
            weights_scale=read.float("expert_weights_scale", 1.0),
            weights_norm=file.get(f"{architecture}.expert_weights_norm", bool, False),
            gating=_gating(file, read),
            context_length=read.int("context_length"),
        )
        hyper.check(file.label)
        return hyper

    def check(self, source: str) -> None:
        """Raise ModelFileError when sizes contradict each other or the kernels' multiples."""
        sixteen, thirty_two = "a positive multiple of 16", "a positive multiple of 32"
        rules = (
            ("block_count", self.layers, 1 <= self.layers <= 1024, "1..1024"),
            (
                "leading_dense_block_count",
                self.dense_layers,
                self.dense_layers <= self.layers,
                "<= block_count",
            ),
            ("embedding_length", self.d_model, _multiple(self.d_model, 32), thirty_two),
            ("feed_forward_length", self.d_ff_dense, _multiple(self.d_ff_dense, 16), sixteen),
            ("attention.head_count", self.heads, 1 <= self.heads <= 1024, "1..1024"),
            ("attention.kv_lora_rank", self.kv_rank, _multiple(self.kv_rank, 32), thirty_two),
            ("attention.q_lora_rank", self.q_rank, self.q_rank % 16 == 0, "a multiple of 16"),
            ("rope.dimension_count", self.rope, _multiple(self.rope, 16), sixteen),
            (
                "attention.key_length_mla",
                self.nope + self.rope,
                _multiple(self.nope, 16),
                f"rope + {sixteen}",
            ),
            ("attention.value_length_mla", self.v_dim, _multiple(self.v_dim, 16), sixteen),
            ("attention.layer_norm_rms_epsilon", self.eps, 0.0 < self.eps < 1.0, "between 0 and 1"),
            ("rope.freq_base", self.rope_base, 0.0 < self.rope_base < 1e12, "positive"),
            ("expert_count", self.experts, 1 <= self.experts <= 4096, "1..4096"),
            (
                "expert_used_count",
                self.experts_used,
                1 <= self.experts_used <= self.experts,
                "1..expert_count",
            ),
            ("expert_shared_count", self.shared_experts, self.shared_experts <= 64, "0..64"),
            ("expert_feed_forward_length", self.d_ff_expert, _multiple(self.d_ff_expert, 16), sixteen),
            (
                "expert_gating_func",
                self.gating,
                self.gating in (SOFTMAX, SIGMOID),
                "1 (softmax) or 2 (sigmoid)",
            ),
            ("context_length", self.context_length, self.context_length > 0, "positive"),
        )
        for key, found, fits, expected in rules:
            if not fits:
                raise ModelFileError(f"{source}: {self.architecture}.{key} is {found}, expected {expected}")


def _multiple(value: int, of: int) -> bool:
    return value > 0 and value % of == 0


class _Keys:
    """Reads `<architecture>.*` keys; an unsigned value that is absent may have a default."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self._file = file
        self._prefix = prefix

    def int(self, key: str, default: int | None = None) -> int:
        name = f"{self._prefix}.{key}"
        return self._file.require(name, int) if default is None else self._file.get(name, int, default)

    def float(self, key: str, default: float | None = None) -> float:
        name = f"{self._prefix}.{key}"
        return self._file.require(name, float) if default is None else self._file.get(name, float, default)


def _gating(file: GgufFile, read: _Keys) -> int:
    """Return the gating function; early GLM-4.7-Flash files lack the key (spec section 4.2)."""
    layers, vocabulary = read.int("block_count"), read.int("vocab_size", 0)
    glm = layers in (47, 48) and vocabulary == 154880
    return read.int("expert_gating_func", SIGMOID if glm else SOFTMAX)


def _refuse_unsupported(file: GgufFile, architecture: str) -> None:
    scaling = file.get(f"{architecture}.rope.scaling.type", str, "none")
    if scaling not in ("none", ""):
        raise ModelFileError(
            f"{file.label}: {architecture}.rope.scaling.type is {scaling!r}; "
            "only unscaled rotation is supported yet"
        )
    groups = file.get(f"{architecture}.expert_group_count", int, 1)
    if groups > 1:
        raise ModelFileError(
            f"{file.label}: {architecture}.expert_group_count is {groups}; "
            "expert groups are not supported yet"
        )
    if f"{architecture}.attention.key_length_mla" not in file.metadata:
        raise ModelFileError(
            f"{file.label}: {architecture}.attention.key_length_mla is missing: the file keeps attn_kv_b "
            "in one piece; convert it with a llama.cpp of April 2025 or later"
        )
