"""The command `sterna inspect`: what is in a model file, and how it will be held. Starts nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .config import SETTINGS, embedded_model
from .render import grid, table


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
    """Tell what MODEL, a GGUF file, holds and how it would be kept in memory.

    Without MODEL, the embedded one.
    """
    from .inspect_model import describe

    facts = describe(Path(model) if model else embedded_model(), ternary, activations, precision)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return 0
    types = facts.pop("types")
    facts.pop("activation_error")
    click.echo(table(facts))
    head = ("type", "tensors", "file MB", "held as", "reads")
    rows = [
        (
            row["type"],
            str(row["tensors"]),
            f"{row['file_bytes'] / 1e6:.1f}",
            row["held_as"],
            row["activations"],
        )
        for row in types
    ]
    click.echo("\n" + grid(head, rows))
    return 0
