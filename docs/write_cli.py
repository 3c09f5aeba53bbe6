"""Write docs/cli.md: the help of all commands. `make docs` runs it; tests/test_docs.py compares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from sterna.runtime.cli.main import cli

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Commands

`make docs` writes this page from the help of the commands. Exit codes, and where settings are looked up,
are described in [operations.md](operations.md).
"""
WIDTH = 100


def commands(command: click.Command, parent: click.Context) -> Iterator[click.Context]:
    """Yield a context for `command` and for each command below it, in alphabetical order."""
    here = click.Context(command, info_name=command.name, parent=parent, terminal_width=WIDTH)
    yield here
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from commands(command.commands[name], here)


def page() -> str:
    """Return the text of docs/cli.md."""
    top = click.Context(cli, info_name="sterna", terminal_width=WIDTH, **cli.context_settings)
    contexts = [top]
    for name in sorted(cli.commands):
        contexts += commands(cli.commands[name], top)
    parts = [
        f"## {each.command_path}\n\n```\n{each.command.get_help(each).rstrip()}\n```\n" for each in contexts
    ]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    PAGE.write_text(page())
