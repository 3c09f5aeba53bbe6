"""A self-test at every start: each kernel that the model needs against plain arithmetic, on this CPU.

A miscompiled kernel, a CPU that lies about its features or a stale cache then ends the start with an
error instead of answering nonsense. It packs file bytes and multiplies, as loading and running a model
do, so that afterwards all of that is compiled. Worst inputs included: all codes 2, activations of -127
and 127. Integer sums of 8-bit and ternary matrices must be exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..shm.errors import InternalError
from .checkpoint.held.formats import ActivationKind, Format, MatrixShape, activation_kind
from .checkpoint.held.packing import matrix_entry, pack_matrix
from .checkpoint.held.samples import sample
from .checkpoint.types.table import TYPES_BY_NAME, dequantize
from .kernels.layers.activations import QuantizedRows
from .kernels.products.table import kernel_of
from .kernels.scratch import product_nbytes
from .kernels.target import TARGET

ROWS, COLUMNS, TOKENS = 40, 512, 11  # an odd number of groups, one tile and three single tokens

_EXACT = (Format.Q8, Format.TL1, Format.B3, Format.TL1_ROW, Format.TL1_TOKEN)

PROOF = (("F16", Format.F16), ("Q8_0", Format.Q8), ("TQ2_0", Format.TL1))
"""What shows that a target's instructions work: (file type, format)."""


@dataclass(frozen=True, slots=True)
class _Case:
    """A matrix in an arena, its true values (float64), and activations (int8 or float) as values."""

    name: str
    shape: MatrixShape
    arena: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float64]
    x: npt.NDArray[np.float32]


def run(matrix_types: Iterable[tuple[str, Format]] = PROOF) -> None:
    """Check quantising and every (file type, format) of `matrix_types`.

    Raises InternalError naming the kernel and the target that gave a wrong answer.
    """
    check_quantize()
    for name, form in matrix_types:
        check(name, form)


def check(name: str, form: Format) -> None:
    """Pack matrices of the file type `name` as `form`, and multiply; raises InternalError."""
    random = np.random.default_rng(20240806)
    for worst in (False, True):
        x = random.integers(-127, 128, (TOKENS, COLUMNS)).astype(np.float32)
        if worst:
            x[:] = np.where(random.integers(0, 2, COLUMNS), 127, -127)
        x[:, ::32] = 127.0  # so that every block's scale is 1 and quantising is exact
        raw = sample(TYPES_BY_NAME[name], ROWS, COLUMNS, random, worst=worst)
        shape = MatrixShape(form=form, rows=ROWS, columns=COLUMNS)
        arena = np.zeros(shape.nbytes, np.uint8)
        pack_matrix(raw, TYPES_BY_NAME[name], shape, arena, 0)
        weights = dequantize(TYPES_BY_NAME[name], raw, (ROWS, COLUMNS)).astype(np.float64)
        _require(_Case(name, shape, arena, weights, x))


def _require(case: _Case) -> None:
    """Multiply and compare; integer formats with scales that are powers of two must be exact."""
    shape, form = case.shape, case.shape.form
    reads = activation_kind(form)
    rows = QuantizedRows.allocate(TOKENS, COLUMNS, reads.block(COLUMNS) or COLUMNS)
    if reads is not ActivationKind.FLOAT:
        rows.fill(case.x, TOKENS)
    out = np.zeros((TOKENS, shape.groups * 16), np.float32)
    scratch = np.zeros(product_nbytes(COLUMNS, TOKENS), np.uint8)
    _, number, codes_at, scales_at, _ = matrix_entry(shape, 0)
    kernel_of(form)(
        number, case.arena, codes_at, scales_at, shape.groups, COLUMNS, case.x, rows.q, rows.scales,
        rows.sums,
        np.arange(TOKENS, dtype=np.int32), TOKENS, scratch, out, 0, shape.groups * 16,
    )  # fmt: skip
    x = case.x.astype(np.float64)
    expected = x @ case.weights.T
    # Other sums exceed the 24 bits of float32: they may be off by a few roundings of their largest terms.
    slack = 0.0 if form in _EXACT or reads is ActivationKind.FLOAT else 1e-6
    bound = slack * (np.abs(x) @ np.abs(case.weights.T))
    wrong = np.argwhere(~(np.abs(out[:, :ROWS] - expected) <= bound))
    if len(wrong):
        token, row = wrong[0].tolist()
        raise InternalError(
            f"self-test: the {case.name} kernel for {TARGET} gives {out[token, row]!r} instead of "
            f"{expected[token, row]!r} (row {row}, token {token}); set STERNA_KERNEL_TARGET=generic"
        )


def check_quantize() -> None:
    """Quantise integers, which is exact, in both block sizes; raises InternalError."""
    random = np.random.default_rng(20240806)
    x = random.integers(-127, 128, (TOKENS, COLUMNS)).astype(np.float32)
    x[:, ::32] = 127.0
    exact = x.astype(np.int32)
    for block in (32, 256):
        rows = QuantizedRows.allocate(TOKENS, COLUMNS, block)
        rows.fill(x, TOKENS)
        sums = exact.reshape(TOKENS, -1, block).sum(axis=2)
        if not (
            np.array_equal(rows.q, exact) and np.array_equal(rows.sums, sums) and (rows.scales == 1.0).all()
        ):
            raise InternalError(f"self-test: quantising activations by {block} is wrong on {TARGET}")
