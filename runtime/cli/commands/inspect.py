"""The command `sterna inspect`: what is in a model file, and how it will be held. Starts nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...config import SETTINGS, embedded_model
from ..render import grid, one_line, table


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--ternary", type=click.Choice(SETTINGS["ternary"].choices), default="auto", help="As of `serve` [auto]."
)
@click.option(
    "--activations",
    type=click.Choice(SETTINGS["activations"].choices),
    default="auto",
    help="As of `serve` [auto].",
)
@click.option(
    "--precision",
    type=click.Choice(SETTINGS["precision"].choices),
    default="off",
    help="As of `serve` [off].",
)
def inspect(model: str | None, as_json: bool, ternary: Any, activations: Any, precision: Any) -> int:  # noqa: ANN401 - checked by click
    """Tell what MODEL, a GGUF file, holds and how it would be kept in memory, or why it cannot be run.

    Without MODEL, the embedded one.
    """
    from ...examine.describe import describe

    facts = describe(Path(model) if model else embedded_model(), ternary, activations, precision)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return 0
    types, groups = facts.pop("types"), facts.pop("groups")
    problems, notes = facts.pop("problems"), facts.pop("notes")
    facts.pop("activation_error", None)
    click.echo(table(facts))
    for line in (
        *(f"cannot be run: {problem}" for problem in problems),
        *(f"note: {note}" for note in notes),
    ):
        click.echo(one_line(line))
    click.echo(f"\n{_groups(groups)}\n\n{_types(types)}")
    return 0


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
