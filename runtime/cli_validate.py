"""The command `sterna validate`: whether a model can be loaded, and what is against it. Starts nothing."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..shm.errors import ModelFileError
from .cli.render import one_line


@click.command()
@click.argument("model", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def validate(model: str, as_json: bool) -> int:
    """Tell whether FILE, a GGUF file, can be loaded. Reads its header only.

    Exit code 0 if it can, 65 if not, 66 if there is no such file, 74 if reading fails, 77 without permission.
    """
    from .examine.describe import validate as check

    facts = check(Path(model))
    code = 0 if facts["loads"] else ModelFileError.exit_code
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return code
    if facts["loads"]:
        click.echo(one_line(f"{facts['path']}: can be loaded ({facts['architecture']})"))
    for problem in facts["problems"]:
        click.echo(one_line(problem))
    for kind in ("warning", "note"):
        for text in facts[f"{kind}s"]:
            click.echo(f"sterna: {kind}: {one_line(text)}", err=True)
    return code
