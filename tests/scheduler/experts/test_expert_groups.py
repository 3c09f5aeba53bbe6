"""Routing with groups of experts (DeepSeek-V2, -V3) and with the softmax of the selected (gpt-oss)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.scheduler.experts.router import Router, RouterConfig, probabilities
from sterna.shm.errors import InternalError
from sterna.workers.gating import SIGMOID, SOFTMAX, SOFTMAX_SELECTED
from sterna.workers.kernels.routing.top_k import CREDIT, LOST, SWAPS

from ... import oracles

Floats = npt.NDArray[np.float32]


def router(experts: int, k: int, gating: int, groups: int, used: int, **changes: object) -> Router:
    fields: dict[str, object] = {
        "num_experts": experts, "top_k": k, "gating": gating, "normalise": True, "scale": 2.5,
        "groups": groups, "groups_used": used, "window": experts,
    }  # fmt: skip
    return Router(RouterConfig(**{**fields, **changes}), 8)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1), gating=st.sampled_from([SOFTMAX, SIGMOID, SOFTMAX_SELECTED]),
    shape=st.sampled_from([(8, 4, 2), (32, 8, 4), (12, 3, 1), (6, 6, 3), (8, 2, 2), (160, 8, 3)]),
    biased=st.booleans(),
)  # fmt: skip
def test_groups_agree_with_the_naive_router(
    seed: int, gating: int, shape: tuple[int, int, int], biased: bool
) -> None:
    experts, groups, used = shape
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((8, experts)).astype(np.float32)
    bias = (rng.standard_normal(experts) * 0.3 * biased).astype(np.float32)
    k = min(6, experts // groups * used)
    r = router(experts, k, gating, groups, used)
    r.route(logits, bias, 8, 0, runner_ups=True)
    for t in range(8):
        expected, weights = oracles.route_top_k(logits[t], bias, k, gating, True, 2.5, groups, used)
        every, _ = oracles.route_top_k(logits[t], bias, experts, gating, True, 1.0, groups, used)
        assert r.selected[t].tolist() == expected
        np.testing.assert_allclose(r.weights[t], weights, rtol=5e-6)
        assert r.ranked[t].tolist() == every + [-1] * (experts - len(every))


def test_a_group_is_judged_by_its_best_or_by_its_two_best() -> None:
    """Group 0 holds the best expert of all, group 1 the best pair."""
    logits = np.array([[3.0, -3.0, -3.0, 2.0, 2.0, -3.0]], np.float32)
    none = np.zeros(6, np.float32)
    for gating, expected in ((SOFTMAX, [0, 1]), (SIGMOID, [3, 4])):
        r = router(6, 2, gating, 2, 1)
        r.route(logits, none, 1, 0)
        assert r.selected[0].tolist() == expected


def test_equal_groups_and_experts_go_to_the_lower() -> None:
    for gating in (SOFTMAX, SIGMOID, SOFTMAX_SELECTED):
        r = router(12, 4, gating, 4, 2)
        r.route(np.zeros((1, 12), np.float32), np.zeros(12, np.float32), 1, 0, runner_ups=True)
        assert r.ranked[0].tolist() == [0, 1, 2, 3, 4, 5, *[-1] * 6]


def test_what_is_not_finite_closes_no_other_group() -> None:
    logits = np.zeros((1, 8), np.float32)
    logits[0, 4:] = [-np.inf, 9.0, 8.0, np.inf]
    r = router(8, 2, SIGMOID, 2, 1)
    r.route(logits, np.zeros(8, np.float32), 1, 0)
    assert r.selected[0].tolist() == [5, 6]


def test_huge_biases_still_leave_groups_to_close() -> None:
    bias = np.full(8, 3e38, np.float32)
    r = router(8, 2, SIGMOID, 4, 2)
    r.route(np.zeros((1, 8), np.float32), bias, 1, 0, runner_ups=True)
    assert r.ranked[0].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


@pytest.mark.parametrize("seed", range(5))
def test_trades_stay_within_the_groups_that_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, none = rng.standard_normal((8, 32)).astype(np.float32), np.zeros(32, np.float32)
    r = router(32, 6, SIGMOID, 8, 3, keep=1, share=1.0)
    accounts = np.tile(np.array([50.0, 0, 0, 0, 0]), (8, 1))
    resident = (rng.random(32) < 0.5).astype(np.uint8)
    streams = np.arange(8, dtype=np.int32)
    r.route_within(logits, none, 8, 0, streams, np.full(8, 1.0), resident, accounts)
    assert accounts[:, SWAPS].sum() > 0
    for t in range(8):
        usable, _ = oracles.route_top_k(logits[t], none, 32, SIGMOID, True, 1.0, 8, 3)
        assert set(r.selected[t].tolist()) <= set(usable)
        assert len(set(r.selected[t].tolist())) == 6


def _softmax32(logits: Floats) -> Floats:
    return oracles.softmax(logits.astype(np.float64)).astype(np.float32)


def test_weights_of_the_selected_are_their_softmax_whatever_normalise_says() -> None:
    logits = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32) * 4
    for normalise in (False, True):
        r = router(32, 4, SOFTMAX_SELECTED, 1, 1, normalise=normalise, scale=1.0)
        r.route(logits, np.zeros(32, np.float32), 8, 0)
        assert (r.selected == np.argsort(-logits, axis=1)[:, :4]).all()
        chosen = np.take_along_axis(logits, r.selected.astype(np.int64), 1).astype(np.float64)
        np.testing.assert_allclose(r.weights, oracles.softmax(chosen), rtol=3e-6)


def test_a_budget_trades_softmax_of_the_selected_by_mass() -> None:
    """One trade: it costs the difference of the masses, and the others keep their weights."""
    logits = np.array([[4.0, 3.0, 2.0, 1.9, 0.0, -1.0]], np.float32)
    p = _softmax32(logits[0]).astype(np.float64)
    resident = np.array([1, 1, 0, 1, 1, 1], np.uint8)
    accounts = np.array([[1.0, 0, 0, 0, 0]])
    r = router(6, 3, SOFTMAX_SELECTED, 1, 1, share=1.0, scale=1.0)
    r.route_within(
        logits, np.zeros(6, np.float32), 1, 0, np.zeros(1, np.int32), np.full(1, 1.0), resident, accounts
    )
    assert r.selected[0].tolist() == [0, 1, 3]
    mass = p[:3].sum()
    np.testing.assert_allclose(r.weights[0], p[[0, 1, 3]] / mass, rtol=1e-5)
    assert accounts[0, LOST] == pytest.approx((p[2] - p[3]) / mass, rel=1e-4)
    assert accounts[0, CREDIT] == pytest.approx(2.0 - accounts[0, LOST], rel=1e-6)


def test_probabilities_of_the_softmax_of_the_selected_are_over_all() -> None:
    logits = np.random.default_rng(2).standard_normal((3, 8)).astype(np.float32)
    assert (probabilities(logits, SOFTMAX_SELECTED) == probabilities(logits, SOFTMAX)).all()


@pytest.mark.parametrize(
    ("groups", "used", "k"), [(0, 0, 1), (3, 1, 1), (4, 5, 2), (4, 0, 1), (4, 1, 3), (1, 1, 9)]
)
def test_groups_that_cannot_be_are_refused(groups: int, used: int, k: int) -> None:
    with pytest.raises(InternalError, match="experts"):
        router(8, k, SIGMOID, groups, used)
