"""The precision in which each expert of a model is held, chosen under a byte budget. No numba.

What a class loses is taken from a table here, or measured on the model's own weights by
model/precision_errors.py, which needs numba.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ....shm.errors import ConfigError
from ....workers.checkpoint.held.precisions import FILE_PRECISION
from ...model.plan import ModelPlan
from .budget import PrecisionAllocator
from .classes import PRECISION_PRESETS, PrecisionConfig

TYPICAL_ERRORS: Final = {"Q5_K": 0.0013, "Q4_K": 0.0051, "Q3_K": 0.0209, "Q2_K": 0.071, "TQ2_0": 0.19}
"""Squared error / squares of Gaussian weights held as each type of `precisions.TARGETS`.

Measured in tests/workers/kernels/packing/test_encode.py.
"""


def preset_config(preset: str) -> PrecisionConfig:
    """Return the classes of a preset; raises ConfigError for an unknown name."""
    if preset not in PRECISION_PRESETS:
        raise ConfigError(f"precision {preset}: expected one of {', '.join(PRECISION_PRESETS)}")
    return PRECISION_PRESETS[preset]


def preset_precisions(preset: str) -> tuple[str, ...]:
    """Return the `precisions` with which a plan is made for a preset; raises ConfigError."""
    return (FILE_PRECISION, *dict.fromkeys(preset_config(preset).formats))


def typical_errors(plan: ModelPlan) -> npt.NDArray[np.float64]:
    """Return errors as `model.precision_errors.measure` does, from the table: a matrix that stays loses 0."""
    return np.array(
        [
            [
                sum(TYPICAL_ERRORS[name] for a, b in zip(held, tiers[0], strict=True) if a.shape != b.shape)
                / len(held)
                for name, held in zip(plan.precisions, tiers, strict=True)
            ]
            for tiers in plan.tiers.values()
        ],
        np.float64,
    ).reshape(len(plan.tiers), len(plan.precisions))


class ExpertPrecisions:
    """The allocator of a model's experts, and the precision that each class is on each layer.

    A class whose format is not smaller than the file's is the file's own, precision 0: hot experts are
    never held finer than they are in the file.
    """

    def __init__(
        self,
        plan: ModelPlan,
        preset: str,
        errors: npt.NDArray[np.float64],
        *,
        hysteresis: float = 0.25,
    ) -> None:
        """Take errors as `model.precision_errors.measure` gives them, (layers, precisions).

        Raises ConfigError for a preset that `plan` was not made for, or errors of another shape.
        """
        config = preset_config(preset)
        if missing := set(config.formats) - set(plan.precisions):
            raise ConfigError(f"precision {preset}: the plan lacks {', '.join(sorted(missing))}")
        if errors.shape != (len(plan.tiers), len(plan.precisions)):
            raise ConfigError(
                f"precision errors of shape {errors.shape}: {len(plan.tiers)} layers, "
                f"{len(plan.precisions)} precisions"
            )
        classes = [_layer_classes(plan, layer, config) for layer in plan.tiers]
        self._precisions = np.repeat(np.array(classes, np.int8), plan.hyper.experts, axis=0)
        nbytes = [
            [plan.precision_nbytes[layer][p] for p in row]
            for layer, row in zip(plan.tiers, classes, strict=True)
        ]
        lost = np.take_along_axis(errors, np.array(classes), axis=1)
        # Measured on a sample: a coarser class may seem better by chance.
        lost = np.maximum.accumulate(lost, axis=1)
        self.allocator = PrecisionAllocator(
            plan.num_experts,
            config,
            class_bytes=np.repeat(np.array(nbytes, np.float64), plan.hyper.experts, axis=0),
            class_errors=np.repeat(lost, plan.hyper.experts, axis=0),
            hysteresis=hysteresis,
        )

    def rebalance(self, counts: npt.ArrayLike, budget_bytes: int) -> npt.NDArray[np.int8]:
        """Return the precision of each expert by key, from how often each was used; see `PrecisionAllocator`.

        Raises ConfigError for a budget below `allocator.smallest_bytes`.
        """
        self.allocator.rebalance(counts, budget_bytes)
        chosen = self.allocator.classes[:, np.newaxis].astype(np.intp)
        return np.take_along_axis(self._precisions, chosen, axis=1)[:, 0]


def _layer_classes(plan: ModelPlan, layer: int, config: PrecisionConfig) -> list[int]:
    """Return the precisions of hot, warm and cold on a layer: bytes never rise, the file's own is 0."""
    sizes = plan.precision_nbytes[layer]
    chosen: list[int] = []
    for name in config.formats:
        precision = plan.precisions.index(name)
        if plan.tiers[layer][precision] == plan.tiers[layer][0]:
            precision = 0
        if chosen and sizes[precision] > sizes[chosen[-1]]:
            precision = chosen[-1]
        chosen.append(precision)
    return chosen
