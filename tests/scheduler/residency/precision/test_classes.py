"""The precision classes of ruvllm's MoE modules (ADR-092): its pinned table and golden vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sterna.scheduler.residency.precision.classes import (
    PRECISION_PRESETS,
    FractionOfMaxAllocator,
    PrecisionClass,
    PrecisionConfig,
)
from sterna.shm.errors import ConfigError

from ..reference.vectors import cases, number_of

GOLDEN = cases("precision")
HOT, WARM, COLD = PrecisionClass


def allocator(counts: list[int], hot: float = 0.9, cold: float = 0.3) -> FractionOfMaxAllocator:
    made = FractionOfMaxAllocator(len(counts), PrecisionConfig(hot_percentile=hot, cold_percentile=cold))
    made.counts[:] = counts
    made.recompute_thresholds()
    return made


@pytest.mark.parametrize(
    ("counts", "shares", "classes"),
    [
        ([100, 10], (0.9, 0.3), [HOT, COLD]),
        ([100, 50, 5], (0.9, 0.3), [HOT, WARM, COLD]),
        ([100, 75, 25, 5], (0.8, 0.2), [HOT, WARM, WARM, COLD]),
        ([100, 50, 35, 10], (0.9, 0.3), [HOT, WARM, WARM, COLD]),
        ([0, 0], (0.9, 0.3), [COLD, COLD]),
        ([7, 7, 7], (0.9, 0.3), [HOT, HOT, HOT]),
    ],
)
def test_pinned_classes(
    counts: list[int], shares: tuple[float, float], classes: list[PrecisionClass]
) -> None:
    made = allocator(counts, *shares)
    assert [made.allocate(i) for i in range(len(counts))] == classes
    assert made.allocate(len(counts)) is COLD


def test_pinned_numbers_per_class() -> None:
    table = allocator([100, 95, 50, 40, 35, 10, 5, 0]).table()
    assert table.class_counts() == (2, 3, 3)
    assert table.experts_in(WARM) == [2, 3, 4]
    assert table.format_map() == ["Q4_K"] * 2 + ["Q3_K"] * 3 + ["Q2_K"] * 3
    assert (table.format_of(0), table.format_of(99)) == ("Q4_K", "Q2_K")


def test_pinned_percentiles() -> None:
    made = allocator([100, 50, 25, 0])
    assert [made.compute_percentile(i) for i in range(5)] == [1.0, 0.5, 0.25, 0.0, 0.0]
    assert allocator([0]).compute_percentile(0) == 0.0


@pytest.mark.parametrize(("most", "expected"), [(100, (90, 30)), (200, (180, 60))])
def test_pinned_thresholds(most: int, expected: tuple[int, int]) -> None:
    """0.3 widened from float32 is 0.3000000119: its floor is 30."""
    made = allocator([most, 1])
    assert (made.hot_threshold, made.cold_threshold) == expected
    assert allocator([100], 0.8, 0.2).hot_threshold == 81


def test_pinned_totals_and_stale_thresholds() -> None:
    made = allocator([0] * 4)
    for i in (0, 1, 2):
        made.record(i)
    assert made.total_activations() == 3
    made.record([2, 2, 3, 0, 4, 100, -1])
    assert (made.total_activations(), made.count(2), made.count(100)) == (7, 3, 0)
    assert made.allocate(2) is COLD  # thresholds are still those of no counts
    made.recompute_thresholds()
    assert made.allocate(2) is HOT
    made.reset()
    assert (made.total_activations(), made.hot_threshold) == (0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hot_percentile": 0.0},
        {"hot_percentile": 1.1},
        {"cold_percentile": 1.0},
        {"cold_percentile": 0.9},
        {"hot_percentile": float("nan")},
        {"cold_percentile": float("nan")},
    ],
)
def test_configs_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="percentile"):
        PrecisionConfig(**wrong)  # type: ignore[arg-type]


def test_presets() -> None:
    found = {name: (p.hot_percentile, p.cold_percentile, p.formats) for name, p in PRECISION_PRESETS.items()}
    assert found == {
        "default": (0.9, 0.3, ("Q4_K", "Q3_K", "Q2_K")),
        "memory-constrained": (0.95, 0.4, ("Q4_K", "Q2_K", "Q2_K")),
        "quality-focused": (0.8, 0.2, ("Q5_K", "Q4_K", "Q3_K")),
    }


@pytest.mark.parametrize("case", GOLDEN, ids=number_of)
def test_golden_allocations(case: dict[str, Any]) -> None:
    config = PRECISION_PRESETS[{"memory": "memory-constrained", "quality": "quality-focused"}.get(
        case["preset"].split("_")[0].split("-")[0], "default"
    )]  # fmt: skip
    made = FractionOfMaxAllocator(len(case["counts"]), config)
    made.counts[:] = case["counts"]
    made.recompute_thresholds()
    assert (made.hot_threshold, made.cold_threshold) == (case["hot_thr"], case["cold_thr"])
    table = made.table()
    assert [PrecisionClass(c).name.lower() for c in table.classes.tolist()] == case["class"]
    assert list(table.class_counts()) == case["tier_counts"]
    percentile = [made.compute_percentile(i) for i in range(len(case["counts"]))]
    assert np.array(percentile, np.float32).tolist() == case["percentile"]


def test_golden_allocations_are_all_there() -> None:
    assert len(GOLDEN) == 30
    assert len({case["preset"] for case in GOLDEN}) == 3
