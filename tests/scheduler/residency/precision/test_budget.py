"""Precision under a byte budget: the budget is kept, the answer is near the best, and it does not flutter."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.scheduler.residency.precision.budget import PrecisionAllocator
from sterna.scheduler.residency.precision.classes import PRECISION_PRESETS, PrecisionClass, PrecisionConfig
from sterna.shm.errors import ConfigError

HOT, WARM, COLD = PrecisionClass
BYTES, ERRORS = (144, 110, 84), (0.01, 0.03, 0.09)  # per 256 weights of Q4_K, Q3_K, Q2_K


def allocator(n: int, hysteresis: float = 0.25) -> PrecisionAllocator:
    return PrecisionAllocator(
        n, PrecisionConfig(), class_bytes=BYTES, class_errors=ERRORS, hysteresis=hysteresis
    )


def test_bytes_go_where_the_use_is() -> None:
    made = allocator(4)
    assert made.rebalance([10, 1, 5, 0], 4 * 84) == []
    made.rebalance([10, 1, 5, 0], 4 * 84 + 26)
    assert made.classes.tolist() == [WARM, COLD, COLD, COLD]
    made.rebalance([10, 1, 5, 0], 4 * 84 + 26 + 26 + 34)
    assert made.classes.tolist() == [HOT, COLD, WARM, COLD]
    assert made.used_bytes == 4 * 84 + 86
    assert made.format_map() == ["Q4_K", "Q2_K", "Q3_K", "Q2_K"]
    assert made.rebalance([0, 0, 0, 0], 4 * 144) == [1, 2, 3]  # bytes left over are used
    assert made.class_counts() == (4, 0, 0)


@settings(max_examples=60)
@given(n=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), room=st.floats(0, 1.1))
def test_budget_is_kept_and_the_answer_is_within_one_upgrade_of_the_best(
    n: int, seed: int, room: float
) -> None:
    """Bytes and errors differ per expert; the best is found by trying all."""
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(1, 200, (n, 3)), axis=1)[:, ::-1]
    errors = np.sort(rng.random((n, 3)), axis=1)
    mass = rng.integers(0, 50, n).astype(float)
    made = PrecisionAllocator(n, PrecisionConfig(), class_bytes=sizes, class_errors=errors)
    budget = int(sizes[:, 2].sum() + room * (sizes[:, 0] - sizes[:, 2]).sum())
    made.rebalance(mass, budget)
    assert made.used_bytes == sizes[np.arange(n), made.classes].sum() <= budget
    best = min(
        sum(mass[i] * errors[i, c] for i, c in enumerate(choice))
        for choice in product(range(3), repeat=n)
        if sum(sizes[i, c] for i, c in enumerate(choice)) <= budget
    )
    largest_upgrade = (mass * (errors[:, 2] - errors[:, 0])).max()
    assert best - 1e-9 <= made.weighted_error(mass) <= best + largest_upgrade + 1e-9


def test_two_alike_experts_do_not_take_turns() -> None:
    made, eager = allocator(2), allocator(2, hysteresis=0.0)
    budget = 84 + 110
    for each in (made, eager):
        assert each.rebalance([10, 9], budget) == [0]
    changes = {made: 0, eager: 0}
    for step in range(10):
        for each in changes:
            changes[each] += len(each.rebalance([10, 11] if step % 2 == 0 else [11, 10], budget))
    assert changes == {made: 0, eager: 20}
    assert made.rebalance([10, 13], budget) == [0, 1]  # above 1.25 times
    assert made.classes.tolist() == [COLD, WARM]


def test_a_class_that_costs_as_much_as_the_next_is_jumped_over() -> None:
    config = PRECISION_PRESETS["memory-constrained"]
    made = PrecisionAllocator(3, config, class_bytes=(144, 84, 84), class_errors=(0.01, 0.09, 0.09))
    made.rebalance([3, 2, 1], 3 * 84 + 2 * 60)
    assert made.classes.tolist() == [HOT, HOT, COLD]
    assert made.rebalance([3, 2, 1], 3 * 84 + 60) == [1]
    flat = PrecisionAllocator(2, config, class_bytes=(144, 110, 84), class_errors=(0.1, 0.1, 0.1))
    assert flat.rebalance([1, 1], 1000) == []  # nothing gained, nothing spent


@pytest.mark.parametrize(
    ("sizes", "errors", "text"),
    [
        ((1, 2, 3), ERRORS, "bytes must fall"),
        (BYTES, (0.3, 0.2, 0.1), "errors rise"),
        ((1, 2), ERRORS, "neither"),
        ((float("inf"), 2, 1), ERRORS, "finite"),
    ],
)
def test_costs_are_checked(sizes: tuple[float, ...], errors: tuple[float, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PrecisionAllocator(4, PrecisionConfig(), class_bytes=sizes, class_errors=errors)


def test_what_cannot_be_kept_is_refused() -> None:
    made = allocator(4)
    with pytest.raises(ConfigError, match="335 bytes: all 4 experts cold need 336"):
        made.rebalance([1, 1, 1, 1], 335)
    for mass in ([1, 1], [1, 1, 1, float("nan")], [1, 1, 1, -1]):
        with pytest.raises(ConfigError, match="activation mass"):
            made.rebalance(mass, 1000)
    assert made.class_counts() == (0, 0, 4)
