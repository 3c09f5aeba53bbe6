"""The command `sterna simulate`: what a policy would have read with so much memory, from a routing trace.

In here: arguments, table, JSON and plot. Starts nothing; nothing heavy is imported at the top.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ....shm.errors import UsageError
from ...sizes import format_size, parse_share, parse_size
from ..options import JSON_OPTION, FractionRange, NumberRange
from ..render import grid

if TYPE_CHECKING:
    from ....scheduler.residency.replay.simulate import ReplayReport, ReplaySetting
    from ....scheduler.residency.replay.trace import Trace

DEFAULT_MEMORY = ("12.5%", "25%", "50%")
PLOT_MEMORY = tuple(f"{share}%" for share in (5, 7.5, 10, 12.5, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60))
_POLICIES = ("lru", "lfu", "adaptive", "lrfu", "lfuda", "belady", "belady-bypass", "cache-prior")
_HEAD = (
    "policy", "memory", "share", "hit %", "decode hit %", "miss/use", "decode read/token", "r", "cycles",
    "to Belady %", "swapped %",
)  # fmt: skip


@click.command()
@click.argument("trace")
@click.option(
    "--policy", "policies", type=click.Choice((*_POLICIES, "all")), multiple=True,
    help="What leaves memory first; may be repeated [all].",
)  # fmt: skip
@click.option(
    "--memory", multiple=True, metavar="SIZE|SHARE",
    help="Memory for experts: 4000MiB, or 25% of them; may be repeated [12.5%, 25%, 50%].",
)  # fmt: skip
@click.option("--per-layer", is_flag=True, help="Give each layer its share instead of one pool.")
@click.option("--floor", type=NumberRange(0), default=0, metavar="N", help="Experts every layer keeps [0].")
@click.option("--bypass", is_flag=True, help="Do not keep what is worth less than what it displaces.")
@click.option(
    "--bonus", type=FractionRange(0.0, 1.0), default=0.15, metavar="X",
    help="cache-prior: largest loss of score for a swap, of a token's spread [0.15].",
)  # fmt: skip
@JSON_OPTION
@click.option("--plot", metavar="FILE", help="Also draw the hit rate against memory, as PNG.")
def simulate(
    trace: str,
    policies: tuple[str, ...],
    memory: tuple[str, ...],
    per_layer: bool,
    floor: int,
    bypass: bool,
    bonus: float,
    as_json: bool,
    plot: str | None,
) -> int:
    """Replay a trace with eviction policies and memory sizes.

    TRACE is a file of `sterna trace`. Columns of the table: miss/use is reads for each expert that a token
    selected; r is experts that a step of a layer needs, for each slot of the layer; cycles is slots for each
    expert that one token needs; to Belady is the share of the reads that the best possible choice would save.
    """
    figure_class = _figure_class() if plot else None
    # A process that has numba already keeps its own settings.
    if "numba" not in sys.modules:
        from ...processes.kernel_environment import prepare

        prepare()
    from ....scheduler.residency.replay.simulate import CACHE_PRIOR, ReplaySetting, compare
    from ....scheduler.residency.replay.trace import read_trace

    read = read_trace(Path(trace))
    names: Sequence[str] = policies
    if not policies or "all" in policies:
        names = [each for each in _POLICIES if each != CACHE_PRIOR or read.runner_ups is not None]

    def settings(sizes: Iterable[str]) -> list[ReplaySetting]:
        return [
            ReplaySetting(
                policy=name,
                memory_bytes=_bytes(size, read),
                per_layer=per_layer,
                floor=floor,
                bypass=bypass,
                bonus=bonus,
            )
            for size in sizes
            for name in names
        ]

    reports = compare(read, settings(memory or DEFAULT_MEMORY))
    if plot and figure_class:
        drawn = reports if len(memory) > 1 else compare(read, settings(PLOT_MEMORY))
        _draw(figure_class, drawn, Path(plot), Path(trace).name)
    if as_json:
        body = {"trace": _facts(read), "reports": [report.as_dict() for report in reports]}
        click.echo(json.dumps(body, ensure_ascii=False, allow_nan=False))
        return 0
    click.echo(_summary(read))
    click.echo(grid(_HEAD, [_row(report) for report in reports]))
    return 0


def _bytes(text: str, trace: Trace) -> int:
    """Return the memory that `text` asks for, a size or a share of all experts."""
    try:
        size = int(parse_share(text) * trace.total_bytes) if "%" in text else parse_size(text)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from None
    return size


def _facts(trace: Trace) -> dict[str, Any]:
    return {
        "tokens": trace.num_tokens,
        "events": trace.num_events,
        "layers": trace.num_layers,
        "experts": trace.experts_per_layer,
        "top_k": trace.top_k,
        "total_bytes": trace.total_bytes,
        "cycle_bytes": trace.cycle_bytes,
    }


def _summary(trace: Trace) -> str:
    return (
        f"{trace.num_tokens} tokens, {trace.num_layers} layers of {trace.experts_per_layer} experts, "
        f"{trace.top_k} used: {format_size(trace.total_bytes)}, "
        f"{format_size(trace.cycle_bytes)} used by a token\n"
    )


def _row(report: ReplayReport) -> list[str]:
    def percent(value: float | None) -> str:
        return "-" if value is None or value != value else f"{100 * value:.1f}"

    read = report.decode_bytes_per_token
    return [
        report.policy,
        format_size(report.memory_bytes),
        f"{100 * report.share:.1f}%",
        percent(report.hit_rate),
        percent(report.decode_hit_rate),
        f"{report.misses_per_logical:.3f}",
        "-" if read != read else format_size(round(read)),
        f"{report.slots_needed:.2f}",
        f"{report.cycle_ratio:.2f}",
        percent(report.recoverable),
        percent(report.swapped),
    ]


def _figure_class() -> Any:  # noqa: ANN401 - of a library that need not be there
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: install sterna[plot]") from None


def _draw(figure_class: Any, reports: Sequence[ReplayReport], path: Path, title: str) -> None:  # noqa: ANN401
    """Write the decode hit rate against memory as a PNG, or SVG by the name; one line per policy."""
    figure = figure_class(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(report.policy for report in reports):
        own = sorted((r for r in reports if r.policy == name), key=lambda r: r.memory_bytes)
        bound = name.startswith("belady")
        rates = [
            100 * (r.hit_rate if r.decode_hit_rate != r.decode_hit_rate else r.decode_hit_rate) for r in own
        ]
        axes.plot(
            [r.memory_bytes / 2**30 for r in own], rates, "--" if bound else "-", marker=".", label=name
        )
    axes.set_xlabel("memory for experts, GiB")
    axes.set_ylabel("hits in decode, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, format="svg" if path.suffix == ".svg" else "png", dpi=120)
    except OSError as error:
        raise UsageError(f"--plot: {path}: {error.strerror}") from None
