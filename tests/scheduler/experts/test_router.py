"""The router: which experts, in which order, with which weights. No cache bonus in here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.scheduler.experts.router import Router, RouterConfig
from sterna.shm.errors import InternalError

from ... import oracles
from ...oracles import SIGMOID, SOFTMAX, SOFTMAX_SELECTED

GOLDEN = Path(__file__).parents[2] / "data" / "moe-golden.jsonl"
ROUTES = [case for case in map(json.loads, GOLDEN.read_text().splitlines()) if case["kind"] == "route"]
GATES = {"sigmoid": SIGMOID, "softmax": SOFTMAX}


def route(
    logits: npt.ArrayLike, k: int, *, bias: npt.ArrayLike | None = None, gating: int = SIGMOID,
    normalise: bool = True, scale: float = 1.0,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:  # fmt: skip
    """Route rows of logits, padded as a matrix product leaves them; return (selected, weights)."""
    rows = np.atleast_2d(np.asarray(logits, np.float32))
    count, experts = rows.shape
    padded = np.full((count + 1, -(-experts // 16) * 16), np.float32(1e9))
    padded[:count, :experts] = rows
    added = np.zeros(experts, np.float32) if bias is None else np.asarray(bias, np.float32)
    router = Router(
        RouterConfig(num_experts=experts, top_k=k, gating=gating, normalise=normalise, scale=scale), count + 1
    )
    router.selected[count], router.weights[count] = -7, -7.0
    router.route(padded, added, count, layer=3)
    assert (router.selected[count] == -7).all()
    assert (router.weights[count] == -7.0).all()
    return router.selected[:count], router.weights[:count]


PINNED = [
    pytest.param([0.1, 0.3, 0.5, 0.2, 0.4, 0.1, 0.2, 0.15], [2, 4], id="R1"),
    pytest.param([0.8, 0.1, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5], [0, 3, 5], id="R3"),
    pytest.param([0.3] * 4, [0, 1], id="R6"),
    pytest.param([-0.7] * 70, [0, 1], id="R6 of 70"),
    pytest.param([0.1, 0.4, 0.3, 0.2], [1, 2], id="R7"),
    pytest.param([0.4, 0.3, 0.5, 0.2], [2, 0], id="R9"),
    pytest.param([1.0, 2.0, 1.0, 2.0], [1, 3, 0, 2], id="ties go to the lower id, all of them"),
]


@pytest.mark.parametrize("gating", GATES.values(), ids=GATES)
@pytest.mark.parametrize(("logits", "expected"), PINNED)
def test_pinned_selections(logits: list[float], expected: list[int], gating: int) -> None:
    selected, _ = route(logits, len(expected), gating=gating)
    assert selected.tolist() == [expected]


@pytest.mark.parametrize("case", ROUTES, ids=[f"case {case['case']}" for case in ROUTES])
def test_golden_selections(case: dict[str, list]) -> None:  # type: ignore[type-arg]
    """Lines without an effective bonus; values that are not finite are never selected."""
    selected, _ = route([float(value) for value in case["logits"]], case["k"])  # type: ignore[call-overload]
    assert selected.tolist() == [case["selected"]]


def test_golden_selections_cover_what_they_should() -> None:
    assert len(ROUTES) > 50
    assert {"nan", "inf", "-inf"} <= {
        value for case in ROUTES for value in case["logits"] if isinstance(value, str)
    }


def test_r17_the_same_logits_give_the_same_selection() -> None:
    logits = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    first, second = route(logits, 4), route(logits, 4)
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("expert", [0, 1, 5])
def test_what_is_not_finite_is_never_selected(bad: float, expert: int) -> None:
    logits = np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    logits[expert] = bad
    expected = [e for e in range(6) if e != expert]
    selected, weights = route(logits, 5)
    assert selected.tolist() == [expected]
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("gating", GATES.values(), ids=GATES)
def test_too_few_finite_scores_are_an_error_that_names_the_layer(bad: float, gating: int) -> None:
    with pytest.raises(InternalError, match="layer 3"):
        route([[1.0, 2.0, 3.0], [bad, 1.0, bad]], 2, gating=gating)


def test_a_selection_bias_that_is_not_finite_excludes_its_expert() -> None:
    bias = [0.0, np.nan, np.inf, 0.0]
    assert route([0.0, 9.0, 9.0, 1.0], 2, bias=bias)[0].tolist() == [[3, 0]]


def test_selection_is_by_p_plus_bias_and_weights_are_from_p() -> None:
    """The bias counts for the selection only and is added behind the sigmoid."""
    logits, bias = [2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 9.0, 9.03]
    selected, weights = route(logits, 2, bias=bias, scale=1.8)
    assert selected.tolist() == [[2, 3]]  # 0.5 + 9 and 0.269 + 9.03
    p = 1 / (1 + np.exp(-np.array([0.0, -1.0])))
    np.testing.assert_allclose(weights[0], p / p.sum() * 1.8, rtol=1e-6)


def test_a_small_bias_spread_decides_between_near_equals() -> None:
    """A bias of 9 in float16 would round all of these to one value."""
    bias = np.full(8, 9.03, np.float32)
    bias[[6, 2]] += np.float32(0.002), np.float32(0.001)
    assert route(np.zeros(8), 3, bias=bias)[0].tolist() == [[6, 2, 0]]


@pytest.mark.parametrize("gating", GATES.values(), ids=GATES)
@pytest.mark.parametrize(
    ("experts", "k", "scale"), [(16, 2, 1.8), (64, 4, 1.8), (64, 8, 2.5), (3, 3, 1.0), (1, 1, 1.0)]
)
def test_normalised_weights_sum_to_the_scale(gating: int, experts: int, k: int, scale: float) -> None:
    """The scale is applied behind the normalisation."""
    rng = np.random.default_rng(experts)
    _, weights = route(rng.standard_normal((20, experts)) * 3, k, gating=gating, scale=scale)
    np.testing.assert_allclose(weights.sum(axis=1), scale, rtol=1e-6)
    assert (weights >= 0).all()


@pytest.mark.parametrize("gating", GATES.values(), ids=GATES)
def test_without_normalisation_weights_are_the_scaled_probabilities(gating: int) -> None:
    logits = np.random.default_rng(2).standard_normal((6, 16))
    selected, weights = route(logits, 4, gating=gating, normalise=False, scale=16.0)
    p = 1 / (1 + np.exp(-logits)) if gating == SIGMOID else oracles.softmax(logits)
    np.testing.assert_allclose(weights, np.take_along_axis(p, selected, 1) * 16, rtol=3e-6)


def test_the_sum_has_a_floor() -> None:
    """llama.cpp's smallest divisor, 6.1e-5: tiny probabilities are not blown up to full weights."""
    _, weights = route([-20.0, -21.0, -22.0], 2)
    p = np.exp([-20.0, -21.0])
    np.testing.assert_allclose(weights[0], p / oracles.SMALLEST_SUM, rtol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    selected, weights = route([500.0, -500.0, 88.0, -88.0, 0.0], 5, gating=SIGMOID)
    assert selected.tolist()[0][-2:] in ([3, 1], [1, 3])
    assert np.isfinite(weights).all()
    selected, weights = route([500.0, -500.0, 88.0, -88.0, 0.0], 3, gating=SOFTMAX)
    assert selected.tolist()[0][0] == 0
    np.testing.assert_allclose(weights[0], [1.0, 0.0, 0.0], atol=1e-6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1), experts=st.integers(1, 70),
    gating=st.sampled_from([*GATES.values(), SOFTMAX_SELECTED]), normalise=st.booleans(), data=st.data(),
)  # fmt: skip
def test_random_rows_agree_with_the_naive_router(
    seed: int, experts: int, gating: int, normalise: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, experts))
    rng = np.random.default_rng(seed)
    # Multiples of 1/8 without repetition: no two scores are so close that the last bit decides.
    logits = rng.permutation(np.arange(-35, 35))[:experts].astype(np.float64) / 8
    bias = np.zeros(experts, np.float32)
    selected, weights = route(logits, k, bias=bias, gating=gating, normalise=normalise, scale=1.8)
    expected, true = oracles.route_top_k(logits, bias, k, gating, normalise, 1.8)
    assert selected[0].tolist() == expected
    np.testing.assert_allclose(weights[0], true, rtol=5e-6, atol=1e-9)


def test_a_token_is_routed_as_alone() -> None:
    logits = np.random.default_rng(3).standard_normal((9, 33))
    together = route(logits, 4)
    for row in range(9):
        alone = route(logits[row], 4)
        assert alone[0].tobytes() == together[0][row].tobytes()
        assert alone[1].tobytes() == together[1][row].tobytes()
