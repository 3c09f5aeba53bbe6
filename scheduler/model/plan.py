"""What a model file becomes in memory: the dense arena and the slot of one expert. No numba.

Daemon, scheduler and workers each compute the same plan from the same file, so that nothing about
addresses has to travel between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ...shm.errors import ConfigError, ModelFileError
from ...shm.layout import align
from ...workers.checkpoint import names
from ...workers.checkpoint.formats import (
    DEFAULT_STORAGE,
    ActivationKind,
    Format,
    MatrixShape,
    Storage,
    activation_kind,
    format_of,
    kernel_type,
)
from ...workers.checkpoint.gguf import GgufFile, TensorInfo
from ...workers.checkpoint.tiers import FILE_PRECISION, TARGETS, held_type
from ...workers.checkpoint.types import TensorType
from ...workers.messages import ExpertPage, FileSlab, LayerShape
from .hyper import Hyperparameters

PROJECTIONS = ("gate", "up", "down")

# In front of the dense arena: its first byte says whether the rest is complete.
DENSE_HEADER_NBYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensor:
    """One tensor of the dense arena: `at` is its first byte.

    kind "matrix": packed as `shape`; "vector": float32; "raw": the file's own bytes.
    """

    tensor: TensorInfo
    kind: str
    at: int
    nbytes: int
    shape: MatrixShape | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMatrix:
    """One projection of one layer's experts: `at` is its first byte within a slot."""

    role: str
    shape: MatrixShape
    at: int


