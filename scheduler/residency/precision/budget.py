"""PrecisionAllocator: the class of each expert so that their bytes keep a budget and errors matter least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....shm.errors import ConfigError
from .classes import ClassTable, PrecisionClass, PrecisionConfig, checked_costs


@dataclass(frozen=True, slots=True)
class _Steps:
    """Upgrades in the order they are considered: expert, class after it, bytes."""

    experts: npt.NDArray[np.intp]
    classes: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.float64]


class PrecisionAllocator(ClassTable):
    """Greedy answer to a multiple-choice knapsack: upgrade where a byte saves the most error.

    Every expert begins cold; an upgrade costs bytes and saves mass * error, mass being how much the expert
    is used (activation counts or sums of gate weights). Upgrades are taken by error saved per byte while
    they fit (Sinha and Zoltners 1979: the answer is within one upgrade of the best). A class that no mixture
    needs (warm with the bytes of cold, say) is jumped over. Experts of no mass are upgraded last, lower ids
    first: bytes left over are used.
    Hysteresis: what an expert already has counts (1 + hysteresis) times, so that two experts of nearly the
    same use do not take turns; each change costs reading and converting an expert.
    """

    def __init__(
        self,
        num_experts: int,
        config: PrecisionConfig,
        *,
        class_bytes: npt.ArrayLike,
        class_errors: npt.ArrayLike,
        hysteresis: float = 0.25,
    ) -> None:
        """Take bytes and errors of hot, warm, cold: (3,) for all experts or (experts, 3).

        Raises ConfigError unless bytes fall and errors rise from hot to cold.
        """
        super().__init__(num_experts, config.formats)
        self.config = config
        self._bytes = checked_costs(class_bytes, num_experts, "bytes")
        self._errors = checked_costs(class_errors, num_experts, "errors")
        if (np.diff(self._bytes) > 0).any() or (np.diff(self._errors) < 0).any():
            raise ConfigError("precision classes: bytes must fall and errors rise from hot to cold")
        if not 0.0 <= hysteresis < np.inf:
            raise ConfigError(f"precision hysteresis {hysteresis}: 0 or more")
        self._hysteresis = hysteresis
        self._settled = False

    @property
    def smallest_bytes(self) -> int:
        """The bytes of all experts when cold: no budget below it can be kept."""
        return int(self._bytes[:, PrecisionClass.COLD].sum())

    @property
    def used_bytes(self) -> int:
        """The bytes of all experts in their present classes."""
        return int(np.take_along_axis(self._bytes, self.classes[:, None].astype(np.intp), 1).sum())

    def weighted_error(self, mass: npt.NDArray[np.float64]) -> float:
        """Return the sum over experts of mass * error of the present class."""
        errors = np.take_along_axis(self._errors, self.classes[:, None].astype(np.intp), 1)[:, 0]
        return float(mass @ errors)

    def rebalance(self, mass: npt.ArrayLike, budget_bytes: int) -> list[int]:
        """Choose all classes again; return the ids whose class changed, ascending.

        mass: (experts,), finite, 0 or more. Raises ConfigError, and changes nothing, for a wrong mass or a
        budget below `smallest_bytes`. The sum of bytes never exceeds the budget.
        """
        use = np.asarray(mass, np.float64)
        if use.shape != self.classes.shape or not np.isfinite(use).all() or (use < 0).any():
            raise ConfigError(f"activation mass: {len(self.classes)} finite numbers, 0 or more")
        if budget_bytes < self.smallest_bytes:
            raise ConfigError(
                f"precision budget {budget_bytes} bytes: all {len(self.classes)} experts cold need "
                f"{self.smallest_bytes}"
            )
        steps = self._steps(use)
        chosen = np.full_like(self.classes, PrecisionClass.COLD)
        left = float(budget_bytes - self.smallest_bytes)
        before = _classes_before(steps)
        for expert, to, from_, size in zip(
            steps.experts.tolist(), steps.classes.tolist(), before.tolist(), steps.sizes.tolist(), strict=True
        ):
            if size <= left and chosen[expert] == from_:
                chosen[expert] = to
                left -= size
        changed: list[int] = np.flatnonzero(chosen != self.classes).tolist()
        self.classes[:] = chosen
        self._settled = True
        return changed

    def _steps(self, mass: npt.NDArray[np.float64]) -> _Steps:
        """Return the upgrades on the lower convex hull of (bytes, error), best rate first."""
        (hot_b, warm_b, cold_b), (hot_e, warm_e, cold_e) = self._bytes.T, self._errors.T
        to_warm = _rates(cold_e - warm_e, warm_b - cold_b)
        to_hot = _rates(warm_e - hot_e, hot_b - warm_b)
        jump = to_hot >= to_warm
        first_class = np.where(jump, PrecisionClass.HOT, PrecisionClass.WARM).astype(np.uint8)
        first_size = np.where(jump, hot_b, warm_b) - cold_b
        first = mass * np.where(jump, _rates(cold_e - hot_e, hot_b - cold_b), to_warm)
        second = mass * to_hot
        if self._settled:
            keep = 1.0 + self._hysteresis
            first = np.where(self.classes <= first_class, first * keep, first)
            second = np.where(self.classes == PrecisionClass.HOT, second * keep, second)
        some = np.flatnonzero(np.where(jump, cold_e > hot_e, cold_e > warm_e))
        more = np.flatnonzero(~jump & (warm_e > hot_e))
        ids = np.concatenate((some, more))
        order = np.lexsort((ids, -np.concatenate((first[some], second[more]))))
        classes = np.concatenate((first_class[some], np.full(len(more), PrecisionClass.HOT, np.uint8)))
        sizes = np.concatenate((first_size[some], (hot_b - warm_b)[more]))
        return _Steps(ids[order], classes[order], sizes[order])


def _classes_before(steps: _Steps) -> npt.NDArray[np.uint8]:
    """Return the class each step starts from: cold, or warm for the second step of an expert."""
    before = np.full(len(steps.classes), PrecisionClass.COLD, np.uint8)
    has_warm = np.isin(steps.experts, steps.experts[steps.classes == PrecisionClass.WARM])
    before[has_warm & (steps.classes == PrecisionClass.HOT)] = PrecisionClass.WARM
    return before


def _rates(saved: npt.NDArray[np.float64], size: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return error saved per byte; very great where it costs none, 0 where it saves none."""
    rates = np.where(saved > 0, np.finfo(np.float64).max / 1e100, 0.0)
    return np.divide(saved, size, out=rates, where=size > 0)
