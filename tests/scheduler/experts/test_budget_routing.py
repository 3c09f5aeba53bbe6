"""Routing within a quality budget: the bound holds, the best stay, and nothing but the snapshot decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.scheduler.experts.router import Router, RouterConfig
from sterna.scheduler.experts.routing_log import RoutingLog
from sterna.scheduler.residency.replay.trace import read_trace
from sterna.shm.errors import NotPermitted
from sterna.workers.kernels.routing.top_k import CHANGED, CREDIT, EVENTS, LOST, SWAPS

from ..local_engine import LocalEngine

EXPERTS, K, WINDOW = 16, 4, 8
PROMPT = [1, 400, 500, 600, 700, 800]
Floats = npt.NDArray[np.float32]


def router(**changes: object) -> Router:
    fields: dict[str, object] = {
        "num_experts": EXPERTS, "top_k": K, "gating": 2, "normalise": True, "scale": 1.8, "window": WINDOW,
        "keep": 2,
    }  # fmt: skip
    return Router(RouterConfig(**{**fields, **changes}), 8)  # type: ignore[arg-type]


def naive(
    logits: Floats, bias: Floats, resident: set[int], credit: float, config: RouterConfig
) -> tuple[list[int], float, int]:
    """Return (selected, lost, swaps) of one token, by sorting and in float64."""
    p = (1.0 / (1.0 + np.exp(-logits.astype(np.float32)))).astype(np.float32)
    scores = p + bias
    order = sorted(range(EXPERTS), key=lambda e: (-scores[e], e))
    selected = order[:K]
    mass = float(np.sum([p[e] for e in selected], dtype=np.float32))
    candidates = [e for e in order[K:WINDOW] if e in resident]
    lost, swaps = 0.0, 0
    for rank in range(K - 1, config.keep - 1, -1):
        out = selected[rank]
        if out in resident:
            continue
        if not candidates:
            break
        new = candidates.pop(0)
        behind = float(scores[out]) - float(scores[new])
        cost = max(behind, float(p[out]) - float(p[new])) / mass
        left = credit - lost
        if cost >= left or cost * float(p[out]) / mass > left * config.share:
            break
        if behind > config.bonus * float(scores.max() - scores.min()):
            break
        selected[rank] = new
        lost += cost
        swaps += 1
    return selected, lost, swaps


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.005, 0.03, 0.3]), st.sampled_from([0.0, 0.2]))
def test_trades_are_those_of_the_naive_router_and_the_bound_holds(
    seed: int, epsilon: float, b: float
) -> None:
    rng = np.random.default_rng(seed)
    r, config = router(), router()._config
    bias = (b * rng.random(EXPERTS)).astype(np.float32)
    accounts = np.zeros((1, 5))
    lost, swaps, credit = 0.0, 0, 0.0
    for event in range(1, 60):
        logits = rng.standard_normal((1, EXPERTS)).astype(np.float32)
        resident = (rng.random(EXPERTS) < 0.5).astype(np.uint8)
        r.route_within(logits, bias, 1, 3, np.zeros(1, np.int32), np.array([epsilon]), resident, accounts)
        credit = min(credit + epsilon, epsilon * config.limit)
        expected, cost, traded = naive(logits[0], bias, set(np.flatnonzero(resident)), credit, config)
        credit, lost, swaps = credit - cost, lost + cost, swaps + traded
        assert r.selected[0].tolist() == expected
        assert accounts[0, LOST] == pytest.approx(lost, abs=1e-5)
        assert accounts[0, CREDIT] == pytest.approx(credit, abs=1e-5)
        assert (accounts[0, EVENTS], accounts[0, SWAPS]) == (event, swaps)
        assert accounts[0, LOST] <= epsilon * event + 1e-12
    assert accounts[0, CHANGED] <= accounts[0, SWAPS]
    assert (epsilon > 0) or swaps == 0


def test_same_scores_and_same_snapshot_give_the_same_selection() -> None:
    """INV-6 of docs/invariants.md."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((8, EXPERTS)).astype(np.float32)
    resident = (rng.random(EXPERTS) < 0.4).astype(np.uint8)
    found = set()
    for _ in range(3):
        r = router()
        r.route_within(
            logits, np.zeros(EXPERTS, np.float32), 8, 3, np.arange(8, dtype=np.int32), np.full(8, 0.05),
            resident, np.tile(np.array([1.0, 0, 0, 0, 0]), (8, 1)),
        )  # fmt: skip
        found.add((r.selected.tobytes(), r.weights.tobytes()))
    assert len(found) == 1


