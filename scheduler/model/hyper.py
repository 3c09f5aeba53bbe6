"""What a model is: sizes and constants, the same for all families. No tensors, no numba.

Each family's file says how its keys become these; `family` finds the file. What a family has beyond others
(biases, norms of heads, sinks, scales) is a field here, so that the planner and the decoder know fields and
no families.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...shm.errors import ModelFileError
from ...workers.activation import Activation
from ...workers.gating import SIGMOID, SOFTMAX, SOFTMAX_SELECTED
from .attention import Attention, Rule, multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Rotary embedding of some values of a head (RoFormer; scaling as in YaRN)."""

    dims: int
    """How many values are rotated: the first or the last of a head."""
    base: float
    halves: bool
    """Pairs are (i, i + dims / 2), not neighbours."""
    factor: float = 1.0
    """How much longer than `original_context` the context was made; 1: not at all."""
    yarn: bool = False
    """Scale slow pairs only, between the two betas."""
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole: bool = True
    """Round the pairs at the betas to whole ones."""
    magnitude: float = 1.0
    """Factor of cosine and sine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """Sizes and constants of one model; all lengths in elements."""

    architecture: str
    layers: int
    d_model: int
    eps: float
    """Of the RMS norms."""
    context_length: int
    attention: Attention
    rotation: Rotation
    d_ff_dense: int
    """Width of the feed-forward of dense layers."""
    dense_layers: int
    """The first layers, without experts: all of a dense model, which has 0 for all about experts."""
    experts: int = 0
    experts_used: int = 0
    d_ff_expert: int = 0
    d_ff_shared: int = 0
    """Width of the shared experts together, 0 without."""
    shared_gated: bool = False
    """The sum of the shared experts is scaled by the sigmoid of a product of its own."""
    weights_scale: float = 1.0
    weights_norm: bool = False
    gating: int = SOFTMAX
    """See `workers.gating`."""
    groups: int = 1
    """Experts lie in groups of one size."""
    groups_used: int = 1
    """Groups that a token's experts are chosen from."""
    expert_biased: bool = False
    """The experts' matrices have biases."""
    router_biased: bool = False
    selection_biased: bool = False
    """A bias counts for the choice of experts alone (`exp_probs_b`)."""
    activation: Activation = Activation.SILU
    ffn_norm: str = "ffn_norm"
    """Role of the norm in front of the feed-forward."""
    ffn_sub_norm: bool = False
    """RMS norm of the feed-forward's middle."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor of what a layer adds."""
    logit_scale: float = 1.0

    @property
    def cache_width(self) -> int:
        """Values cached per token and layer."""
        return self.attention.cache_width

    @property
    def moe_layers(self) -> range:
        """The layers that have experts."""
        return range(self.dense_layers, self.layers)

    def check(self, source: str) -> None:
        """Raise ModelFileError when sizes contradict each other or the kernels' multiples."""
        for key, found, fits, expected in self._rules():
            if not fits:
                raise ModelFileError(f"{source}: {self.architecture}.{key} is {found}, expected {expected}")

    def _rules(self) -> Iterator[Rule]:
        yield "block_count", self.layers, 1 <= self.layers <= 1024, "1..1024"
        fits = 0 <= self.dense_layers <= self.layers
        yield "leading_dense_block_count", self.dense_layers, fits, "<= block_count"
        yield "embedding_length", self.d_model, multiple(self.d_model, 32), "a positive multiple of 32"
        if self.dense_layers:
            width = self.d_ff_dense
            yield "feed_forward_length", width, multiple(width, 16), "a positive multiple of 16"
        heads = self.attention.heads
        yield "attention.head_count", heads, 1 <= heads <= 1024, "1..1024"
        yield from self._rotation_rules()
        yield from self.attention.rules()
        fits = 0.0 < self.eps < 1.0
        yield "attention.layer_norm_rms_epsilon", self.eps, fits, "between 0 and 1"
        yield "context_length", self.context_length, self.context_length > 0, "positive"
        scales = {
            "attention.scale": self.attention.scale,
            "embedding_scale": self.embedding_scale,
            "residual_scale": self.residual_scale,
            "logit_scale": self.logit_scale,
            "expert_weights_scale": self.weights_scale,
        }
        for key, value in scales.items():
            yield key, value, 0.0 < value < 1e6, "positive"
        if self.dense_layers < self.layers:
            yield from self._expert_rules()

    def _rotation_rules(self) -> Iterator[Rule]:
        r, most = self.rotation, self.attention.rotated
        yield "rope.dimension_count", r.dims, multiple(r.dims, 16), "a positive multiple of 16"
        yield "rope.dimension_count", r.dims, r.dims <= most, f"at most {most}, the values of a head"
        yield "rope.freq_base", r.base, 1.0 < r.base < 1e12, "more than 1"
        yield "rope.scaling.factor", r.factor, 1.0 <= r.factor <= 1e6, "1 to 1e6"
        yield "rope.scaling.attn_factor", r.magnitude, 0.0 < r.magnitude < 1e6, "positive"
        if r.yarn:
            old = r.original_context
            yield "rope.scaling.original_context_length", old, 1 <= old < 2**31, "1 or more"
            yield "rope.scaling.yarn_beta_fast", r.beta_fast, 0.0 < r.beta_fast < 1e6, "positive"
            yield "rope.scaling.yarn_beta_slow", r.beta_slow, 0.0 < r.beta_slow < 1e6, "positive"

    def _expert_rules(self) -> Iterator[Rule]:
        yield "expert_count", self.experts, 1 <= self.experts <= 4096, "1..4096"
        fits = 1 <= self.experts_used <= self.experts
        yield "expert_used_count", self.experts_used, fits, "1..expert_count"
        width = self.d_ff_expert
        yield "expert_feed_forward_length", width, multiple(width, 16), "a positive multiple of 16"
        yield "expert_shared_feed_forward_length", self.d_ff_shared, self.d_ff_shared % 16 == 0, "16 times"
        functions = (SOFTMAX, SIGMOID, SOFTMAX_SELECTED)
        yield "expert_gating_func", self.gating, self.gating in functions, "1, 2 or 3"
        fits = self.groups >= 1 and self.experts % self.groups == 0
        yield "expert_group_count", self.groups, fits, f"a divisor of {self.experts} experts"
        enough = 1 <= self.groups_used <= self.groups
        enough = enough and self.groups_used * (self.experts // self.groups) >= self.experts_used
        yield "expert_group_used_count", self.groups_used, enough, "groups that hold the experts used"
