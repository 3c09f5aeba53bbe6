"""`sterna status` on one screen, for models with and without experts and for any number of processes."""

from __future__ import annotations

import msgspec
import pytest

from sterna.runtime.cli.status_screen import ROWS, WIDTH, duration, screen
from sterna.runtime.protocol import report as r

from ..protocol.test_report import STATS, status

FIGURES = r.ExpertFigures.of(STATS)


def with_workers(report: r.StatusReport, count: int) -> r.StatusReport:
    names = ["daemon", "nursery", "scheduler", *(f"worker {i}" for i in range(count))]
    rows = [
        r.ProcessReport(name=name, pid=100_000 + i, rss_mib=100.0, private_mib=20.5, cpu_s=12.3)
        for i, name in enumerate(names)
    ]
    return msgspec.structs.replace(report, processes=rows)


@pytest.mark.parametrize("workers", [0, 1, 4, 256])
@pytest.mark.parametrize("state", ["serving", "recovering"])
def test_it_fits_a_screen(workers: int, state: r.State) -> None:
    report = with_workers(status(FIGURES), workers)
    worst = msgspec.structs.replace(
        report,
        state=state,
        uptime_s=1e7,
        quality=r.QualityReport(budget=0.005, lost_mass=0.1, basis="uncalibrated", calibrated_shares=[]),
        totals=msgspec.structs.replace(
            report.totals, scheduler_restarts=3, worker_restarts=9, requests_finished=10**7
        ),
    )
    lines = screen(worst).splitlines()
    assert len(lines) < ROWS
    assert max(map(len, lines)) <= WIDTH, max(lines, key=len)
    assert any(line.startswith("daemon") for line in lines)
    if workers == 256:
        rest = next(line.split() for line in lines if " more " in line)
        shown = sum(line.startswith(("daemon", "nursery", "scheduler", "worker ")) for line in lines)
        assert int(rest[0]) + shown == 259
        assert float(rest[2]) == pytest.approx(20.5 * int(rest[0]))


def test_what_a_person_looks_at_first() -> None:
    text = screen(with_workers(status(FIGURES), 2))
    for part in (
        "m (a): serving for 2 s",
        "1 running of at most 2, 0 waiting",
        "answers 3.5 tok/s (mean of the last 10 s)",
        "3 MiB used of a budget of 9 MiB",
        "20 of 80 may be in memory (25.0%), 18 are there",
        "75.0% were there when needed",
        "worker 1 for 0 s",
        "sterna status --all",
    ):
        assert part in text


def test_a_dense_model_has_no_line_on_experts() -> None:
    report = status(None)
    dense = msgspec.structs.replace(
        report, experts=r.ExpertMemoryReport(total=0, slots=0, share=1.0, slot_mib=0.0, by_precision={})
    )
    assert "expert" not in screen(dense)


def test_durations() -> None:
    shown = [duration(each) for each in (0.4, 59, 61, 3600, 18_720, 200_000)]
    assert shown == ["0 s", "59 s", "1 min", "1 h 0 min", "5 h 12 min", "2 d 7 h"]
