"""The command `sterna`: its group of commands, and what becomes of errors and signals.

In here: exit codes; every error is one line on stderr. Not in here: the commands (`commands/`) and their
options (`options.py`). Modules that cost time are imported by the command that needs them, by --version none.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import Final, NoReturn

import click

from ... import __version__
from ...shm.errors import SternaError, UsageError
from .commands.generate import embed, generate, tokenize
from .commands.inspect import inspect, validate
from .commands.kernels import bench, warm
from .commands.plan import plan
from .commands.quality import calibrate, perplexity, trace
from .commands.quantize import quantize
from .commands.serve import serve
from .commands.simulate import simulate
from .commands.status import memory, status
from .render import one_line

EXIT_INTERNAL: Final = 70
EXIT_SIGINT: Final = 130
EXIT_SIGPIPE: Final = 141


class _ClosedPipeError(Exception):
    """Who read our output has gone."""


class _CommandGroup(click.Group):
    """Keeps click from its own way with a closed pipe, which is exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ClosedPipeError from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in the groups of SECTIONS."""
        longest = max(len(name) for name in self.commands)
        limit = formatter.width - 6 - longest
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                rows = [(each.name or "", each.get_short_help_str(limit)) for each in commands]
                formatter.write_dl([(name.ljust(longest), text) for name, text in rows])


@click.group(cls=_CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sterna", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve and use ternary Mixture-of-Experts language models on small machines."""


SECTIONS: Final[dict[str, tuple[click.Command, ...]]] = {
    "Use a model": (generate, embed, tokenize),
    "Run the daemon": (serve, status, memory),
    "Look at a model file": (inspect, validate, plan),
    "Make and measure": (quantize, perplexity, warm, bench),
    "Research on expert memory": (trace, calibrate, simulate),
}
"""The commands as the help groups them."""

for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)


def run(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; errors are printed, none is raised but SystemExit."""
    try:
        return int(cli.main(arguments, prog_name="sterna", standalone_mode=False) or 0)
    except click.exceptions.Abort:
        return EXIT_SIGINT
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        return UsageError.exit_code
    except click.ClickException as e:
        return _complain(UsageError(e.format_message()).with_traceback(e.__traceback__))
    except SternaError as e:
        return _complain(e)
    except _ClosedPipeError:
        # Python flushes stdout once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SIGPIPE
    except Exception as e:
        hint = "" if _is_debugging() else " (STERNA_DEBUG=1 shows where)"
        return _complain(e, f"unexpected {type(e).__name__}: {e}{hint}")


def _is_debugging() -> bool:
    return os.environ.get("STERNA_DEBUG") == "1"


def _complain(error: Exception, text: str | None = None) -> int:
    """Print one line about `error`, with STERNA_DEBUG=1 its traceback before it; return the exit code."""
    with contextlib.suppress(OSError):
        if _is_debugging():
            click.echo("".join(traceback.format_exception(error)), nl=False, err=True)
        click.echo(f"sterna: error: {one_line(text or str(error))}", err=True)
    return error.exit_code if isinstance(error, SternaError) else EXIT_INTERNAL


def main() -> NoReturn:
    """Entry point of the command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
