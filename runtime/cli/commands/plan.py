"""The commands `sterna plan` and `sterna memory`: forecast before a start, and change while it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import click

from ...config import SETTINGS, env_of, flag_of, load_config, read_size
from ...sizes import format_size
from ..render import grid

_PLANNED = (
    "memory",
    "preset",
    "resident_experts",
    "ctx_size",
    "max_num_seqs",
    "max_batch_tokens",
    "workers",
    "ternary",
    "precision",
)


def _planned_options(command: Callable[..., int]) -> Callable[..., int]:
    for name in reversed(_PLANNED):
        setting = SETTINGS[name]
        names = [name, flag_of(name), *([setting.short] if setting.short else [])]
        metavar = "|".join(setting.choices) or None
        command = click.option(*names, metavar=metavar, help=f"{setting.help} ({env_of(name)})")(command)
    return command


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_planned_options
def plan(model: str | None, as_json: bool, **flags: str | None) -> int:
    """Tell whether MODEL, a GGUF file, fits in memory, and how fast it will be. Loads nothing.

    Without MODEL, the embedded one.
    """
    from ...examine.forecast import describe_plan

    facts = describe_plan(load_config(None, os.environ, {**flags, "model": model}))
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else _text(facts))
    return 0


@click.command()
@click.argument("size")
@click.option("--socket", metavar="URL", help="ipc:// URL of the daemon.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def memory(size: str, socket: str | None, as_json: bool) -> int:
    """Have the running daemon use SIZE of memory, such as 2GiB; `auto` is what it started with."""
    if size != "auto":
        read_size(size, "SIZE")
    from ...client.client import Client
    from ...protocol.sockets import check_url

    with Client(None if socket is None else check_url(socket, "--socket")) as client:
        held = client.resize(size)
    click.echo(json.dumps(held) if as_json else _held(held))
    return 0


def _held(held: dict[str, Any]) -> str:
    freed = held["freed_bytes"]
    change = f"{format_size(freed)} given back" if freed >= 0 else f"{format_size(-freed)} taken"
    return (
        f"{held['slots']} of {held['experts']} experts may stay in memory, "
        f"{format_size(held['used_bytes'])} of {format_size(held['memory_bytes'])} used, {change}"
    )


def _text(facts: dict[str, Any]) -> str:
    experts, told = facts["experts"], facts["forecast"]
    if facts["refusal"]:
        lines = [f"does not work: {facts['refusal']}", "", "with the smallest budget:"]
    elif facts["fits"]:
        lines = ["fits: every expert stays in memory"]
    else:
        lines = ["works: experts beyond the budget are read from the file"]
    lines += [
        f"budget            {format_size(facts['budget']['bytes'])} ({facts['budget']['why']})",
        f"smallest budget   {format_size(facts['smallest_budget_bytes'])}; "
        f"all in memory with {format_size(facts['whole_budget_bytes'])}",
        f"experts           {experts['slots']} of {experts['total']} ({experts['share']:.1%}); "
        f"by worker {', '.join(map(str, experts['of_workers']))}",
        *_precisions(facts),
        "settings          " + ", ".join(f"{name} {value}" for name, value in facts["settings"].items()),
        *(f"note              {note}" for note in facts["notes"]),
        f"hit rate          {_band(told['hit_rate'], '{:.1%}')} ({told['prior']})",
        f"read per token    {_band(told['read_bytes_per_token'], '{:.4g} MB', 1e-6)} "
        f"of {told['asked_bytes_per_token'] / 1e6:.4g} MB asked for",
        f"tokens per second {_band(told['tokens_per_s'], '{:.3g}')}",
        f"first fill        {told['first_fill_s']:.1f} s",
        f"this machine      disk {told['disk_bytes_per_s'] / 1e9:.2f} GB/s, "
        f"memory {told['memory_bytes_per_s'] / 1e9:.1f} GB/s ({told['probe']})",
    ]
    rows = [(name, f"{nbytes / 2**20:.1f}") for name, nbytes in facts["used_bytes"].items()]
    rows.append(("total", f"{facts['used_total_bytes'] / 2**20:.1f}"))
    return "\n".join([*lines, "", grid(("memory", "MiB"), rows)])


def _precisions(facts: dict[str, Any]) -> list[str]:
    """Return lines on experts held in fewer bits than the file, none where that was not asked for."""
    if not facts["precision"]:
        return []
    held = [
        f"{name} {row['experts']} ({format_size(row['bytes'])})"
        for name, row in facts["experts"]["by_precision"].items()
        if row["experts"]
    ]
    return [f"precision         {facts['precision']}", f"held as           {', '.join(held)}"]


def _band(values: list[float], form: str, scale: float = 1.0) -> str:
    low, high = sorted(values)
    shown = [form.format(value * scale) for value in (low, high)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"
