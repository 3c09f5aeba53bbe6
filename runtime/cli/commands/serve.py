"""The command `sterna serve`: a daemon in this process, and how it shows itself on a terminal.

In here: settings, the bar while it starts, one line when it is ready, one at its end. Where stderr is no
terminal there are log lines instead. Not in here: the daemon (`daemon/daemon.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ....shm.errors import UsageError
from ...config import SETTINGS, Config, load_config
from ..options import model_path, setting_options
from ..render import one_line, ready_line
from ..signals import EXIT_SIGTERM

if TYPE_CHECKING:
    from ...daemon.announcement import Announcement

QUIET_LEVELS = ("warning", "error")


@click.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "model_flag", metavar="FILE", hidden=True)
@click.option("--config", "config_file", metavar="FILE", help="TOML file instead of the default ones.")
@click.option("--exit-with-parent", type=int, hidden=True)
@setting_options(name for name in SETTINGS if name != "model")
def serve(
    model: str | None,
    model_flag: str | None,
    config_file: str | None,
    exit_with_parent: int | None,
    **flags: str | None,
) -> int:
    """Serve MODEL, a GGUF file, until it is told to stop.

    Without MODEL it is the embedded one. Settings come from flags, the variables named below, and TOML files:
    /etc/sterna/config.toml, /etc/sterna/conf.d/*.toml, then ~/.config/sterna/config.toml. Ctrl-C or SIGTERM
    ends the daemon when the answers that run are complete; the second one ends it at once. On a terminal the
    log begins at warnings unless --log-level is given.
    """
    if model and model_flag:
        raise UsageError("the model is given twice, as argument and with --model")
    private = exit_with_parent is not None
    on_terminal = sys.stderr.isatty() and not private
    config = load_config(
        Path(config_file) if config_file else None,
        os.environ,
        {**flags, "model": model or model_flag},
        defaults={"log_level": "warning"} if on_terminal else None,
    )
    if config.model is not None:
        model_path(str(config.model))  # a hint is worth more than what the file's reader says
    if on_terminal and config.log_level in QUIET_LEVELS:
        return _serve_on_terminal(config)
    from ...daemon.daemon import serve as run_daemon

    if exit_with_parent is None:
        return run_daemon(config)
    from ..private_daemon import announce, print_progress

    _exit_with_parent(exit_with_parent)
    return run_daemon(config, print_progress, announce)


def _serve_on_terminal(config: Config) -> int:
    """Run the daemon with bars instead of log lines; warnings and errors of the log are shown between."""
    from ...daemon.daemon import serve as run_daemon
    from ..progress import StartProgress

    logging.basicConfig(level=config.log_level.upper(), handlers=[_EchoHandler()])
    with StartProgress() as progress:

        def ready(announcement: Announcement) -> None:
            progress.stop()
            if not sys.stdout.isatty():
                announcement.print_ready()
            click.echo(one_line(ready_line(announcement)), err=True)

        code = run_daemon(config, progress.update, ready)
    click.echo("sterna: stopped", err=True)
    return code


class _EchoHandler(logging.Handler):
    """Shows an event as a line of the command; above the bars while there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the event."""
        text = one_line(self.format(record))
        click.echo(f"sterna: {record.levelname.lower()}: {text}", err=True)


def _exit_with_parent(parent_pid: int) -> None:
    """Have the system end this process when the command that started it dies."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the call
        sys.exit(EXIT_SIGTERM)
