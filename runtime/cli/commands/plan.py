"""The command `sterna plan`: whether a model fits in memory, and its speed, before it is started."""

from __future__ import annotations

import os
from typing import Any

import click

from ...config import load_config
from ...sizes import format_size
from ..options import JSON_OPTION, MODEL_ARGUMENT, json_text, model_path, setting_options
from ..render import columns

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


@click.command()
@MODEL_ARGUMENT
@JSON_OPTION
@setting_options(_PLANNED)
def plan(model: str | None, as_json: bool, **flags: str | None) -> int:
    """Tell whether MODEL fits in memory, and its speed.

    MODEL is a GGUF file, by default the embedded one. Its header is read, and 0.6 s of disk and memory are
    measured; nothing is loaded.
    """
    from ...examine.forecast import describe_plan

    config = load_config(None, os.environ, {**flags, "model": model})
    if config.model is not None:
        model_path(str(config.model))
    facts = describe_plan(config)
    click.echo(json_text(facts) if as_json else _text(facts))
    return 0


def _text(facts: dict[str, Any]) -> str:
    told = facts["forecast"]
    lines = [
        *_verdict(facts),
        f"budget            {format_size(facts['budget']['bytes'])} ({facts['budget']['why']})",
        f"smallest budget   {format_size(facts['smallest_budget_bytes'])}; "
        f"all in memory with {format_size(facts['whole_budget_bytes'])}",
        *_experts(facts),
        *_precisions(facts),
        "settings          " + ", ".join(f"{name} {value}" for name, value in facts["settings"].items()),
        *(f"note              {note}" for note in facts["notes"]),
        *(f"slow              {line}" for line in facts["slow"]),
        f"tokens per second {_band(told['tokens_per_s'], '{:.3g}')}",
        f"first fill        {told['first_fill_s']:.1f} s",
        f"this machine      disk {told['disk_bytes_per_s'] / 1e9:.2f} GB/s, "
        f"memory {told['memory_bytes_per_s'] / 1e9:.1f} GB/s ({told['probe']})",
    ]
    rows = [(name, f"{nbytes / 2**20:.1f}") for name, nbytes in facts["used_bytes"].items()]
    rows.append(("total", f"{facts['used_total_bytes'] / 2**20:.1f}"))
    return "\n".join([*lines, "", *columns(("memory", "MiB"), rows)])


def _verdict(facts: dict[str, Any]) -> list[str]:
    if facts["refusal"]:
        return [f"does not work: {facts['refusal']}", "", "with the smallest budget:"]
    if not facts["experts"]["total"]:
        return ["fits: a dense model, all of it stays in memory"]
    if facts["fits"]:
        return ["fits: every expert stays in memory"]
    return ["works: experts beyond the budget are read from the file"]


def _experts(facts: dict[str, Any]) -> list[str]:
    """Return lines on experts, none for a model that has none."""
    experts, told = facts["experts"], facts["forecast"]
    if not experts["total"]:
        return []
    lines = [
        f"experts           {experts['slots']} of {experts['total']} ({experts['share']:.1%}); "
        f"by worker {', '.join(map(str, experts['of_workers']))}"
    ]
    if experts["slots"] < experts["total"]:
        lines += [
            f"hit rate          {_band(told['hit_rate'], '{:.1%}')} ({told['prior']})",
            f"read per token    {_band(told['read_bytes_per_token'], '{:.4g} MB', 1e-6)} "
            f"of {told['asked_bytes_per_token'] / 1e6:.4g} MB asked for",
        ]
    return lines


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
