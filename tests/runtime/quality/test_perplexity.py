"""Differences of two runs with their error, and the search for what a budget allows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sterna.runtime.protocol.messages import RoutingFacts
from sterna.runtime.quality.calibration import BudgetTable, Point, envelope
from sterna.runtime.quality.perplexity import (
    MAX_EPSILON,
    RUNS_PER_BUDGET,
    Routing,
    mean_difference,
    next_epsilon,
    rise,
    search,
)


def test_rise_is_the_ratio_of_perplexities() -> None:
    rng = np.random.default_rng(1)
    exact = -rng.exponential(3.0, 4096)
    other = exact - rng.normal(0.01, 0.1, 4096)
    delta, error = rise(exact.tolist(), other.tolist())
    assert delta == pytest.approx(math.exp(-other.mean()) / math.exp(-exact.mean()) - 1)
    # The error of a mean of independent differences, though the log-probabilities vary thirty times as much.
    assert error == pytest.approx((1 + delta) * 0.1 / math.sqrt(4096), rel=0.25)
    assert rise(exact.tolist(), exact.tolist()) == (0.0, 0.0)
    assert mean_difference(exact.tolist(), other.tolist()) == pytest.approx(np.abs(exact - other).mean())


def test_error_counts_what_neighbours_share() -> None:
    """Differences in runs of 16 tokens count as one each: a sixteenth of them, four times the error."""
    rng = np.random.default_rng(2)
    exact = np.zeros(8192)
    single = rise(exact.tolist(), rng.normal(0, 0.1, 8192).tolist())[1]
    runs = rise(exact.tolist(), np.repeat(rng.normal(0, 0.1, 512), 16).tolist())[1]
    assert 3 < runs / single < 5
    assert rise([-1.0, -2.0], [-1.0, -2.5])[1] == math.inf  # too few to tell


def test_windows_add_up() -> None:
    def facts(events: int, swaps: int, lost: float) -> RoutingFacts:
        return RoutingFacts(
            epsilon=0.1, basis="given", events=events, changed=swaps, swaps=swaps, lost_mass=lost,
            swap_share=swaps / (2 * events), agreement=1 - swaps / events, credit_left=0.0,
        )  # fmt: skip

    routing = Routing(0.1, "given")
    for part in (facts(100, 10, 0.02), facts(300, 0, 0.06)):
        routing.add(part)
    shown = routing.shown()
    assert shown["events"] == 400
    assert shown["lost_mass"] == pytest.approx(0.05)
    assert shown["swap_share"] == pytest.approx(10 / 800)
    assert shown["agreement"] == pytest.approx(1 - 10 / 400)


@pytest.mark.parametrize("slope", [0.02, 0.2, 0.5, 3.0])
@pytest.mark.parametrize("noise", [0.0, 0.0005])
def test_search_comes_close_to_each_budget(slope: float, noise: float) -> None:
    """Costs rise as epsilon to the 1.2; the choice costs at most the budget, and not much less."""
    budgets = [0.03, 0.005, 0.01]
    signs = itertools.cycle((1, -1, 0))

    def measure(epsilon: float) -> Point:
        measured.append(epsilon)
        delta = slope * epsilon**1.2 + noise * next(signs)
        return Point(epsilon=epsilon, delta=delta, error=noise, misses=None, swap_share=0, lost_mass=0)

    measured: list[float] = []
    found = list(search(budgets, measure, margin=True))
    points = found[-1]
    assert [len(points) for points in found] == list(range(1, len(found) + 1))
    assert len(measured) == len(set(measured)) <= RUNS_PER_BUDGET * len(budgets)
    table = BudgetTable(resident_share=0.5, tokens=1, date="", perplexity=1.0, margin=True, points=points)
    chosen = [table.epsilon(budget) for budget in sorted(budgets)]
    assert chosen == sorted(chosen)
    for budget, epsilon in zip(sorted(budgets), chosen, strict=True):
        assert slope * epsilon**1.2 <= budget * 1.05
        if epsilon < MAX_EPSILON:  # the costs are noise and one error apart from the truth
            assert slope * epsilon**1.2 >= 0.6 * budget - 3 * noise


def test_next_epsilon_stops_where_enough_is_known() -> None:
    assert next_epsilon([(0.02, 0.0045)], 0.005) is None  # close to the budget
    assert next_epsilon([(0.02, 0.001), (0.022, 0.009)], 0.005) is None  # close to what is too much
    assert next_epsilon([(MAX_EPSILON, 0.001)], 0.005) is None  # nothing larger is tried
    first = next_epsilon([], 0.005)
    assert first is not None
    assert next_epsilon([(first, 0.1)], 0.005) == pytest.approx(0.2 * first)
    assert envelope([], margin=True) == []
