"""Finding all tensors of a model in its file, checking and placing them: a file becomes a `ModelPlan`.

What a model needs is read off its hyperparameters; no family is known here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from ...shm.errors import ConfigError, ModelFileError
from ...shm.layout import align
from ...workers.checkpoint.file import names
from ...workers.checkpoint.file.gguf import GgufFile, TensorInfo
from ...workers.checkpoint.file.source import quoted
from ...workers.checkpoint.held.formats import (
    DEFAULT_STORAGE,
    Format,
    MatrixShape,
    Storage,
    activation_kind,
    format_of,
    kernel_type,
)
from ...workers.checkpoint.held.precisions import FILE_PRECISION, TARGETS, held_type
from ...workers.checkpoint.types.table import TYPES_BY_NAME, TensorType
from .families.family import read_hyperparameters
from .plan import BIASES, PROJECTIONS, Cut, DenseTensor, ExpertMatrix, ModelPlan

UNUSED: Final = re.compile(r"blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight")
"""Names of tensors that may lie unused in any model: tables that are computed here."""

_IN_LAYER: Final = re.compile(r"(?:blk|model\.layers)\.(\d+)\.")


def read_plan(
    file: GgufFile,
    storage: Storage = DEFAULT_STORAGE,
    precisions: tuple[str, ...] = (FILE_PRECISION,),
) -> ModelPlan:
    """Check that `file` holds every tensor of its architecture, in the right shape, and nothing unknown.

    precisions: see `ModelPlan`. Raises ModelFileError naming the tensor and what was expected,
    ConfigError for precisions that are unknown, named twice, or do not begin with "file".
    """
    unknown = set(precisions[1:]) - set(TARGETS)
    if precisions[:1] != (FILE_PRECISION,) or unknown or len(set(precisions)) < len(precisions):
        raise ConfigError(
            f"precisions {', '.join(precisions)}: expected {FILE_PRECISION}, then any of {', '.join(TARGETS)}"
        )
    hyper = read_hyperparameters(file)
    embedding = names.find(file, "token_embd")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(f"{file.label}: token_embd.weight is missing or not a matrix")
    plan = ModelPlan(hyper=hyper, vocab_size=embedding.shape[0], storage=storage, precisions=precisions)
    _Planner(file, plan).model()
    return plan


class _Planner:
    """Adds tensor after tensor to a plan."""

    def __init__(self, file: GgufFile, plan: ModelPlan) -> None:
        self._file = file
        self._plan = plan
        self._used: set[str] = set()

    def model(self) -> None:
        h = self._plan.hyper
        self._raw("token_embd", (self._plan.vocab_size, h.d_model))
        self._vector("output_norm", h.d_model)
        head = "output" if names.find(self._file, "output") else "token_embd"
        self._matrix("output", (self._plan.vocab_size, h.d_model), role=head)
        if names.find(self._file, "rope_freqs") is not None:
            self._vector("rope_freqs", h.rotation.dims // 2)
        for layer in range(h.layers):
            self._vector("attn_norm", h.d_model, layer)
            self._attention(layer)
            self._vector("ffn_norm", h.d_model, layer, role=h.ffn_norm)
            if layer < h.dense_layers:
                self._feed_forward("ffn_{}", h.d_ff_dense, layer)
                if h.ffn_sub_norm:
                    self._vector("ffn_sub_norm", h.d_ff_dense, layer)
            else:
                self._mixture(layer)
        self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        """Refuse tensors that the model would have to use: a bias left out is another model."""
        unknown = [name for name in self._file.tensors if name not in self._used and not self._spare(name)]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise ModelFileError(
                f"{self._file.label}: {', '.join(map(quoted, unknown[:3]))}{more}: architecture"
                f" {self._plan.hyper.architecture!r}, as Sterna computes it, has no place for these tensors"
            )

    def _spare(self, name: str) -> bool:
        """Return whether the model is the same without that tensor."""
        h = self._plan.hyper
        if UNUSED.fullmatch(name) or name == "rope_freqs.weight":
            return True
        if h.attention.spares(name):
            return True
        layer = _IN_LAYER.match(name)
        further = self._file.get(f"{h.architecture}.nextn_predict_layers", int, 0)
        return layer is not None and h.layers <= int(layer[1]) < h.layers + further

    def _attention(self, layer: int) -> None:
        for held, role, shape in self._plan.hyper.attention.tensors(self._plan.hyper.d_model):
            if held == "matrix":
                self._matrix(role, shape, layer)
            elif held == "vector":
                self._vector(role, shape[0], layer)
            else:
                self._joined(role, Cut(*shape), layer)

    def _joined(self, role: str, cut: Cut, layer: int) -> None:
        """Place the two matrices of a joined one; that of the keys is decoded, because it is transposed."""
        tensor = self._found(role, (cut.heads * (cut.nope + cut.v_dim), cut.rank), layer)
        if tensor.type.matrix is not None:
            raise ModelFileError(
                f"{self._file.label}: tensor {tensor.name!r} is {tensor.type.name}, which cannot be cut"
            )
        decoded = TYPES_BY_NAME["F32" if tensor.type.name == "F32" else "F16"]
        shape = MatrixShape(
            form=self._format(decoded, cut.nope, tensor.name), rows=cut.heads * cut.rank, columns=cut.nope
        )
        self._add_dense(_key("attn_k_b", layer), tensor, "keys", shape.nbytes, shape, cut)
        form = self._format(tensor.type, cut.rank, tensor.name)
        shape = MatrixShape(form=form, rows=cut.heads * cut.v_dim, columns=cut.rank)
        self._add_dense(_key("attn_v_b", layer), tensor, "values", shape.nbytes, shape, cut)

    def _feed_forward(self, pattern: str, width: int, layer: int) -> None:
        d_model = self._plan.hyper.d_model
        roles = [pattern.format(name) for name in PROJECTIONS]
        pair = [self._found(role, (width, d_model), layer) for role in roles[:2]]
        decoded = not self._go_together([self._format(each.type, d_model, each.name) for each in pair])
        for role in roles[:2]:
            self._matrix(role, (width, d_model), layer, decoded=decoded)
        self._matrix(roles[2], (d_model, width), layer)

    def _mixture(self, layer: int) -> None:
        h = self._plan.hyper
        self._matrix("ffn_gate_inp", (h.experts, h.d_model), layer)
        if h.router_biased:
            self._vector("ffn_gate_inp_bias", h.experts, layer)
        if h.selection_biased:
            self._vector("exp_probs_b", h.experts, layer)
        if h.d_ff_shared:
            self._feed_forward("ffn_{}_shexp", h.d_ff_shared, layer)
        if h.shared_gated:
            self._matrix("ffn_gate_inp_shexp", (1, h.d_model), layer)
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
            self._used.update(slab.tensor for slab in slabs)
            forms = {self._format(slab.type, columns, slab.tensor) for slab in slabs}
            if len(forms) != 1:
                raise ModelFileError(f"{self._file.label}: layer {layer}: experts differ in type for {role}")
            shapes.append(MatrixShape(form=forms.pop(), rows=rows, columns=columns))
            found = {slab.type.name: slab.type for slab in slabs}
            types.append(slabs[0].type if len(found) == 1 else None)
        if not self._go_together([shape.form for shape in shapes[:2]]):
            shapes[:2] = [replace(shape, form=self._decoded()) for shape in shapes[:2]]
        biases = self._expert_biases(layer) if h.expert_biased else []
        tiers = [_placed(self._held(shapes, types, precision), biases) for precision in self._plan.precisions]
        self._plan.tiers[layer] = tuple(matrices for matrices, _ in tiers)
        self._plan.precision_nbytes[layer] = tuple(nbytes for _, nbytes in tiers)
        self._plan.experts[layer] = self._plan.tiers[layer][0]
        self._plan.expert_nbytes[layer] = self._plan.precision_nbytes[layer][0]

    def _expert_biases(self, layer: int) -> list[MatrixShape]:
        """Check the biases of gate, up and down, and return how they lie in a slot."""
        h = self._plan.hyper
        lengths = (h.d_ff_expert, h.d_ff_expert, h.d_model)
        for role, length in zip(BIASES, lengths, strict=True):
            slab = names.expert_vector(self._file, role, layer, 0, h.experts, length)
            if slab.type.name != "F32":
                raise ModelFileError(
                    f"{self._file.label}: tensor {slab.tensor!r} is {slab.type.name}, expected F32"
                )
            self._used.add(slab.tensor)
        return [MatrixShape(form=Format.F32, rows=length, columns=1) for length in lengths]

    def _held(
        self, own: list[MatrixShape], types: list[TensorType | None], precision: str
    ) -> list[MatrixShape]:
        """Return what gate, up and down become in a precision: each smaller, or as the file has it.

        types: of the file, None where experts differ (they share a format, but are not converted).
        """
        held, types_held = list(own), {}
        for i, (shape, file_type) in enumerate(zip(own, types, strict=True)):
            tensor_type = file_type and held_type(file_type, precision, shape.rows, shape.columns)
            if tensor_type is not None and tensor_type is not file_type:
                form = format_of(tensor_type, shape.columns, self._file.label, self._plan.storage)
                held[i], types_held[i] = replace(shape, form=form), (kernel_type(tensor_type), form)
        if activation_kind(held[0].form) is not activation_kind(held[1].form):
            held[:2] = own[:2]  # they are multiplied with the same activations
            types_held = {i: tensor_type for i, tensor_type in types_held.items() if i == 2}
        self._plan.matrix_types.update(types_held.values())
        return held

    def _go_together(self, gate_and_up: list[Format]) -> bool:
        """Return whether both are multiplied with the same activations; else both are held as float16."""
        gate, up = map(activation_kind, gate_and_up)
        return gate is up

    def _decoded(self) -> Format:
        self._plan.matrix_types.add(("F16", Format.F16))
        return Format.F16

    def _matrix(
        self,
        key: str,
        shape: tuple[int, ...],
        layer: int | None = None,
        role: str | None = None,
        decoded: bool = False,
    ) -> MatrixShape:
        """Place a matrix; heads of a 3-D tensor lie under each other as rows. decoded: held as float16."""
        tensor = self._found(role or key, shape, layer)
        rows = shape[0] if len(shape) == 2 else shape[0] * shape[1]
        form = self._decoded() if decoded else self._format(tensor.type, shape[-1], tensor.name)
        packed = MatrixShape(form=form, rows=rows, columns=shape[-1])
        self._add_dense(_key(key, layer), tensor, "matrix", packed.nbytes, packed)
        return packed

    def _format(self, file_type: TensorType, columns: int, tensor: str) -> Format:
        form = format_of(file_type, columns, f"{self._file.label}: {tensor}", self._plan.storage)
        self._plan.matrix_types.add((kernel_type(file_type), form))
        return form

    def _vector(self, key: str, length: int, layer: int | None = None, role: str | None = None) -> None:
        tensor = self._found(role or key, (length,), layer)
        self._add_dense(_key(key, layer), tensor, "vector", 4 * length, None)

    def _raw(self, key: str, shape: tuple[int, ...]) -> None:
        tensor = self._found(key, shape)
        format_of(tensor.type, shape[-1], f"{self._file.label}: {tensor.name}")
        self._add_dense(key, tensor, "raw", tensor.nbytes, None)

    def _found(self, role: str, shape: tuple[int, ...], layer: int | None = None) -> TensorInfo:
        tensor = names.require(self._file, role, shape, layer)
        self._used.add(tensor.name)
        return tensor

    def _add_dense(
        self,
        key: str,
        tensor: TensorInfo,
        held: str,
        nbytes: int,
        shape: MatrixShape | None,
        cut: Cut | None = None,
    ) -> None:
        at = self._plan.dense_nbytes
        self._plan.dense[key] = DenseTensor(
            tensor=tensor, held=held, at=at, nbytes=nbytes, shape=shape, cut=cut
        )
        self._plan.dense_nbytes = at + align(nbytes)


def _placed(shapes: list[MatrixShape], biases: list[MatrixShape]) -> tuple[tuple[ExpertMatrix, ...], int]:
    """Return gate, up and down one after the other in a slot, then biases, and the bytes of the slot."""
    at = 0
    matrices = []
    roles = [*(f"ffn_{name}_exps" for name in PROJECTIONS), *BIASES]
    for role, shape in zip(roles, [*shapes, *biases], strict=False):
        matrices.append(ExpertMatrix(role=role, shape=shape, at=at))
        at += shape.nbytes
    return tuple(matrices), align(at, 4096)


def _key(role: str, layer: int | None) -> str:
    return role if layer is None else f"{layer}.{role}"
