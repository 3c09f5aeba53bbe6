"""Choosing tokens: filters against a naive twin, draws that repeat, and their distribution."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.scheduler.messages import Sampling
from sterna.scheduler.sampling import choose, log_normaliser, score, uniform

F32 = npt.NDArray[np.float32]


def sampling(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 1
) -> Sampling:
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)


def random_logits(seed: int, count: int, spread: float = 3.0) -> F32:
    return (np.random.default_rng(seed).standard_normal(count) * spread).astype(np.float32)


def distribution(logits: F32, s: Sampling) -> dict[int, float]:
    """Return what the filters leave, in plain Python: {token: probability}."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if s.top_k:
        order = order[: s.top_k]
    weight = {i: math.exp(float(logits[i]) - float(logits[order[0]])) for i in order}
    total = sum(weight.values())
    if s.top_p < 1.0:
        kept, reached = [], 0.0
        for i in order:
            kept.append(i)
            reached += weight[i] / total
            if reached >= s.top_p:
                break
        order = kept
    if s.min_p:
        order = [i for i in order if weight[i] >= s.min_p * weight[order[0]]]
    heated = {i: math.exp((float(logits[i]) - float(logits[order[0]])) / s.temperature) for i in order}
    total = sum(heated.values())
    return {i: value / total for i, value in heated.items()}


def twin(logits: F32, s: Sampling, position: int) -> int:
    """Return the token whose interval of the cumulated distribution holds the position's number."""
    left = uniform(s.seed, position)
    for token, p in distribution(logits, s).items():
        left -= p
        if left < 0:
            return token
    return token


def clear_of_edges(logits: F32, s: Sampling, position: int) -> bool:
    """Return whether rounding cannot decide: the draw and the top_p cut lie away from every edge."""
    edges = np.cumsum(list(distribution(logits, s).values()))
    whole = np.cumsum(list(distribution(logits, sampling(top_k=s.top_k)).values()))
    drawn = uniform(s.seed, position)
    return bool(np.abs(edges - drawn).min() > 1e-9 and np.abs(whole - s.top_p).min() > 1e-9)


def test_greedy_takes_the_largest_and_the_lower_id_of_equals() -> None:
    logits = random_logits(1, 2048)
    assert choose(logits, sampling(0.0), 5) == int(logits.argmax())
    logits[[7, 1000]] = 99.0
    assert choose(logits, sampling(0.0, top_k=1, seed=9), 5) == 7


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    logits_seed=st.integers(0, 2**32 - 1), count=st.integers(1, 300), position=st.integers(0, 5000),
    seed=st.integers(0, 2**64 - 1), temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 299, 1000]), top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01, 0.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)  # fmt: skip
def test_draws_are_those_of_the_naive_twin(
    logits_seed: int, count: int, position: int, seed: int, temperature: float, top_k: int, top_p: float,
    min_p: float,
) -> None:  # fmt: skip
    logits = random_logits(logits_seed, count)
    s = sampling(temperature, top_k, top_p, min_p, seed)
    if clear_of_edges(logits, s, position):
        assert choose(logits, s, position) == twin(logits, s, position)


def reachable(logits: F32, s: Sampling) -> set[int]:
    return {choose(logits, s, position) for position in range(1000)}


def test_top_k_leaves_the_k_best_and_lower_ids_of_equals() -> None:
    logits = np.array([1.0, 2.0, 2.0, 2.0, 0.0, 2.0], np.float32)
    assert reachable(logits, sampling(top_k=2)) == {1, 2}
    assert reachable(logits, sampling(top_k=3)) == {1, 2, 3}
    assert reachable(logits, sampling(top_k=5)) == {0, 1, 2, 3, 5}
    assert reachable(logits, sampling(top_k=1)) == {1}


def test_top_p_leaves_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert reachable(logits, sampling(top_p=0.39)) == {1}
    assert reachable(logits, sampling(top_p=0.41)) == {1, 3}
    assert reachable(logits, sampling(top_p=0.69)) == {1, 3}
    assert reachable(logits, sampling(top_p=0.71)) == {1, 3, 2}
    assert reachable(logits, sampling(top_p=0.0)) == {1}
    assert reachable(logits, sampling(top_p=0.999999)) == {0, 1, 2, 3}


