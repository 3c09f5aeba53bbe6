"""The expert predictor: ruvllm's pinned numbers (ADR-092), naive twins of its kernels, and the meter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.scheduler.residency.predictor import ExpertPredictor
from sterna.scheduler.residency.prefetch_meter import PrefetchMeter
from sterna.shm.errors import ConfigError


def test_pinned_probabilities() -> None:
    predictor = ExpertPredictor.from_history([[2, 5], [3, 7]], 8)
    assert predictor.observations() == 4
    assert [predictor.probability(2, b) for b in (3, 7, 0)] == pytest.approx([0.2, 0.2, 0.1])
    assert predictor.probability(8, 0) == predictor.probability(0, -1) == 0.0


def test_pinned_predictions() -> None:
    alternating = ExpertPredictor.from_history([[2], [5]] * 10, 8)
    assert alternating.predict_next([2], 3)[0] == 5
    assert 2 not in alternating.predict_next([2], 7)
    nothing = ExpertPredictor.from_history([[1, 2]])
    assert (nothing.observations(), nothing.num_experts) == (0, 64)
    assert nothing.predict_next([0], 3) == [1, 2, 3]


class Naive:
    """The contract of the kernels in float64, one layer."""

    def __init__(self, n: int, decay: float, cap: int) -> None:
        self.counts = np.zeros((n, n), np.int64)
        self.recency = np.zeros(n)
        self.decay, self.cap, self.n = decay, cap, n

    def observe(self, previous: list[int], selected: list[int]) -> None:
        self.recency *= self.decay
        self.recency[selected] = 1
        for a in previous:
            for b in selected:
                self.counts[a, b] += 1
            if self.counts[a].sum() >= self.cap:
                self.counts[a] //= 2

    def scores(self, current: list[int], weight: float) -> list[float]:
        n = self.n
        logs = [np.log((self.counts[a] + 0.1) / (self.counts[a].sum() + 0.1 * n)) for a in current]
        scores = np.mean(logs, axis=0) + weight * self.recency
        return [s if self.recency[b] > 0 else -math.inf for b, s in enumerate(scores.tolist())]


@settings(max_examples=40)
@given(
    n=st.integers(3, 40), tokens=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), cap=st.integers(4, 80)
)
def test_kernels_agree_with_naive_twins(n: int, tokens: int, seed: int, cap: int) -> None:
    rng = np.random.default_rng(seed)
    predictor = ExpertPredictor(num_layers=3, num_experts=n, recency_decay=0.9, row_cap=cap)
    naive = Naive(n, 0.9, cap)
    previous = np.array([rng.permutation(n)[:2] for _ in range(tokens)], np.int32)
    selected = np.array([rng.permutation(n)[:3] for _ in range(tokens)], np.int32)
    half = tokens // 2
    predictor.observe(1, previous[:half], selected[:half])
    predictor.observe(1, previous[half:], np.pad(selected[half:], ((0, 0), (0, 1)), constant_values=-1))
    for a, b in zip(previous.tolist(), selected.tolist(), strict=True):
        naive.observe(a, b)
    assert predictor.observations(1) == naive.counts.sum()
    assert predictor.observations(0) == predictor.observations(2) == 0
    exclude = rng.random(n) < 0.3
    current = previous[-30:]  # more factors than are multiplied at once
    found = predictor.predict(1, current, 5, exclude).tolist()
    scores = np.where(exclude, -np.inf, naive.scores(current.ravel().tolist(), 0.3))
    assert len(found) == len(set(found)) == min(5, int((scores > -np.inf).sum()))
    chosen = scores[found]
    assert (np.diff(chosen) <= 1e-5).all()
    others = np.delete(scores, found)
    assert not len(others) or not len(found) or others.max() <= chosen[-1] + 1e-5


def test_prediction_follows_the_transitions_and_then_the_habit() -> None:
    predictor = ExpertPredictor(num_layers=2, num_experts=16)
    for t in range(40):
        a = t % 2
        predictor.observe(1, np.array([a], np.int32), np.array([10 + a, 3], np.int32))
    for a in (0, 1):
        ids = predictor.predict(1, np.array([a], np.int32), 4)
        assert set(ids[:2].tolist()) == {10 + a, 3}
        assert set(ids.tolist()) == {3, 10, 11}  # nobody else was ever seen there
    assert predictor.predict(0, np.array([0], np.int32), 4).tolist() == []
    unknown = predictor.predict(1, np.array([-1], np.int32), 2).tolist()
    assert unknown[0] == 3  # of equal odds the most recent, lower ids first


def test_old_habits_fade() -> None:
    predictor = ExpertPredictor(num_experts=4, row_cap=64)
    one = [np.array([i], np.int32) for i in range(4)]
    for _ in range(2000):
        predictor.observe(0, one[0], one[1])
    for _ in range(60):
        predictor.observe(0, one[0], one[2])
    assert predictor.predict(0, one[0], 1).tolist() == [2]
    assert predictor.observations() < 64


def test_state_is_saved_and_checked() -> None:
    first = ExpertPredictor.from_history([[1, 2], [2, 3], [3, 1]], 4)
    second = ExpertPredictor(num_experts=4)
    second.load(first.save())
    assert second.observations() == first.observations() == 8
    current = np.array([3], np.int32)
    assert second.predict(0, current, 3).tolist() == first.predict(0, current, 3).tolist()
    state = first.save()
    for bad in ({}, state | {"table": state["table"] - 1}, state | {"recency": state["recency"] * 2}):
        with pytest.raises(ConfigError, match="saved predictor"):
            second.load(bad)


@pytest.mark.parametrize("wrong", [{"recency_decay": 1.1}, {"recency_weight": -1.0}, {"row_cap": 1}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ExpertPredictor(**wrong)  # type: ignore[arg-type]


def test_meter_turns_off_what_is_wasted_and_tries_again_ever_more_rarely() -> None:
    meter = PrefetchMeter(window=32, pause=10)
    switched = []
    for event in range(500):
        before = meter.allowed
        meter.record(2, 0) if before else meter.record()
        if meter.allowed is not before:
            switched.append(event)
    # 16 events of 2 prefetches, then pauses of 10, 20, 40 .. events
    assert switched == [15, 25, 41, 61, 77, 117, 133, 213, 229, 389, 405]
    assert (meter.issued, meter.useful) == (2 * (6 * 16), 0)


def test_meter_lets_go_on_what_pays() -> None:
    meter = PrefetchMeter(window=32, pause=10)
    for _ in range(31):
        meter.record(1, 0)
    assert meter.allowed  # not yet judged
    meter = PrefetchMeter(window=32, pause=10)
    for event in range(1000):
        meter.record(1, event % 2, late=1)
        assert meter.allowed
    assert meter.useful_share == 0.5
    meter.record(1, 0)
    meter.record(1, 0)
    assert not meter.allowed  # the last 32 count, not the 1000 before
    assert (meter.late, meter.useful) == (1000, 500)


def test_meter_forgives_after_a_good_window() -> None:
    meter = PrefetchMeter(window=32, pause=10)

    def pause_after(outcomes: list[int]) -> int:
        for useful in outcomes:
            meter.record(1, useful)
        waited = 0
        while not meter.allowed:
            meter.record()
            waited += 1
        return waited

    assert [pause_after([0] * 32), pause_after([0] * 32)] == [10, 20]
    assert pause_after([1] * 32) == 0
    assert pause_after([0] * 17) == 10


@pytest.mark.parametrize("wrong", [{"window": 31}, {"least_useful": 1.5}, {"pause": 0}])
def test_meter_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        PrefetchMeter(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 useful and 0 late of 1"):
        PrefetchMeter().record(1, 2)
