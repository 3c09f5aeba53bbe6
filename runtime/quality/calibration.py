"""From a quality budget to what routing may lose: measured points of a model, and the rule without them.

In here: the files that `sterna calibrate` writes and how they are read between their points. Not in here:
measuring (`perplexity.py`), and the trades themselves (`workers.kernels.routing.top_k`).

A budget is a fraction of perplexity (0.005: half a percent more), an epsilon the mean share of the gate mass
that a token may lose in a layer. Tables lie in the user's cache, by the model file's identity, and beside the
model as STEM.calibration.json; of the same share of residents, the user's own counts.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...scheduler.spec import model_id
from ...shm.errors import NotPermitted
from ...workers.user_cache import user_cache
from ..protocol.messages import Basis

log = logging.getLogger("sterna.calibration")

# The embedded model's perplexity rose by 0.2 to 0.6 of what might be lost, with a half and a quarter of its
# experts in memory (models/tales-small.calibration.json); other models may be harmed more.
UNCALIBRATED_EPSILON = 1.0
# Digits with which shares are stored: 32 of 128 experts and 25 % must be the same.
SHARE_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Allowance:
    """Mean share of the gate mass that an answer may lose, and where that number comes from."""

    epsilon: float
    basis: Basis


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What one epsilon did to a text, against exact routing with the same memory."""

    epsilon: float
    delta: float
    """Rise of perplexity, as a fraction."""
    error: float
    """Standard error of `delta`."""
    misses: float | None
    """Experts read, as a share of those that exact routing read; None: not known."""
    swap_share: float
    """See `messages.RoutingFacts`."""
    lost_mass: float
    """See `messages.RoutingFacts`."""


class BudgetTable(msgspec.Struct, frozen=True, kw_only=True):
    """Points measured with a share of the experts in memory."""

    resident_share: float
    """Share of the routed experts that was in memory."""
    tokens: int
    date: str
    """ISO 8601, UTC."""
    perplexity: float
    margin: bool
    """Whether a budget must hold for delta plus its standard error."""
    points: list[Point]
    """In rising order of epsilon."""

    def epsilon(self, budget: float) -> float:
        """Return the largest epsilon whose cost is within `budget`, none beyond the largest measured.

        Costs are the running maximum over the points from (0, 0) on, straight lines between them.
        """
        costs = envelope(self.points, margin=self.margin)
        best = 0.0
        for (low, cost), (high, next_cost) in itertools.pairwise([(0.0, 0.0), *costs]):
            if cost > budget:
                break
            inside = 1.0 if next_cost <= budget else (budget - cost) / (next_cost - cost)
            best = low + (high - low) * inside
        return best


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """One file: the tables of one model file, recognised by its size."""

    model: str
    file_bytes: int
    tables: list[BudgetTable]


class Calibration:
    """What is known about one model file."""

    def __init__(self, tables: Sequence[BudgetTable]) -> None:
        """`tables`: at most one of each share."""
        self._tables = sorted(tables, key=lambda table: table.resident_share)
        self._warned = False

    @classmethod
    def load(cls, model: Path) -> Calibration:
        """Read the tables of the file `model`; tables that are damaged or of another model are left out."""
        tables: dict[float, BudgetTable] = {}
        for path in (beside(model), cache_path(model)):
            tables |= {table.resident_share: table for table in _read(path, model)}
        return cls(list(tables.values()))

    @property
    def shares(self) -> list[float]:
        """Shares of residents that were measured."""
        return [table.resident_share for table in self._tables]

    def allowance(self, budget: float, resident_share: float) -> Allowance:
        """Return what a budget allows with so large a share of the routed experts in memory.

        It is read off the table of the nearest share that is not larger: with more in memory less is
        traded. Without one it is UNCALIBRATED_EPSILON times the budget.
        """
        if budget <= 0:
            return Allowance(0.0, "given")
        fitting = [t for t in self._tables if t.resident_share <= resident_share + 10**-SHARE_DIGITS]
        if fitting:
            return Allowance(fitting[-1].epsilon(budget), "calibrated")
        if not self._warned:
            self._warned = True
            log.warning(
                "quality.uncalibrated resident_share=%.2f rule='lost mass %g times the budget'",
                resident_share, UNCALIBRATED_EPSILON,
            )  # fmt: skip
        return Allowance(min(1.0, UNCALIBRATED_EPSILON * budget), "uncalibrated")


def envelope(points: Sequence[Point], *, margin: bool) -> list[tuple[float, float]]:
    """Return (epsilon, cost) in rising order, costs never falling: the worst measured up to there.

    Perplexity cannot really fall with epsilon: where it seems to, it is noise.
    """
    rising = sorted(points, key=lambda point: point.epsilon)
    costs = [point.delta + (point.error if margin else 0.0) for point in rising]
    worst = itertools.accumulate(costs, max, initial=0.0)
    return [
        (point.epsilon, cost) for point, cost in zip(rising, itertools.islice(worst, 1, None), strict=True)
    ]


def beside(model: Path) -> Path:
    """Return where tables lie that come with a model file."""
    return model.with_suffix(".calibration.json")


def cache_path(model: Path) -> Path:
    """Return where this user's tables of a model file lie; they are void when the file changes."""
    name = hashlib.sha256(repr(model_id(str(model))).encode()).hexdigest()[:32]
    return user_cache() / "calibration" / f"{name}.json"


def store(path: Path, model: Path, table: BudgetTable) -> None:
    """Add a table to the file at `path`, replacing one with the same share; raises NotPermitted."""
    kept = [old for old in _read(path, model) if old.resident_share != table.resident_share]
    tables = sorted([*kept, table], key=lambda table: table.resident_share)
    whole = Stored(model=model.name, file_bytes=model.stat().st_size, tables=tables)
    text = msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n"
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(text)
        fresh.replace(path)
    except OSError as e:
        raise NotPermitted(f"cannot write {path}: {e.strerror}") from None


def _read(path: Path, model: Path) -> list[BudgetTable]:
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=Stored)
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as e:
        log.warning("calibration.unreadable path=%r error=%r", str(path), str(e))
        return []
    size = model.stat().st_size
    if stored.file_bytes != size:
        log.warning(
            "calibration.of_another_file path=%r bytes=%d model=%d", str(path), stored.file_bytes, size
        )
        return []
    return stored.tables