@dataclass(slots=True)
class ModelPlan:
    """All of a model's tensors, checked and placed."""

    hyper: Hyperparameters
    vocab_size: int
    storage: Storage
    precisions: tuple[str, ...] = (FILE_PRECISION,)
    """What experts may be held as: "file", then names of `tiers.TARGETS`; a precision is an index."""
    assignment: tuple[int, ...] = ()
    """The precision of each expert by key, see `assigned`; empty: all as the file has them."""
    dense: dict[str, DenseTensor] = field(default_factory=dict)
    dense_nbytes: int = 0
    experts: dict[int, tuple[ExpertMatrix, ...]] = field(default_factory=dict)
    expert_nbytes: dict[int, int] = field(default_factory=dict)
    """Bytes of the slot that an expert of each layer needs as the file has it."""
    tiers: dict[int, tuple[tuple[ExpertMatrix, ...], ...]] = field(default_factory=dict)
    """gate, up, down of each layer's experts in each precision; the first is `experts`."""
    precision_nbytes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Bytes of the slot that an expert of each layer needs in each precision; the first is the largest."""
    kinds: set[tuple[str, Format]] = field(default_factory=set)
    """(file type, format) of all matrices: what kernels are needed for."""

    @classmethod
    def from_file(
        cls,
        file: GgufFile,
        storage: Storage = DEFAULT_STORAGE,
        precisions: tuple[str, ...] = (FILE_PRECISION,),
    ) -> ModelPlan:
        """Check that `file` holds every tensor of its architecture, in the right shape.

        precisions: see the attribute. Raises ModelFileError naming the tensor and what was expected,
        ConfigError for precisions that are unknown, named twice, or do not begin with "file".
        """
        unknown = set(precisions[1:]) - set(TARGETS)
        if precisions[:1] != (FILE_PRECISION,) or unknown or len(set(precisions)) < len(precisions):
            raise ConfigError(
                f"precisions {', '.join(precisions)}: expected {FILE_PRECISION}, then any of"
                f" {', '.join(TARGETS)}"
            )
        hyper = Hyperparameters.from_gguf(file)
        embedding = names.find(file, "token_embd")
        if embedding is None or len(embedding.shape) != 2:
            raise ModelFileError(f"{file.label}: token_embd.weight is missing or not a matrix")
        plan = cls(hyper=hyper, vocab_size=embedding.shape[0], storage=storage, precisions=precisions)
        planner = _Planner(file, plan)
        planner.model()
        return plan

    @property
    def dense_arena_nbytes(self) -> int:
        """Bytes of the dense arena."""
        return DENSE_HEADER_NBYTES + self.dense_nbytes

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers."""
        return len(self.experts) * self.hyper.experts

    def key_of(self, layer: int, expert: int) -> int:
        """Return the number of an expert among all routed ones: layer after layer."""
        return (layer - self.hyper.dense_layers) * self.hyper.experts + expert

    def assigned(self, assignment: Sequence[int]) -> ModelPlan:
        """Return this plan with the precision of each expert, by key; empty: all as the file has them.

        Raises ConfigError for another number of experts or a precision that there is not.
        """
        if assignment and len(assignment) != self.num_experts:
            raise ConfigError(f"precisions of {len(assignment)} experts for {self.num_experts}")
        if assignment and not 0 <= min(assignment) <= max(assignment) < len(self.precisions):
            raise ConfigError(
                f"precisions {min(assignment)} to {max(assignment)}: there are {len(self.precisions)}"
            )
        return replace(self, assignment=tuple(assignment))

    def precision_of(self, key: int) -> int:
        """Return the precision in which an expert is held."""
        return self.assignment[key] if self.assignment else 0

    def slot_nbytes(self) -> npt.NDArray[np.int64]:
        """Return the bytes of the slot of each expert, int64 (experts of all layers,)."""
        sizes = np.array(list(self.precision_nbytes.values()), np.int64).reshape(-1, len(self.precisions))
        by_key = np.repeat(sizes, self.hyper.experts, axis=0)
        return np.take_along_axis(by_key, self._precisions()[:, np.newaxis], axis=1)[:, 0]

    def _precisions(self) -> npt.NDArray[np.int64]:
        return np.array(self.assignment or (0,) * self.num_experts, np.int64)

    def slot_sizes(self) -> list[int]:
        """Return the sizes of slots that layers and precisions need, smallest first."""
        return sorted({nbytes for sizes in self.precision_nbytes.values() for nbytes in sizes})

    def all_slots(self) -> list[tuple[int, int]]:
        """Return the classes of slots, as `shm.slots.SlotClasses`, for all routed experts as assigned."""
        sizes, counts = np.unique(self.slot_nbytes(), return_counts=True)
        return list(zip(counts.tolist(), sizes.tolist(), strict=True))

    def by_precision(self) -> dict[str, tuple[int, int]]:
        """Return of each precision how many experts it has, and the bytes of slots for all of them."""
        precisions, nbytes = self._precisions(), self.slot_nbytes()
        return {
            name: (int((precisions == i).sum()), int(nbytes[precisions == i].sum()))
            for i, name in enumerate(self.precisions)
        }

    def expert_activation(self, layer: int, precision: int = 0) -> ActivationKind:
        """Return what the experts of `layer` read when they are held in `precision`."""
        return activation_kind(self.tiers[layer][precision][0].shape.form)

    def layer_shapes(self) -> dict[int, LayerShape]:
        """Return what workers must know of each layer's experts."""
        h = self.hyper
        return {
            layer: LayerShape(
                d_model=h.d_model,
                d_ff=h.d_ff_expert,
                precisions=[
                    [(int(m.shape.form), m.shape.rows, m.shape.columns, m.at) for m in matrices]
                    for matrices in tiers
                ],
            )
            for layer, tiers in self.tiers.items()
        }

    def expert_page(
        self, file: GgufFile, layer: int, expert: int, slot: int, precision: int = 0
    ) -> ExpertPage:
        """Return what a worker needs to read the expert of `file` into `slot` in `precision`."""
        slabs = []
        for matrix in self.experts[layer]:
            rows, columns = matrix.shape.rows, matrix.shape.columns
            slab = names.expert_slab(file, matrix.role, layer, expert, self.hyper.experts, rows, columns)
            slabs.append(FileSlab(slab.offset, slab.nbytes, slab.type.id, slab.tensor))
        return ExpertPage(layer, expert, slot, precision, slabs)


