"""What a model file becomes in memory: the dense arena and the slot of one expert. No numba.

Daemon, scheduler and workers each compute the same plan from the same file, so that nothing about
addresses has to travel between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ...shm.errors import ConfigError
from ...workers.checkpoint.file import names
from ...workers.checkpoint.file.gguf import GgufFile, TensorInfo
from ...workers.checkpoint.held.formats import ActivationKind, Format, MatrixShape, Storage, activation_kind
from ...workers.checkpoint.held.precisions import FILE_PRECISION
from ...workers.messages import ExpertPage, FileSlab, LayerShape
from .hyper import Hyperparameters

PROJECTIONS = ("gate", "up", "down")
BIASES = tuple(f"ffn_{name}_exps_bias" for name in PROJECTIONS)
"""Roles of the vectors behind an expert's matrices in its slot, as float32 matrices of one column."""

# In front of the dense arena: its first byte says whether the rest is complete.
DENSE_HEADER_NBYTES = 64


@dataclass(frozen=True, slots=True)
class Cut:
    """How keys and values lie in one matrix (heads, nope + v_dim, rank)."""

    heads: int
    nope: int
    v_dim: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensor:
    """One tensor of the dense arena."""

    tensor: TensorInfo
    held: str
    """"matrix": packed as `shape`; "vector": float32; "raw": the file's own bytes; "keys" and "values": the
    matrices of all heads that are cut out of a joined one, those of keys transposed."""
    at: int
    """Its first byte."""
    nbytes: int
    shape: MatrixShape | None = None
    cut: Cut | None = None


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
    """What experts may be held as: "file", then names of `precisions.TARGETS`; a precision is an index."""
    assignment: tuple[int, ...] = ()
    """The precision of each expert by key, see `assigned`; empty: all as the file has them."""
    dense: dict[str, DenseTensor] = field(default_factory=dict)
    dense_nbytes: int = 0
    experts: dict[int, tuple[ExpertMatrix, ...]] = field(default_factory=dict)
    expert_nbytes: dict[int, int] = field(default_factory=dict)
    """Bytes of the slot that an expert of each layer needs as the file has it."""
    tiers: dict[int, tuple[tuple[ExpertMatrix, ...], ...]] = field(default_factory=dict)
    """gate, up, down of each layer's experts in each precision, and their biases; the first is `experts`."""
    precision_nbytes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Bytes of the slot that an expert of each layer needs in each precision; the first is the largest."""
    matrix_types: set[tuple[str, Format]] = field(default_factory=set)
    """(file type, format) of all matrices: what kernels are needed for."""

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
                activation=int(h.activation),
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
            rows, columns, total = matrix.shape.rows, matrix.shape.columns, self.hyper.experts
            if matrix.role in BIASES:
                slab = names.expert_vector(file, matrix.role, layer, expert, total, rows)
            else:
                slab = names.expert_slab(file, matrix.role, layer, expert, total, rows, columns)
            slabs.append(FileSlab(slab.offset, slab.nbytes, slab.type.id, slab.tensor, slab.file))
        return ExpertPage(layer, expert, slot, precision, slabs)


def by_precision(plan: ModelPlan) -> dict[str, dict[str, int]]:
    """Return how many experts are held in each precision, and the bytes of slots for all of them."""
    return {
        name: {"experts": count, "bytes": nbytes} for name, (count, nbytes) in plan.by_precision().items()
    }
