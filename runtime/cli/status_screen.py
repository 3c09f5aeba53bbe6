"""`sterna status` on one screen: what a person looks at first. Pure.

Not in here: all figures (`render.table`), and what they mean (`protocol/report.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ..protocol.report import ProcessReport, StatusReport
from .render import columns, for_terminal

ROWS: Final = 24
"""Of the smallest terminal that people still use."""
WIDTH: Final = 80

_LABEL: Final = 12
_FOOTER: Final = "all figures: sterna status --all"


def screen(report: StatusReport) -> str:
    """Return at most ROWS - 1 lines of at most WIDTH characters, but for names: the shell's line follows."""
    lines = [*_head(report), "", *_facts(report), ""]
    left = ROWS - 1 - len(lines) - 3  # the table's head, an empty line, the footer
    lines += columns(("process", "pid", "own MiB", "RSS MiB", "CPU s"), _processes(report.processes, left))
    return "\n".join(for_terminal(line) for line in [*lines, "", _FOOTER])


def _head(report: StatusReport) -> list[str]:
    model = report.model
    return [
        f"{model.name} ({model.architecture}): {report.state} for {duration(report.uptime_s)}, "
        f"sterna {report.version}",
        model.path,
    ]


def _facts(report: StatusReport) -> Iterator[str]:
    sequences, totals, speed = report.sequences, report.totals, report.tokens_per_second
    memory = report.memory
    yield _line(
        "requests",
        f"{sequences.running} running of at most {sequences.max}, {sequences.waiting} waiting; "
        f"{totals.requests_finished} finished, {totals.requests_failed} failed",
    )
    yield _line(
        "speed",
        f"prompts {speed.prompt:.1f} tok/s, answers {speed.generated:.1f} tok/s (mean of the last 10 s)",
    )
    yield _line(
        "tokens", f"{totals.prompt_tokens} of prompts, {totals.generated_tokens} of answers since the start"
    )
    yield _line("context", f"{report.model.context} tokens{_blocks(report)}")
    yield _line(
        "memory",
        f"{memory.measured_mib.total:.0f} MiB used of a budget of {memory.budget_mib:.0f} MiB, "
        f"{memory.planned_total_mib:.0f} MiB planned",
    )
    yield from _experts(report)
    if report.quality.budget:
        yield _line("quality", f"budget {report.quality.budget:.2%} of perplexity, {report.quality.basis}")
    missing = report.progress.workers_missing
    if missing:
        names = ", ".join(map(str, missing))
        yield _line("missing", f"worker {names} for {duration(report.progress.workers_missing_s or 0.0)}")
    if totals.scheduler_restarts or totals.worker_restarts:
        yield _line("restarts", f"scheduler {totals.scheduler_restarts}, workers {totals.worker_restarts}")


def _blocks(report: StatusReport) -> str:
    free, every = report.sequences.kv_blocks_free, report.sequences.kv_blocks
    return "" if free is None else f"; {every - free} of {every} blocks of the key-value cache in use"


def _experts(report: StatusReport) -> Iterator[str]:
    """Yield lines on experts, none for a model that has none."""
    experts, figures = report.experts, report.expert_figures
    if not experts.total:
        return
    there = "" if figures is None else f", {figures.resident} are there"
    yield _line(
        "experts", f"{experts.slots} of {experts.total} may be in memory ({experts.share:.1%}){there}"
    )
    if figures is not None and figures.hit_rate is not None:
        yield _line(
            "",
            f"{figures.hit_rate:.1%} were there when needed; {figures.fetched} read "
            f"({figures.fetched_mib:.0f} MiB), {figures.waited_s:.1f} s waited",
        )


def _processes(processes: Sequence[ProcessReport], rows: int) -> list[tuple[str, ...]]:
    """Return a row for each process; where there are more than `rows`, the last row adds up the rest."""
    shown = list(processes) if len(processes) <= rows else list(processes[: rows - 1])
    rest = processes[len(shown) :]
    cells: list[tuple[str, ...]] = [
        (each.name, str(each.pid), f"{each.private_mib:.1f}", f"{each.rss_mib:.1f}", f"{each.cpu_s:.1f}")
        for each in shown
    ]
    if rest:
        own, rss, cpu = (
            sum(figures)
            for figures in zip(*((each.private_mib, each.rss_mib, each.cpu_s) for each in rest), strict=True)
        )
        cells.append((f"{len(rest)} more", "", f"{own:.1f}", f"{rss:.1f}", f"{cpu:.1f}"))
    return cells


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def duration(seconds: float) -> str:
    """Return a time as people say it: "4 s", "3 min", "5 h 12 min", "2 d 3 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