def test_the_best_are_kept_and_weights_come_from_the_true_mass() -> None:
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((8, EXPERTS)).astype(np.float32)
    exact, traded = router(), router(share=1.0)
    exact.route(logits, np.zeros(EXPERTS, np.float32), 8, 3)
    traded.route_within(
        logits, np.zeros(EXPERTS, np.float32), 8, 3, np.arange(8, dtype=np.int32), np.full(8, 9.0),
        (np.arange(EXPERTS) % 3 == 0).astype(np.uint8), np.zeros((8, 5)),
    )  # fmt: skip
    assert (traded.selected != exact.selected).any()
    assert (traded.selected[:, :2] == exact.selected[:, :2]).all()
    same = traded.selected == exact.selected
    assert (traded.weights[same] == exact.weights[same]).all()
    assert (traded.weights.sum(axis=1) <= exact.weights.sum(axis=1) + 1e-6).all()


def test_an_expert_that_is_read_for_one_token_is_there_for_all() -> None:
    r = router(top_k=1, window=4, keep=0, share=1.0)
    logits = np.zeros((2, EXPERTS), np.float32)
    logits[:, 5], logits[:, 7] = 3.0, 2.9
    resident = np.zeros(EXPERTS, np.uint8)
    resident[7] = 1
    accounts = np.zeros((2, 5))
    r.route_within(
        logits, np.zeros(EXPERTS, np.float32), 2, 3, np.array([-1, 1], np.int32), np.full(2, 5.0), resident,
        accounts,
    )  # fmt: skip
    assert r.selected[:2, 0].tolist() == [5, 5]  # the first is exact, so 5 is read anyway
    assert accounts[1, SWAPS] == 0


# ---- in the engine ----


def test_a_budget_cuts_misses_and_keeps_its_bound_and_a_prompt_is_exact() -> None:
    exact, lossy = LocalEngine(streams=1, resident=40), LocalEngine(streams=1, resident=40)
    (before,) = exact.run([PROMPT], 60)
    (after,) = lossy.run([PROMPT], 60, epsilon=0.1)
    assert after.prompt_logprobs == before.prompt_logprobs
    assert after.logprobs[0] == before.logprobs[0]
    assert before.routing == []
    events = sum(part.events for part in after.routing)
    assert events == 59 * 5  # the first token comes from the prompt
    assert 0 < sum(part.lost for part in after.routing) <= 0.1 * events
    assert lossy.runner.counts.fetched < exact.runner.counts.fetched


def test_no_budget_is_byte_identical_to_exact_and_so_is_everything_resident() -> None:
    (exact,) = LocalEngine(streams=1).run([PROMPT], 30)
    assert LocalEngine(streams=1, resident=30).run([PROMPT], 30, epsilon=0.0) == [exact]
    (full,) = LocalEngine(streams=1).run([PROMPT], 30, epsilon=0.2)
    assert (full.tokens, full.logprobs) == (exact.tokens, exact.logprobs)


def test_a_budget_run_repeats_for_any_number_of_workers() -> None:
    runs = [
        LocalEngine(streams=1, resident=30, workers=workers, prefetch="on").run([PROMPT], 30, epsilon=0.05)
        for workers in (1, 3, 1)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_a_text_can_be_scored_as_an_answer_is_computed() -> None:
    """One token per step, so that the experts in memory are those that decoding would leave."""
    engine = LocalEngine(streams=1, resident=30)
    text = [1, *range(300, 340)]
    (whole,) = LocalEngine(streams=1).run([text], 1)
    (stepped,) = engine.run([text], 1, stepped_from=3)
    assert engine.steps == 1 + len(text) - 3
    assert stepped.prompt_logprobs == whole.prompt_logprobs
    (lossy,) = LocalEngine(streams=1, resident=30).run([text], 1, stepped_from=3, epsilon=0.1)
    assert lossy.prompt_logprobs[:3] == whole.prompt_logprobs[:3]
    assert lossy.prompt_logprobs != whole.prompt_logprobs
    assert sum(part.events for part in lossy.routing) == 5 * (len(text) - 3)


def test_routing_is_recorded_with_what_came_next(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    engine = LocalEngine(streams=1, resident=30, log=lambda plan: RoutingLog(path, plan, "tales"))
    engine.run([PROMPT], 5)
    assert engine.log is not None
    engine.log.close()
    trace = read_trace(path)
    assert trace.num_events == 5 * 5
    assert trace.top_k == 2
    assert trace.num_tokens == len(PROMPT) + 4
    with pytest.raises(NotPermitted, match=r"trace\.csv"):
        RoutingLog(path, engine.plan, "tales")
