"""Precision of experts: three classes, the names of their formats, and two rules for choosing.

The product's rule, which keeps a byte budget, is in budget.py. No conversion of weights in here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ....shm.errors import ConfigError


class PrecisionClass(IntEnum):
    """How precisely an expert is kept; the lower, the more precise."""

    HOT = 0
    WARM = 1
    COLD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """Where the classes begin, as shares of the greatest count, and the format of each class."""

    hot_percentile: float = 0.9
    cold_percentile: float = 0.3
    formats: tuple[str, str, str] = ("Q4_K", "Q3_K", "Q2_K")

    def __post_init__(self) -> None:
        """Raise ConfigError unless 0 < hot <= 1, 0 <= cold < 1 and cold < hot (a NaN is none of these)."""
        if not 0.0 < self.hot_percentile <= 1.0:
            raise ConfigError(f"hot_percentile {self.hot_percentile}: above 0, at most 1")
        if not 0.0 <= self.cold_percentile < 1.0:
            raise ConfigError(f"cold_percentile {self.cold_percentile}: at least 0, below 1")
        if not self.cold_percentile < self.hot_percentile:
            raise ConfigError(f"cold_percentile {self.cold_percentile}: below hot_percentile")


PRECISION_PRESETS = {
    "default": PrecisionConfig(),
    "memory-constrained": PrecisionConfig(
        hot_percentile=0.95, cold_percentile=0.4, formats=("Q4_K", "Q2_K", "Q2_K")
    ),
    "quality-focused": PrecisionConfig(
        hot_percentile=0.8, cold_percentile=0.2, formats=("Q5_K", "Q4_K", "Q3_K")
    ),
}


class ClassTable:
    """The class of each expert (uint8 (experts,)), and what can be asked about it."""

    def __init__(self, num_experts: int, formats: tuple[str, str, str]) -> None:
        self.formats = formats
        self.classes: npt.NDArray[np.uint8] = np.full(num_experts, PrecisionClass.COLD, np.uint8)

    def allocate(self, expert_id: int) -> PrecisionClass:
        """Return the class of an expert, COLD for an id out of range."""
        inside = 0 <= expert_id < len(self.classes)
        return PrecisionClass(int(self.classes[expert_id])) if inside else PrecisionClass.COLD

    def format_of(self, expert_id: int) -> str:
        """Return the name of the format in which an expert is kept."""
        return self.formats[self.allocate(expert_id)]

    def format_map(self) -> list[str]:
        """Return the format of every expert in the order of ids."""
        return [self.formats[c] for c in self.classes.tolist()]

    def class_counts(self) -> tuple[int, int, int]:
        """Return how many experts are hot, warm and cold."""
        hot, warm, cold = np.bincount(self.classes, minlength=3).tolist()
        return hot, warm, cold

    def experts_in(self, precision: PrecisionClass) -> list[int]:
        """Return the ids of a class in ascending order."""
        ids: list[int] = np.flatnonzero(self.classes == precision).tolist()
        return ids


class FractionOfMaxAllocator:
    """The rule of ruvllm (ADR-092): a class begins at a share of the greatest count (not at a percentile).

    With uniform use every expert is hot, with one dominant expert all others are cold. Counts are live,
    thresholds are those of the last `recompute_thresholds`; both 0 make every expert cold.
    """

    def __init__(self, num_experts: int, config: PrecisionConfig) -> None:
        self.config = config
        self.counts: npt.NDArray[np.int64] = np.zeros(num_experts, np.int64)
        self.hot_threshold = self.cold_threshold = 0

    def record(self, expert_ids: int | Iterable[int]) -> None:
        """Count the activation of one expert or several; ids out of range are skipped."""
        for i in [expert_ids] if isinstance(expert_ids, int) else expert_ids:
            if 0 <= i < len(self.counts):
                self.counts[i] += 1

    def recompute_thresholds(self) -> None:
        """Set both thresholds from the counts as they are."""
        most = int(self.counts.max(initial=0))
        if not most:
            self.hot_threshold = self.cold_threshold = 0
            return
        # ruvllm widens a float32 share: 0.8 of 100 is 80.0000012, and its ceiling 81.
        hot, cold = (float(np.float32(s)) for s in (self.config.hot_percentile, self.config.cold_percentile))
        self.hot_threshold = max(1, math.ceil(most * hot))
        self.cold_threshold = max(1, math.floor(most * cold))

    def table(self) -> ClassTable:
        """Return the classes by the live counts and the thresholds last computed."""
        table = ClassTable(len(self.counts), self.config.formats)
        if self.hot_threshold or self.cold_threshold:
            table.classes[(self.counts >= self.cold_threshold) & (self.counts > 0)] = PrecisionClass.WARM
            table.classes[self.counts >= self.hot_threshold] = PrecisionClass.HOT
        return table

    def allocate(self, expert_id: int) -> PrecisionClass:
        """Return the class of an expert, COLD for an id out of range."""
        return self.table().allocate(expert_id)

    def compute_percentile(self, expert_id: int) -> float:
        """Return the count as a share of the greatest, 0 if there is none or the id is out of range."""
        most = int(self.counts.max(initial=0))
        return self.count(expert_id) / most if most else 0.0

    def count(self, expert_id: int) -> int:
        """Return how often an expert was recorded, 0 for an id out of range."""
        return int(self.counts[expert_id]) if 0 <= expert_id < len(self.counts) else 0

    def total_activations(self) -> int:
        """Return the sum of all counts."""
        return int(self.counts.sum())

    def reset(self) -> None:
        """Forget counts and thresholds."""
        self.counts[:] = 0
        self.hot_threshold = self.cold_threshold = 0


def checked_costs(values: npt.ArrayLike, num_experts: int, what: str) -> npt.NDArray[Any]:
    """Return `values` as (experts, 3) float64, never rising (bytes) or falling (errors) in hot, warm, cold.

    Raises ConfigError for another shape, or a value that is negative or not finite.
    """
    array = np.asarray(values, np.float64)
    if array.shape not in {(3,), (num_experts, 3)}:
        raise ConfigError(f"{what} per precision class: {array.shape} is neither (3,) nor ({num_experts}, 3)")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ConfigError(f"{what} per precision class: finite and 0 or more")
    return np.broadcast_to(array, (num_experts, 3))
