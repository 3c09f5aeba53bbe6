"""The commands `sterna inspect` and `sterna validate`: what is in a model file, and whether it can be run.

Both read the header only and start nothing.
"""

from __future__ import annotations

import os
from typing import Any

import click

from ....shm.errors import ModelFileError
from ...config import load_config
from ..options import JSON_OPTION, MODEL_ARGUMENT, json_text, model_path, setting_options
from ..render import grid, one_line, table


@click.command()
@MODEL_ARGUMENT
@JSON_OPTION
@setting_options(("ternary", "activations", "precision"))
def inspect(model: str | None, as_json: bool, **flags: str | None) -> int:
    """Print what MODEL holds and how it is kept in memory.

    MODEL is a GGUF file, by default the embedded one. Also told is what keeps it from being run.
    """
    from ...examine.describe import describe

    config = load_config(None, os.environ, flags)
    facts = describe(model_path(model), config.ternary, config.activations, config.precision)
    if as_json:
        click.echo(json_text(facts))
        return 0
    types, groups = facts.pop("types"), facts.pop("groups")
    told = [
        *(f"cannot be run: {problem}" for problem in facts.pop("problems")),
        *(f"slow: {text}" for text in facts.pop("slow")),
        *(f"note: {note}" for note in facts.pop("notes")),
    ]
    facts.pop("activation_error", None)
    click.echo(table(facts))
    for line in told:
        click.echo(one_line(line))
    click.echo(f"\n{_groups(groups)}\n\n{_types(types)}")
    return 0


@click.command()
@MODEL_ARGUMENT
@JSON_OPTION
def validate(model: str | None, as_json: bool) -> int:
    """Tell whether MODEL can be loaded.

    MODEL is a GGUF file, by default the embedded one. Exit code 0 if it can, 65 if not, 66 if there is no
    such file, 74 if reading fails, 77 without permission.
    """
    from ...examine.describe import validate as check

    facts = check(model_path(model))
    code = 0 if facts["loads"] else ModelFileError.exit_code
    if as_json:
        click.echo(json_text(facts))
        return code
    if facts["loads"]:
        click.echo(one_line(f"{facts['path']}: can be loaded ({facts['architecture']})"))
    for problem in facts["problems"]:
        click.echo(one_line(problem))
    for severity in ("warning", "note"):
        for text in facts[f"{severity}s"]:
            click.echo(f"sterna: {severity}: {one_line(text)}", err=True)
    return code


def _groups(rows: list[dict[str, Any]]) -> str:
    head = ("group", "tensors", "types", "file MB", "held as", "memory MB", "place")
    return grid(head, [
        (
            row["group"],
            str(row["tensors"]),
            ", ".join(f"{count} {name}" for name, count in row["types"].items()) or "-",
            f"{row['file_bytes'] / 1e6:.1f}",
            ", ".join(row["held_as"]) or "-",
            f"{row['memory_bytes'] / 1e6:.1f}",
            row["place"],
        )
        for row in rows
    ])  # fmt: skip


def _types(rows: list[dict[str, Any]]) -> str:
    head = ("type", "tensors", "file MB", "held as", "reads")
    return grid(head, [
        (
            row["type"],
            str(row["tensors"]),
            f"{row['file_bytes'] / 1e6:.1f}",
            row.get("held_as", "-"),
            row.get("activations", "-"),
        )
        for row in rows
    ])  # fmt: skip
