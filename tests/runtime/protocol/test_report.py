"""The typed status report and the body that travels."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sterna.runtime.protocol import report as r
from sterna.scheduler.messages import ExpertStats
from sterna.shm.errors import ProtocolError

STATS = ExpertStats(
    slots=20,
    resident=18,
    loading=1,
    resident_of_workers=[10, 8],
    events=50,
    logical=300,
    distinct=200,
    hits=150,
    misses=50,
    fetched=60,
    fetched_bytes=3 * 2**20,
    waited_ns=1_234_567_890,
    page_in_p50_ns=1_500_000,
    page_in_p99_ns=9_876_543,
    needed_per_slot=1.23456,
    cycle_guard=2.3456,
    layer_hit_rates=[0.5, 1.0],
    foreseen=11,
    foreseen_used=7,
    foreseen_late=2,
)


def status(figures: r.ExpertFigures | None) -> r.StatusReport:
    return r.StatusReport(
        version="0",
        uptime_s=1.5,
        state="serving",
        model=r.ServedModelReport(
            name="m", path="/m", architecture="a", context=64, experts=80, resident_experts=None
        ),
        experts=r.ExpertMemoryReport(
            total=80, slots=20, share=0.25, slot_mib=1.0, by_precision={"2": {"experts": 80, "bytes": 9}}
        ),
        expert_figures=figures,
        processes=[r.ProcessReport(name="daemon", pid=1, rss_mib=2.0, private_mib=1.0, cpu_s=0.1)],
        memory_mib={"arena": 1.0},
        memory=r.MemoryReport(
            budget_mib=9.0,
            why="as set",
            planned_mib={"slots": 1.0},
            planned_total_mib=8.0,
            measured_mib=r.MeasuredMemory(processes=1.0, arenas=2.0, total=3.0),
        ),
        quality=r.QualityReport(budget=0.0, lost_mass=0.0, basis="uncalibrated", calibrated_shares=[]),
        sequences=r.SequenceReport(running=1, waiting=0, max=2, kv_blocks_free=None, kv_blocks=8),
        tokens_per_second=r.TokenRates(prompt=0.0, generated=3.5),
        totals=r.TotalsReport(
            requests_finished=1,
            requests_failed=0,
            requests_cancelled=0,
            prompt_tokens=4,
            generated_tokens=5,
            steps=6,
            scheduler_restarts=0,
            worker_restarts=0,
            connections=1,
            frames_refused=0,
        ),
        progress=r.ProgressReport(
            last_step_age_s=None, workers_missing=[1], workers_missing_s=0.5, oldest_waiting_s=None
        ),
    )


def test_figures_come_in_the_units_of_the_report() -> None:
    assert msgspec.to_builtins(r.ExpertFigures.of(STATS)) == {
        "resident": 18,
        "loading": 1,
        "resident_of_workers": [10, 8],
        "hit_rate": 0.75,
        "layer_hit_rates": [0.5, 1.0],
        "miss_per_logical": 0.1667,
        "events": 50,
        "logical": 300,
        "distinct": 200,
        "hits": 150,
        "misses": 50,
        "fetched": 60,
        "fetched_mib": 3.0,
        "waited_s": 1.235,
        "page_in_p50_ms": 1.5,
        "page_in_p99_ms": 9.88,
        "needed_per_slot": 1.235,
        "cycle_guard": 2.35,
        "prefetch": {"issued": 11, "useful": 7, "late": 2},
    }


@pytest.mark.parametrize("figures", [None, r.ExpertFigures.of(STATS)])
def test_a_report_comes_back_from_its_body(figures: r.ExpertFigures | None) -> None:
    told = status(figures)
    body = told.to_body()
    assert "expert_figures" not in body
    assert ("hit_rate" in body["experts"]) == (figures is not None)
    assert r.StatusReport.from_body(body) == told


def test_what_a_newer_daemon_adds_is_passed_over() -> None:
    body: dict[str, Any] = status(None).to_body()
    body["weather"] = {"rain": True}
    body["totals"]["wonders"] = 7
    assert r.StatusReport.from_body(body) == status(None)


def test_a_body_of_another_shape_names_the_field() -> None:
    body: dict[str, Any] = status(None).to_body()
    body["totals"]["steps"] = "many"
    with pytest.raises(ProtocolError, match=r"Expected `int`, got `str` - at `\$\.totals\.steps`"):
        r.StatusReport.from_body(body)