class _Planner:
    """Adds tensor after tensor to a plan."""

    def __init__(self, file: GgufFile, plan: ModelPlan) -> None:
        self._file = file
        self._plan = plan

    def model(self) -> None:
        h = self._plan.hyper
        self._raw("token_embd", (self._plan.vocab_size, h.d_model))
        self._vector("output_norm", h.d_model)
        head = "output" if names.find(self._file, "output") else "token_embd"
        self._matrix("output", (self._plan.vocab_size, h.d_model), role=head)
        for layer in range(h.layers):
            self._attention(layer)
            self._vector("ffn_norm", h.d_model, layer)
            if layer < h.dense_layers:
                self._feed_forward("ffn_{}", h.d_ff_dense, layer)
            else:
                self._mixture(layer)

    def _attention(self, layer: int) -> None:
        h = self._plan.hyper
        self._vector("attn_norm", h.d_model, layer)
        query = h.heads * (h.nope + h.rope)
        if h.q_rank:
            self._matrix("attn_q_a", (h.q_rank, h.d_model), layer)
            self._vector("attn_q_a_norm", h.q_rank, layer)
            self._matrix("attn_q_b", (query, h.q_rank), layer)
        else:
            self._matrix("attn_q", (query, h.d_model), layer)
        self._matrix("attn_kv_a_mqa", (h.cache_width, h.d_model), layer)
        self._vector("attn_kv_a_norm", h.kv_rank, layer)
        self._matrix("attn_k_b", (h.heads, h.kv_rank, h.nope), layer)
        self._matrix("attn_v_b", (h.heads, h.v_dim, h.kv_rank), layer)
        self._matrix("attn_output", (h.d_model, h.heads * h.v_dim), layer)

    def _feed_forward(self, pattern: str, width: int, layer: int) -> None:
        d_model = self._plan.hyper.d_model
        kinds = []
        for name in PROJECTIONS:
            shape = (d_model, width) if name == "down" else (width, d_model)
            kinds.append(self._matrix(pattern.format(name), shape, layer).form)
        self._same_activation(
            kinds[0], kinds[1], f"{pattern.format('gate')} and {pattern.format('up')}", layer
        )

    def _mixture(self, layer: int) -> None:
        h = self._plan.hyper
        self._matrix("ffn_gate_inp", (h.experts, h.d_model), layer)
        if names.find(self._file, "exp_probs_b", layer) is not None:
            self._vector("exp_probs_b", h.experts, layer)
        if h.shared_experts:
            self._feed_forward("ffn_{}_shexp", h.d_ff_expert * h.shared_experts, layer)
        self._experts(layer)

    def _experts(self, layer: int) -> None:
        h = self._plan.hyper
        shapes: list[MatrixShape] = []
        types: list[TensorType | None] = []
        for name in PROJECTIONS:
            role = f"ffn_{name}_exps"
            rows, columns = (h.d_model, h.d_ff_expert) if name == "down" else (h.d_ff_expert, h.d_model)
            slabs = [
                names.expert_slab(self._file, role, layer, expert, h.experts, rows, columns)
                for expert in range(h.experts)
            ]
            forms = {self._format(slab.type, columns, slab.tensor) for slab in slabs}
            if len(forms) != 1:
                raise ModelFileError(f"{self._file.label}: layer {layer}: experts differ in type for {role}")
            shapes.append(MatrixShape(form=forms.pop(), rows=rows, columns=columns))
            found = {slab.type.name: slab.type for slab in slabs}
            types.append(slabs[0].type if len(found) == 1 else None)
        self._same_activation(shapes[0].form, shapes[1].form, "expert gate and up", layer)
        tiers = [_placed(self._held(shapes, types, precision)) for precision in self._plan.precisions]
        self._plan.tiers[layer] = tuple(matrices for matrices, _ in tiers)
        self._plan.precision_nbytes[layer] = tuple(nbytes for _, nbytes in tiers)
        self._plan.experts[layer] = self._plan.tiers[layer][0]
        self._plan.expert_nbytes[layer] = self._plan.precision_nbytes[layer][0]

    def _held(
        self, own: list[MatrixShape], types: list[TensorType | None], precision: str
    ) -> list[MatrixShape]:
        """Return what gate, up and down become in a precision: each smaller, or as the file has it.

        types: of the file, None where experts differ (they share a format, but are not converted).
        """
        held, kinds = list(own), {}
        for i, (shape, file_type) in enumerate(zip(own, types, strict=True)):
            kind = file_type and held_type(file_type, precision, shape.rows, shape.columns)
            if kind is not None and kind is not file_type:
                form = format_of(kind, shape.columns, self._file.label, self._plan.storage)
                held[i], kinds[i] = replace(shape, form=form), (kernel_type(kind), form)
        if activation_kind(held[0].form) is not activation_kind(held[1].form):
            held[:2] = own[:2]  # they are multiplied with the same activations
            kinds = {i: kind for i, kind in kinds.items() if i == 2}
        self._plan.kinds.update(kinds.values())
        return held

    def _same_activation(self, gate: Format, up: Format, what: str, layer: int) -> None:
        if activation_kind(gate) is not activation_kind(up):
            raise ModelFileError(
                f"{self._file.label}: layer {layer}: {what} are {gate.name} and {up.name}; "
                "both must read the same kind of activations"
            )

    def _matrix(
        self, key: str, shape: tuple[int, ...], layer: int | None = None, role: str | None = None
    ) -> MatrixShape:
        """Place a matrix; heads of a 3-D tensor lie under each other as rows."""
        tensor = names.require(self._file, role or key, shape, layer)
        rows = shape[0] if len(shape) == 2 else shape[0] * shape[1]
        form = self._format(tensor.type, shape[-1], tensor.name)
        packed = MatrixShape(form=form, rows=rows, columns=shape[-1])
        self._place(_key(key, layer), tensor, "matrix", packed.nbytes, packed)
        return packed

    def _format(self, file_type: TensorType, columns: int, tensor: str) -> Format:
        form = format_of(file_type, columns, f"{self._file.label}: {tensor}", self._plan.storage)
        self._plan.kinds.add((kernel_type(file_type), form))
        return form

    def _vector(self, key: str, length: int, layer: int | None = None) -> None:
        tensor = names.require(self._file, key, (length,), layer)
        self._place(_key(key, layer), tensor, "vector", 4 * length, None)

    def _raw(self, key: str, shape: tuple[int, ...]) -> None:
        tensor = names.require(self._file, key, shape)
        format_of(tensor.type, shape[-1], f"{self._file.label}: {tensor.name}")
        self._place(key, tensor, "raw", tensor.nbytes, None)

    def _place(self, key: str, tensor: TensorInfo, kind: str, nbytes: int, shape: MatrixShape | None) -> None:
        at = self._plan.dense_nbytes
        self._plan.dense[key] = DenseTensor(tensor=tensor, kind=kind, at=at, nbytes=nbytes, shape=shape)
        self._plan.dense_nbytes = at + align(nbytes)


def _placed(shapes: list[MatrixShape]) -> tuple[tuple[ExpertMatrix, ...], int]:
    """Return gate, up and down one after the other in a slot, and the bytes of the slot."""
    at = 0
    matrices = []
    for name, shape in zip(PROJECTIONS, shapes, strict=True):
        matrices.append(ExpertMatrix(role=f"ffn_{name}_exps", shape=shape, at=at))
        at += shape.nbytes
    return tuple(matrices), align(at, 4096)


def _key(role: str, layer: int | None) -> str:
    return role if layer is None else f"{layer}.{role}"
