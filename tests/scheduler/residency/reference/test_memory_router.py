"""The memory-aware router: ruvllm's pinned rows and golden vectors (ADR-092), and what is corrected."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.scheduler.residency.reference.affinity import AffinityConfig, ExpertAffinity
from sterna.scheduler.residency.reference.memory_router import MemoryAwareRouter, MemoryRouterConfig
from sterna.scheduler.residency.reference.paging_request import Direction, PagingRequest, Priority
from sterna.shm.errors import ConfigError, InternalError

from .vectors import cases, number_of

ROUTES = cases("route")
NAN, INF = float("nan"), float("inf")


def router(n: int, k: int = 2, resident: list[int] | None = None, **config: Any) -> MemoryAwareRouter:  # noqa: ANN401
    compat = config.pop("compat", True)
    made = MemoryAwareRouter(MemoryRouterConfig(num_experts=n, top_k=k, **config), compat=compat)
    made.update_cache_state(resident or [])
    return made


PINNED = [
    pytest.param(router(8, cache_bonus=0.0), [0.1, 0.3, 0.5, 0.2, 0.4, 0.1, 0.2, 0.15], [2, 4], id="R1"),
    pytest.param(router(4, 1, [1], cache_bonus=0.3), [0.4, 0.3, 0.2, 0.1], [1], id="R2"),
    pytest.param(router(8, 3), [0.8, 0.1, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5], [0, 3, 5], id="R3"),
    pytest.param(router(8), [0.3] * 8, [0, 1], id="R6"),
    pytest.param(
        router(4, 2, [3], cache_bonus=0.5, memory_aware=False), [0.4, 0.3, 0.5, 0.2], [2, 0], id="R9"
    ),
    pytest.param(router(3, memory_aware=False), [1, NAN, NAN], [0, 0], id="two maxima: only expert 0"),
    pytest.param(router(3, memory_aware=False), [NAN, INF, -INF], [0, 0], id="two maxima: none"),
    pytest.param(router(3, memory_aware=False), [NAN, 1, NAN], [1, 0], id="two maxima: only expert 1"),
]


@pytest.mark.parametrize(("made", "logits", "expected"), PINNED)
def test_pinned_selections(made: MemoryAwareRouter, logits: list[float], expected: list[int]) -> None:
    assert made.route(logits)[0] == expected


def test_r4_one_urgent_request() -> None:
    made = router(4, 2, [0])
    selected, requests = made.route([0.5, 0.6, 0.4, 0.3])
    assert set(selected) == {0, 1}
    assert requests == [PagingRequest(expert_id=1, direction=Direction.IN, priority=Priority.URGENT)]


def test_r5_adjusted_scores() -> None:
    made = router(4, 2, [1, 2], cache_bonus=0.2)
    logits = np.array([0.1, 0.3, 0.4, 0.5], np.float32)
    assert made.apply_cache_bonus(logits).tolist() == pytest.approx([0.1, 0.5, 0.6, 0.5])
    assert made.apply_cache_bonus(logits, out=logits) is logits
    assert logits.tolist() == pytest.approx([0.1, 0.5, 0.6, 0.5])


def test_r7_and_r8_hits_and_misses() -> None:
    made = router(4, 2, [0, 1, 2, 3])
    assert made.route([0.1, 0.4, 0.3, 0.2]) == ([1, 2], [])
    assert (made.metrics.hits, made.metrics.misses) == (2, 0)
    made = router(4)
    assert [r.expert_id for r in made.route([0.1, 0.4, 0.3, 0.2])[1]] == [1, 2]
    assert (made.metrics.hits, made.metrics.misses) == (0, 2)
    made.reset_metrics()
    assert made.metrics.misses == 0
    assert made.affinity.activation_count(1) == 1


@pytest.mark.parametrize(("resident", "rate"), [([0, 2], 1.0), ([1, 3], 0.0)])
def test_r10_hit_rate(resident: list[int], rate: float) -> None:
    made = router(4, 2, resident, cache_bonus=0.0)
    assert made.hit_rate == 0.0
    made.route([0.4, 0.3, 0.5, 0.2])
    assert made.hit_rate == rate


def test_r11_a_wrong_number_of_scores() -> None:
    made = router(4)
    assert made.route([0.9, 0.1]) == ([0, 1], [])
    assert not made.affinity.totals.any()
    with pytest.raises(InternalError, match="1 rows of 2 scores for <= 64 rows of 4"):
        router(4, compat=False).route([0.9, 0.1])


def test_r12_setters_clamp() -> None:
    config = MemoryRouterConfig()
    assert [config.with_cache_bonus(b).cache_bonus for b in (1.5, -0.5)] == [1.0, 0.0]
    assert [config.with_prefetch_threshold(b).prefetch_threshold for b in (1.5, -0.5)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (MemoryRouterConfig(top_k=0), "top_k 0"),
        (MemoryRouterConfig(top_k=9), "more than num_experts 8"),
        (MemoryRouterConfig(num_experts=0), "more than num_experts 0"),
        (MemoryRouterConfig(cache_bonus=NAN), "cache_bonus"),
        (MemoryRouterConfig(keep_top=-1), "keep_top"),
    ],
)
def test_r13_configs_are_checked(config: MemoryRouterConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MemoryAwareRouter(config)


def test_r16_residents_of_128() -> None:
    made = router(128, 4, [0, 32, 64, 96, 127])
    assert [e for e in range(-1, 130) if made.is_resident(e)] == [0, 32, 64, 96, 127]
    assert made.resident_experts() == [0, 32, 64, 96, 127]
    made.set_resident(64, False)
    assert made.resident_experts() == [0, 32, 96, 127]
    assert made.version == 2


@pytest.mark.parametrize("case", ROUTES, ids=number_of)
def test_golden_routes(case: dict[str, Any]) -> None:
    """Bit for bit: scores with the bonus, the selection, what is paged in, hits and misses."""
    made = router(
        case["n"], case["k"], case["resident"], cache_bonus=case["bonus"], memory_aware=case["memory_aware"]
    )
    logits = np.array([float(value) for value in case["logits"]], np.float32)
    adjusted = np.array([float(value) for value in case["apply_cache_bonus"]], np.float32)
    assert made.apply_cache_bonus(logits).tobytes() == adjusted.tobytes()
    selected, requests = made.route(logits)
    assert selected == case["selected"]
    assert [r.expert_id for r in requests] == case["page_in"]
    assert (made.metrics.hits, made.metrics.misses) == (case["hits"], case["misses"])
    assert made.route_each([logits, logits]) == [(selected, requests)] * 2  # R17


def test_golden_routes_are_all_there() -> None:
    assert len(ROUTES) == 120
    strange = {value for case in ROUTES for value in case["logits"] if isinstance(value, str)}
    assert strange == {"nan", "inf", "-inf"}


def naive(
    logits: npt.NDArray[np.float32], k: int, resident: set[int], bonus: float, keep_top: int
) -> list[int]:
    """The corrected rule, written from its docstring."""
    finite = [e for e in range(len(logits)) if np.isfinite(logits[e])]
    if not finite:
        return []
    spread = logits[finite].max() - logits[finite].min()
    lift = np.float32(bonus) * spread
    kept = sorted(finite, key=lambda e: (-logits[e], e))[: min(keep_top, k)]
    scores = {e: np.float32(logits[e] + lift) if e in resident else logits[e] for e in finite}
    rest = sorted((e for e in finite if e not in kept), key=lambda e: (-scores[e], e))
    return kept + rest[: k - len(kept)]


@given(
    n=st.integers(1, 130), k=st.integers(1, 8), tokens=st.integers(0, 5), keep_top=st.integers(0, 3),
    bonus=st.sampled_from([0.0, 0.15, 1.0]), seed=st.integers(0, 2**32 - 1), odd=st.floats(0, 1),
)  # fmt: skip
def test_corrected_selection_agrees_with_the_naive_rule(
    n: int, k: int, tokens: int, keep_top: int, bonus: float, seed: int, odd: float
) -> None:
    """Also INV-6, and that requests are made once per batch, in the order of need."""
    rng = np.random.default_rng(seed)
    k = min(k, n)
    logits = np.round(rng.standard_normal((tokens, n)) * 4).astype(np.float32) * rng.choice([0.0, -1e-3, 50])
    logits = np.where(rng.random((tokens, n)) < odd**4, rng.choice([NAN, INF, -INF]), logits)
    logits = logits.astype(np.float32)
    resident = set(np.flatnonzero(rng.random(n) < 0.4).tolist())
    made = router(n, k, sorted(resident), cache_bonus=bonus, keep_top=keep_top, compat=False)
    expected = [naive(row, k, resident, bonus, keep_top) for row in logits]
    for _ in range(2):
        selected, wanted = made.route_batch(logits)
        assert [[e for e in row if e >= 0] for row in selected.tolist()] == expected
        absent = list(dict.fromkeys(e for ids in expected for e in ids if e not in resident))
        assert wanted.tolist() == absent
        assert made.generate_paging_requests(wanted.tolist()) == [PagingRequest.urgent_in(e) for e in absent]
    pairs = [e for ids in expected for e in ids]
    assert made.metrics.hits == 2 * sum(e in resident for e in pairs)
    assert made.metrics.hits + made.metrics.misses == 2 * len(pairs) == made.affinity.totals.sum()


def test_bonus_does_not_depend_on_the_scale_of_scores() -> None:
    logits = np.array([0.5, 0.6, 0.42, 0.1], np.float32)
    for scale in (1e-3, 1.0, 1e4):
        assert router(4, 2, [2], compat=False).route(logits * scale)[0] == [1, 0]
        assert router(4, 2, [2], cache_bonus=0.2, compat=False).route(logits * scale)[0] == [1, 2]


# With NUMBA_DISABLE_JIT=1 Python warns of what compiled code does silently: 3e38 less -3e38 is infinite.
@pytest.mark.filterwarnings(
    "ignore:overflow encountered in scalar subtract:RuntimeWarning" if numba.config.DISABLE_JIT else "error"
)
def test_extreme_scores_do_not_overflow() -> None:
    logits = [3e38, -3e38, 0.0, 1.0]
    assert router(4, 4, [1], cache_bonus=1.0, compat=False).route(logits)[0] == [0, 1, 3, 2]


def test_select_top_k_never_repeats() -> None:
    scores = np.array([1.0, NAN, 2.0, NAN], np.float32)
    assert router(4, 3).select_top_k(scores) == [2, 0, 1]
    assert router(4, 3, compat=False).select_top_k(scores) == [2, 0]


def test_only_what_was_used_is_prefetched() -> None:
    for compat, expected in ((True, [3, 0]), (False, [3])):
        affinity = ExpertAffinity(AffinityConfig(num_experts=6), compat=compat)
        affinity.update([2, 3])
        made = MemoryAwareRouter(MemoryRouterConfig(num_experts=6), affinity, compat=compat)
        made.set_resident(2, True)
        requests = made.generate_prefetch_requests(2)
        assert [r.expert_id for r in requests] == expected
        assert {r.priority for r in requests} == {Priority.PREFETCH}


def test_urgent_goes_before_normal_before_prefetch() -> None:
    requests = [PagingRequest.prefetch(1), PagingRequest.urgent_in(2), PagingRequest.page_out(3)]
    ordered = sorted(requests, key=lambda r: r.priority, reverse=True)
    assert [r.expert_id for r in ordered] == [2, 3, 1]
    assert requests[2].direction is Direction.OUT


def test_layers_share_an_affinity_but_not_its_rows() -> None:
    affinity = ExpertAffinity(AffinityConfig(num_experts=4, num_layers=2))
    made = MemoryAwareRouter(MemoryRouterConfig(num_experts=4), affinity, layer=1)
    assert made.route([0.1, 0.2, 0.3, 0.4])[1][0] == PagingRequest.urgent_in(3, layer=1)
    assert affinity.totals.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    with pytest.raises(ConfigError, match="2 layers of 4 experts for layer 2 of 4"):
        MemoryAwareRouter(MemoryRouterConfig(num_experts=4), affinity, layer=2)


def test_wrong_arrays_are_refused() -> None:
    made = router(4)
    with pytest.raises(InternalError, match="65 rows"):
        made.route_batch(np.zeros((65, 4), np.float32))
    for bad in (np.zeros((2, 4)), np.zeros((2, 8), np.float32)[:, ::2]):
        with pytest.raises(InternalError, match="float32 in C order"):
            made.route_batch(bad)  # type: ignore[arg-type]
