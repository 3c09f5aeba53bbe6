"""From budgets to what may be lost: between measured points, never beyond them, and the rule without them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sterna.runtime.config import embedded_model
from sterna.runtime.quality.calibration import (
    UNCALIBRATED_EPSILON,
    Allowance,
    BudgetTable,
    Calibration,
    Point,
    beside,
    cache_path,
    envelope,
    store,
)
from sterna.shm.errors import NotPermitted


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a model file (only its name and size count), with an empty cache for its user."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    path = tmp_path / "tales.gguf"
    path.write_bytes(b"GGUF" * 10)
    return path


def table(share: float, *points: tuple[float, float], error: float = 0.0, margin: bool = True) -> BudgetTable:
    measured = [
        Point(epsilon=epsilon, delta=delta, error=error, misses=None, swap_share=0.0, lost_mass=0.0)
        for epsilon, delta in points
    ]
    return BudgetTable(
        resident_share=share, tokens=100, date="2026-01-01", perplexity=9.0, margin=margin, points=measured
    )


def test_between_points_lines_and_no_further_than_the_last() -> None:
    found = table(0.5, (0.02, 0.004), (0.06, 0.012))
    assert found.epsilon(0.004) == pytest.approx(0.02)
    assert found.epsilon(0.002) == pytest.approx(0.01)  # from (0, 0) on
    assert found.epsilon(0.006) == pytest.approx(0.03)
    assert found.epsilon(0.012) == found.epsilon(0.1) == 0.06
    assert found.epsilon(0.0) == 0.0
    assert table(0.5).epsilon(0.01) == 0.0  # interrupted before its first point


def test_what_noise_gained_counts_for_nothing() -> None:
    """A fall of perplexity is no gain; a larger epsilon costs what a smaller one did."""
    found = table(0.5, (0.01, -0.003), (0.02, 0.006), (0.04, 0.002), (0.08, 0.02))
    rising = [(0.01, 0.0), (0.02, 0.006), (0.04, 0.006), (0.08, 0.02)]
    assert envelope(found.points, margin=False) == rising
    assert found.epsilon(0.005) == pytest.approx(0.01 + 0.01 * 5 / 6)
    assert found.epsilon(0.006) == pytest.approx(0.04)
    grid = [found.epsilon(budget / 1000) for budget in range(25)]
    assert grid == sorted(grid)


def test_margin_is_one_standard_error() -> None:
    points = (0.02, 0.004), (0.06, 0.012)
    with_margin = table(0.5, *points, error=0.001)
    assert with_margin.epsilon(0.005) == pytest.approx(0.02)
    assert table(0.5, *points, error=0.001, margin=False).epsilon(0.004) == pytest.approx(0.02)


def test_nearest_share_that_is_not_larger() -> None:
    found = Calibration([table(0.25, (0.01, 0.01)), table(0.5, (0.04, 0.01))])
    assert found.allowance(0.01, 0.25) == Allowance(0.01, "calibrated")
    assert found.allowance(0.01, 0.49) == Allowance(0.01, "calibrated")
    assert found.allowance(0.01, 0.5) == found.allowance(0.01, 0.9) == Allowance(0.04, "calibrated")
    assert found.allowance(0.0, 0.9).epsilon == 0.0


def test_without_a_table_the_rule_holds_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    found = Calibration([table(0.5, (0.04, 0.01))])
    with caplog.at_level(logging.WARNING, "sterna.calibration"):
        for _ in range(3):
            assert found.allowance(0.01, 0.2) == Allowance(UNCALIBRATED_EPSILON * 0.01, "uncalibrated")
    (record,) = caplog.records
    assert record.getMessage().startswith("quality.uncalibrated resident_share=0.20 ")


def test_tables_of_the_user_go_before_those_beside_the_model(model: Path) -> None:
    assert Calibration.load(model).shares == []
    store(beside(model), model, table(0.5, (0.01, 0.01)))
    store(beside(model), model, table(0.25, (0.02, 0.01)))
    store(cache_path(model), model, table(0.5, (0.03, 0.01)))
    found = Calibration.load(model)
    assert found.shares == [0.25, 0.5]
    assert found.allowance(0.01, 0.5).epsilon == 0.03
    assert found.allowance(0.01, 0.3).epsilon == 0.02
    store(cache_path(model), model, table(0.5, (0.05, 0.01)))  # in the place of the first
    assert Calibration.load(model).allowance(0.01, 0.5).epsilon == 0.05
    assert [path.name for path in model.parent.iterdir() if path.is_file()] == [
        model.name,
        "tales.calibration.json",
    ]


def test_another_or_a_damaged_file_counts_for_nothing(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(beside(model), model, table(0.5, (0.01, 0.01)))
    model.write_bytes(b"GGUF" * 11)
    assert Calibration.load(model).shares == []
    for text in ("", "[]", '{"model": "x"}', '{"model": "x", "file_bytes": "y", "tables": []}'):
        beside(model).write_text(text)
        assert Calibration.load(model).shares == [], text
    assert [r.getMessage().split()[0] for r in caplog.records] == [
        "calibration.of_another_file",
        *["calibration.unreadable"] * 4,
    ]


def test_folder_that_cannot_be_written(model: Path) -> None:
    (model.parent / "cache").write_text("in the way")
    with pytest.raises(NotPermitted, match=r"cannot write .*cache"):
        store(cache_path(model), model, table(0.5))


def test_the_embedded_model_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    found = Calibration.load(embedded_model())
    assert found.shares == [0.25, 0.5]
    small, large = (found.allowance(budget, 0.5) for budget in (0.005, 0.03))
    assert small.basis == large.basis == "calibrated"
    assert 0 < small.epsilon < large.epsilon < 0.5