def test_min_p_is_relative_to_the_best() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert reachable(logits, sampling(min_p=0.51)) == {1, 3}
    assert reachable(logits, sampling(min_p=0.49)) == {1, 2, 3}
    assert reachable(logits, sampling(min_p=1.0)) == {1}


def test_filters_look_at_the_logits_before_the_temperature() -> None:
    """llama.cpp's default order: a hot draw chooses among what a cool one would."""
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert reachable(logits, sampling(100.0, top_p=0.41)) == {1, 3}


def test_the_same_seed_and_position_give_the_same_token() -> None:
    logits = random_logits(2, 500)
    tokens = [choose(logits, sampling(seed=7), position) for position in range(200)]
    assert tokens == [choose(logits.copy(), sampling(seed=7), position) for position in range(200)]
    assert tokens != [choose(logits, sampling(seed=8), position) for position in range(200)]
    assert len(set(tokens)) > 20


def test_extremes_neither_warn_nor_leave_the_vocabulary() -> None:
    logits = random_logits(3, 100)
    logits[5], logits[50] = 1e30, -np.inf
    for temperature in (1e-6, 1e6):
        assert choose(logits, sampling(temperature), 1) in range(100)
    assert reachable(logits, sampling(1e-3)) == {5}
    assert choose(np.array([-3.0], np.float32), sampling(top_k=40, top_p=0.5), 1) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = random_logits(4, 30, 1.5)
    s = sampling(temperature, top_p=0.98)
    expected = distribution(logits, s)
    drawn = [choose(logits, s, position) for position in range(8_000)]
    squares = 0.0
    for token, p in expected.items():
        squares += (drawn.count(token) - 8_000 * p) ** 2 / (8_000 * p)
    assert set(drawn) <= set(expected)
    # Chi-square with n - 1 degrees of freedom: mean n - 1, variance 2 (n - 1); six deviations.
    freedom = len(expected) - 1
    assert squares < freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_uniform_numbers_are_flat_and_lie_in_0_1(vary: str) -> None:
    """Over one stream's positions, and over the first position of streams with neighbouring seeds."""
    numbers = np.array([uniform(1, i) if vary == "position" else uniform(i, 17) for i in range(50_000)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 99 + 6 * math.sqrt(2 * 99)
    following = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(following) < 6 / math.sqrt(50_000)


@given(seed=st.integers(-(2**70), 2**70), position=st.integers(0, 2**40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_seed_gives_a_number_below_one(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0


def test_streams_do_not_share_a_sequence() -> None:
    """Seed s at position p must not equal seed s + 1 at p - 1: neighbours would speak in chorus."""
    numbers = {(seed, position): uniform(seed, position) for seed in range(60) for position in range(60)}
    assert len(set(numbers.values())) == len(numbers)


@pytest.mark.parametrize("top_n", [0, 1, 5, 100, 200])
def test_scores_are_log_softmax(top_n: int) -> None:
    logits = random_logits(5, 100)
    wide = logits.astype(np.float64)
    true = wide - np.log(np.exp(wide).sum())
    found = score(logits, 17, top_n)
    assert found.logprob == pytest.approx(true[17], abs=1e-12)
    best = np.argsort(-logits, kind="stable")[:top_n]
    assert [token for token, _ in found.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in found.top], true[best], atol=1e-12)


def test_scores_of_equal_logits_list_lower_ids_first() -> None:
    logits = np.zeros(50, np.float32)
    logits[[30, 10]] = 1.0
    assert [token for token, _ in score(logits, 0, 4).top] == [10, 30, 0, 1]


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([1e30, 1e30, -1e30], np.float32)
    assert log_normaliser(logits) == pytest.approx(1e30, rel=1e-6)
    found = score(np.array([90.0, 100.0], np.float32), 0, 2)
    assert found.logprob == pytest.approx(-10.0 - math.log1p(math.exp(-10.0)), abs=1e-9)
    assert math.exp(found.top[0][1]) + math.exp(found.top[1][1]) == pytest.approx(1.0)
