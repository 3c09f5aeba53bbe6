"""Expert affinity: ruvllm's pinned rows and golden vectors (ADR-092), the moving average, INV-2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.scheduler.residency.reference.affinity import AffinityConfig, ExpertAffinity
from sterna.shm.errors import ConfigError

from .vectors import cases, number_of

GOLDEN = cases("affinity")


def reference(n: int, sequence: list[list[int]], **config: float) -> ExpertAffinity:
    affinity = ExpertAffinity(AffinityConfig(num_experts=n, **config), compat=True)  # type: ignore[arg-type]
    for ids in sequence:
        affinity.update(ids)
    return affinity


def scores(affinity: ExpertAffinity) -> list[float]:
    return [affinity.score(e) for e in range(affinity.config.num_experts)]


def test_a1_a_token_lets_the_others_fade() -> None:
    affinity = reference(4, [[0, 1, 2, 3]], decay=0.5)
    assert scores(affinity) == [1.0] * 4
    affinity.update([0])
    assert scores(affinity) == [1.0, 0.5, 0.5, 0.5]


def test_a2_the_boost() -> None:
    assert scores(reference(4, [[1, 3]], decay=0.9, activation_boost=0.5)) == [0, 0.5, 0, 0.5]


def test_a3_never_rises_and_strictly_falls_without_activation() -> None:
    affinity = reference(8, [[1, 3, 5, 7]], decay=0.95)
    for _ in range(10):
        before = affinity.scores.copy()
        affinity.update([])
        assert (affinity.scores <= before).all()
        assert (affinity.scores[before > 0] < before[before > 0]).all()


def test_a4_ranks_by_score() -> None:
    affinity = reference(6, [[3]] * 5 + [[1]] * 3 + [[5]], decay=1.0, activation_boost=0.1)
    assert [affinity.score(e) for e in (3, 1, 5)] == pytest.approx([0.5, 0.3, 0.1])
    assert affinity.top_k_by_affinity(2) == [3, 1]
    assert affinity.top_k_by_affinity(4)[:3] == [3, 1, 5]
    assert len(affinity.top_k_by_affinity(10)) == 6


def test_a5_never_above_the_maximum() -> None:
    assert reference(4, [[0]] * 100).score(0) == 1.0


def test_a6_totals() -> None:
    affinity = reference(4, [[0, 1], [0, 2], [0]])
    assert [affinity.activation_count(e) for e in (0, 1, 2, 3, 100)] == [3, 1, 1, 0, 0]


def test_a7_a_sequence() -> None:
    affinity = reference(8, [], decay=0.8, activation_boost=0.5)
    seen = []
    for ids in ([0, 1, 7], [0, 1], [0, 1]):
        affinity.update(ids)
        seen.append((affinity.score(0), affinity.score(7)))
    assert seen == [pytest.approx(pair) for pair in [(0.5, 0.5), (0.9, 0.4), (1.0, 0.32)]]
    assert [affinity.activation_count(e) for e in (0, 1, 7)] == [3, 3, 1]


def test_a8_ids_out_of_range_are_skipped() -> None:
    affinity = reference(4, [[0, 1, 100, 200, 3, -1]])
    assert scores(affinity) == [1, 1, 0, 1]
    assert affinity.score(100) == 0.0


def test_a9_setters_clamp_and_fields_are_checked() -> None:
    config = AffinityConfig()
    assert [config.with_decay(d).decay for d in (1.5, -0.5)] == [1.0, 0.0]
    assert config.with_activation_boost(-1.0).activation_boost == 0.0
    assert config.with_max_score(-1.0).max_score == 0.0
    for wrong in ({"decay": 1.5}, {"decay": float("nan")}, {"max_score": -1.0}):
        with pytest.raises(ConfigError):
            ExpertAffinity(AffinityConfig(**wrong))  # type: ignore[arg-type]


def test_a10_percentile() -> None:
    affinity = reference(4, [[0]] + [[1]] * 5 + [[2]] * 3)
    assert [affinity.frequency_percentile(e) for e in (1, 3)] == [0.875, 0.125]


def test_a11_least() -> None:
    affinity = reference(4, [[0]] * 5 + [[1]] * 2 + [[2]], decay=1.0, activation_boost=0.1)
    assert affinity.least_affinity([0, 1, 2]) == 2
    assert affinity.least_affinity([]) is None
    affinity.scores[0, 1] = np.nan
    assert affinity.least_affinity([0, 1, 2]) == 1


def test_a12_ranks_by_total() -> None:
    assert reference(4, [[0]] + [[1]] * 2 + [[2]] * 3).top_k_by_frequency(2) == [2, 1]


@pytest.mark.parametrize("n", [1, 3, 5, 7, 9, 15, 17, 33, 65])
def test_a13_all_sizes(n: int) -> None:
    affinity = reference(n, [list(range(n))], decay=0.5)
    assert scores(affinity) == [1.0] * n
    affinity.update([])
    assert scores(affinity) == [0.5] * n


def test_a14_256_experts() -> None:
    affinity = reference(256, [list(range(128))] + [[]] * 10, decay=0.9)
    assert affinity.scores[0, :128] == pytest.approx(np.full(128, 0.348678), rel=1e-5)
    assert not affinity.scores[0, 128:].any()


@pytest.mark.parametrize("case", GOLDEN, ids=number_of)
def test_golden_sequences(case: dict[str, Any]) -> None:
    affinity = reference(
        case["n"],
        case["updates"],
        decay=case["decay"],
        activation_boost=case["boost"],
        max_score=case["max"],
    )
    assert affinity.scores[0].tobytes() == np.array(case["scores"], np.float32).tobytes()
    assert affinity.totals[0].tolist() == case["counts"]
    assert affinity.top_k_by_affinity(5) == case["top5"]
    assert affinity.top_k_by_frequency(5) == case["topfreq5"]
    assert affinity.least_affinity(case["candidates"]) == (case["least"] if case["least"] >= 0 else None)
    percentile = [affinity.frequency_percentile(e) for e in range(case["n"])]
    assert np.array(percentile, np.float32).tolist() == case["percentile"]
    prefetched = [e for e in affinity.top_k_by_affinity(6) if e % 2][:3]
    assert prefetched == case["prefetch_budget3_residents_even"]


def test_golden_sequences_are_all_there() -> None:
    assert len(GOLDEN) == 20


def test_the_average_tells_how_often_an_expert_is_used() -> None:
    """Expert 0 in every token, 1 in every second, 2 once at the end: recency alone sees them alike."""
    affinity = ExpertAffinity(AffinityConfig(num_experts=4, decay=0.98))
    for t in range(400):
        affinity.update([0] if t % 2 else [0, 1])
    affinity.update([0, 1, 2])
    assert scores(affinity) == pytest.approx([1.0, 0.5, 0.02, 0.0], abs=0.02)
    affinity.update([3, 3])
    assert affinity.score(3) == pytest.approx(0.02)  # named twice, active once
    assert affinity.activation_count(3) == 2


@given(
    compat=st.booleans(),
    decay=st.floats(0, 1, width=32),
    boost=st.floats(0, 2, width=32),
    batches=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**32 - 1)), max_size=12),
)
def test_inv_2_no_score_rises_without_activation(
    compat: bool, decay: float, boost: float, batches: list[tuple[int, int]]
) -> None:
    """Also: the batch update is the updates of its tokens, and layers do not touch each other."""
    config = AffinityConfig(num_experts=9, num_layers=3, decay=decay, activation_boost=boost)
    batched, single = (ExpertAffinity(config, compat=compat) for _ in range(2))
    for layer, seed in batches:
        selected = np.random.default_rng(seed).integers(-1, 9, (4, 3)).astype(np.int32)
        before = batched.scores.copy()
        batched.update_batch(selected, 3, layer)
        for row in selected[:3].tolist():
            single.update(row, layer)
        active = np.zeros((3, 9), bool)
        active[layer, selected[:3][selected[:3] >= 0]] = True
        assert (batched.scores <= before)[~active].all()
        assert (batched.scores <= config.max_score).all()
        assert batched.scores.tobytes() == single.scores.tobytes()
        assert batched.totals.tobytes() == single.totals.tobytes()


def test_state_is_saved_and_checked() -> None:
    first = reference(4, [[1, 2], [2]])
    second = reference(4, [])
    second.load(first.save())
    assert scores(second) == scores(first)
    assert second.totals.tolist() == first.totals.tolist()
    second.reset()
    assert not second.totals.any()
    assert first.totals.any()
    state = first.save()
    for bad in (
        {},
        state | {"totals": state["totals"][:, :3]},
        state | {"scores": state["scores"] * np.float32(np.nan)},
    ):
        with pytest.raises(ConfigError, match="saved affinity"):
            second.load(bad)
