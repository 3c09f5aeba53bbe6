"""What precisions lose on a model's own weights: a few experts of each layer, converted and compared."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from ...workers.checkpoint.file import names
from ...workers.checkpoint.file.gguf import GgufFile
from ...workers.checkpoint.held.convert import Converter
from ...workers.checkpoint.held.precisions import conversion
from .plan import PROJECTIONS, ModelPlan

SAMPLED_ROWS = 64
"""Rows of each sampled matrix: 64 rows of 2048 weights give the error within about 1 %."""


def measure(file: GgufFile, plan: ModelPlan, experts: int = 2) -> npt.NDArray[np.float64]:
    """Return relative squared errors, (layers in the order of `plan.tiers`, precisions), of `experts` each.

    The first column is 0. The mean over gate, up and down and over experts spread evenly; each counts the
    same. Reads the first rows of each. Raises ModelFileError for weights that are not finite.
    """
    converter = Converter()
    total = plan.hyper.experts
    picked = range(0, total, max(1, total // max(1, min(experts, total))))
    found = np.zeros((len(plan.tiers), len(plan.precisions)), np.float64)
    for at, (layer, tiers) in enumerate(plan.tiers.items()):
        for precision in range(len(tiers)):
            errors = [
                _error(file, plan, converter, layer, expert, precision, i)
                for expert in picked
                for i in range(len(PROJECTIONS))
            ]
            found[at, precision] = float(np.mean(errors))
    return found


def _error(
    file: GgufFile, plan: ModelPlan, converter: Converter, layer: int, expert: int, precision: int, i: int
) -> float:
    """Return the relative squared error of one matrix in one precision, 0 where it stays as it is."""
    matrix = plan.tiers[layer][precision][i]
    rows, columns = matrix.shape.rows, matrix.shape.columns
    slab = names.expert_slab(file, matrix.role, layer, expert, plan.hyper.experts, rows, columns)
    target = conversion(slab.type, matrix.shape.form)
    if target is None:
        return 0.0
    rows = min(rows, SAMPLED_ROWS)
    raw = np.frombuffer(
        os.pread(file.fds[slab.file], slab.type.nbytes((rows, columns)), slab.offset), np.uint8
    )
    return converter.error(raw, slab.type, rows, columns, target)
