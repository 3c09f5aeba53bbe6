"""The commands `sterna status` and `sterna memory`: what the running daemon does, and changing its budget."""

from __future__ import annotations

from typing import Any

import click

from ...config import read_memory
from ...sizes import format_size
from ..options import JSON_OPTION, SOCKET_OPTION, json_text, open_client
from ..render import table


@click.command()
@SOCKET_OPTION
@click.option("--all", "everything", is_flag=True, help="Print every figure that there is.")
@JSON_OPTION
def status(socket: str | None, everything: bool, as_json: bool) -> int:
    """Print what the running daemon does, on one screen.

    Speeds are means of the last ten seconds. With --json all figures as one object, whose keys stay.
    """
    with open_client(socket) as client:
        body = client.status()
    if as_json:
        click.echo(json_text(body, indent=2))
    elif everything:
        click.echo(table(body))
    else:
        from ...protocol.report import StatusReport
        from ..status_screen import screen

        click.echo(screen(StatusReport.from_body(body)))
    return 0


@click.command()
@click.argument("size")
@SOCKET_OPTION
@JSON_OPTION
def memory(size: str, socket: str | None, as_json: bool) -> int:
    """Change how much memory the running daemon may use.

    SIZE is such as 2GiB; `auto` is what the daemon started with.
    """
    if size != "auto":
        read_memory(size, "SIZE")
    with open_client(socket) as client:
        held = client.resize(size)
    click.echo(json_text(held) if as_json else _held(held))
    return 0


def _held(held: dict[str, Any]) -> str:
    freed = held["freed_bytes"]
    change = f"{format_size(freed)} given back" if freed >= 0 else f"{format_size(-freed)} taken"
    return (
        f"{held['slots']} of {held['experts']} experts may stay in memory, "
        f"{format_size(held['used_bytes'])} of {format_size(held['memory_bytes'])} used, {change}"
    )
