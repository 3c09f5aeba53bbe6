"""The command `sterna`: `serve`, `generate`, `embed`, `status`, `tokenize`; others in the files `cli_*`.

In here: arguments, exit codes and what goes to which stream: answers to stdout, all else to stderr. Every
error is one line. Modules that cost time are imported by the command that needs them, by --version none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click

from ... import __version__
from ...shm.errors import BadRequest, DaemonUnreachable, SternaError, UsageError
from ..cli_validate import validate
from ..config import SETTINGS, embedded_model, env_of, flag_of, load_config
from .commands.inspect import inspect
from .commands.kernels import bench, warm
from .commands.plan import memory, plan
from .commands.quality import calibrate, perplexity, quality_option, trace
from .commands.quantize import quantize
from .commands.simulate import simulate
from .reading import read_text
from .render import for_terminal, one_line, routing_line, statistics, table
from .signals import EXIT_SIGTERM, exit_on_sigterm

if TYPE_CHECKING:
    from ..client.client import Client
    from ..client.options import GenerateOptions
    from ..client.results import Result
    from ..client.stream import Stream

EXIT_INTERNAL = 70
EXIT_SIGINT = 130
EXIT_SIGPIPE = 141
MAX_STDIN_BYTES = 16 * 2**20

SOCKET_OPTION = click.option("--socket", metavar="URL", help="ipc:// URL of the daemon.")
Command = Callable[..., int]
_METAVARS = {
    "integer": "N", "seconds": "SECONDS", "url": "URL", "size": "SIZE", "share": "N|PERCENT",
    "percent": "PERCENT", "path": "FILE",
}  # fmt: skip


class _ClosedPipeError(Exception):
    """Who read our output has gone."""


class _Group(click.Group):
    """Keeps click from its own way with a closed pipe, which is exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ClosedPipeError from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sterna", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve and use ternary Mixture-of-Experts language models on small machines."""


cli.add_command(bench)
cli.add_command(calibrate)
cli.add_command(inspect)
cli.add_command(memory)
cli.add_command(plan)
cli.add_command(simulate)
cli.add_command(perplexity)
cli.add_command(quantize)
cli.add_command(trace)
cli.add_command(validate)
cli.add_command(warm)


def _setting_options(command: Command) -> Command:
    """Give a command one flag per setting of the daemon, in the order of `Config`."""
    for name, setting in reversed(SETTINGS.items()):
        if name == "model":
            continue
        names = [name, flag_of(name), *([setting.short] if setting.short else [])]
        metavar = _METAVARS.get(setting.kind, "|".join(setting.choices))
        text = f"{setting.help} ({env_of(name)})"
        command = click.option(*names, metavar=metavar, help=text)(command)
    return command


@cli.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "model_flag", metavar="FILE", hidden=True)
@click.option("--config", "config_file", metavar="FILE", help="TOML file instead of the default ones.")
@click.option("--exit-with-parent", type=int, hidden=True)
@_setting_options
def serve(
    model: str | None,
    model_flag: str | None,
    config_file: str | None,
    exit_with_parent: int | None,
    **flags: str | None,
) -> int:
    """Serve MODEL, a GGUF file, until SIGTERM; without one, the embedded model."""
    if model and model_flag:
        raise UsageError("the model is given twice, as argument and with --model")
    flags["model"] = model or model_flag
    config = load_config(Path(config_file) if config_file else None, os.environ, flags)
    from ..daemon.daemon import serve as run_daemon

    if exit_with_parent is None:
        return run_daemon(config)
    from .private_daemon import print_progress

    _exit_with_parent(exit_with_parent)
    return run_daemon(config, print_progress)


@cli.command()
@click.argument("prompt")
@SOCKET_OPTION
@click.option("-m", "--model", metavar="FILE", help="GGUF file; a daemon is started unless one serves it.")
@click.option("-n", "--max-tokens", type=int, metavar="N", help="Longest answer [256].")
@click.option("-t", "--temperature", type=float, metavar="X", help="0 is greedy [0.7].")
@click.option("--top-k", type=int, metavar="N", help="Keep the N best tokens, 0 all [40].")
@click.option("--top-p", type=float, metavar="P", help="Keep the best tokens of together P [0.95].")
@click.option("--min-p", type=float, metavar="P", help="Drop below P times the best [0].")
@click.option("--seed", type=int, metavar="N", help="Repeat an answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT; may be repeated.")
@quality_option("the daemon's")
@click.option("--lost-mass", type=float, metavar="X", hidden=True)
@click.option("--chat", is_flag=True, help="Ask PROMPT as a user, by the model's chat template.")
@click.option("--system", metavar="TEXT", help="What the model is told before; implies --chat.")
@click.option("--echo", is_flag=True, help="Print the prompt before the answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--stats/--no-stats", default=True, help="Speeds on stderr [on].")
def generate(
    prompt: str,
    socket: str | None,
    model: str | None,
    stop: tuple[str, ...],
    chat: bool,
    system: str | None,
    echo: bool,
    as_json: bool,
    stats: bool,
    **options: float | None,
) -> int:
    """Print the answer to PROMPT, or to what stdin holds if it is `-`.

    Uses the daemon if one runs, else starts one for this call.
    """
    exit_on_sigterm()
    text = _read_stdin() if prompt == "-" else prompt
    given = {name: value for name, value in options.items() if value is not None}
    sampling = cast("GenerateOptions", {**given, "stop": list(stop)})
    chat = chat or system is not None
    with _daemon_for(socket, model, stats, chat=chat) as client:
        if chat:
            text = _as_prompt(client, _conversation(system, text))
            sampling["special"] = True
        with client.generate(text, stream=True, **sampling) as stream:
            result = _print_answer(stream, text if echo else "", as_json)
    if stats:
        click.echo(statistics(result), err=True)
        if result.routing is not None:
            click.echo(routing_line(result.routing), err=True)
    return 0


@cli.command()
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@SOCKET_OPTION
@click.option("-m", "--model", metavar="FILE", help="GGUF file; a daemon is started unless one serves it.")
@click.option(
    "--pooling", type=click.Choice(("mean", "cls", "last")), help="[as the model's file says, else last]"
)
@click.option("--raw", is_flag=True, help="Do not scale to length 1.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def embed(
    texts: tuple[str, ...],
    socket: str | None,
    model: str | None,
    pooling: str | None,
    raw: bool,
    as_json: bool,
) -> int:
    """Print a vector for each TEXT, one line each, or for what stdin holds if it is `-`.

    Uses the daemon if one runs, else starts one for this call.
    """
    exit_on_sigterm()
    contents = [_read_stdin() if text == "-" else text for text in texts]
    with _daemon_for(socket, model, stats=True) as client:
        vectors = client.embed(contents, pooling=pooling, normalize=not raw)
    # The shortest figures that give the same float32 again.
    rows = [[str(value) for value in vector] for vector in vectors]
    if as_json:
        click.echo(_json({"dim": vectors.shape[1], "embeddings": [[float(v) for v in row] for row in rows]}))
        return 0
    for row in rows:
        click.echo(" ".join(row))
    return 0


@cli.command()
@SOCKET_OPTION
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(socket: str | None, as_json: bool) -> int:
    """Print what the daemon says about itself."""
    with _client(socket) as client:
        body = client.status()
    click.echo(_json(body, indent=2) if as_json else table(body))
    return 0


@cli.command()
@click.argument("text")
@SOCKET_OPTION
@click.option("--special", is_flag=True, help="Read control tokens out of the text.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def tokenize(text: str, socket: str | None, special: bool, as_json: bool) -> int:
    """Print the token ids of TEXT, or of what stdin holds if it is `-`."""
    text = _read_stdin() if text == "-" else text
    with _client(socket) as client:
        token_ids = client.tokenize(text, special=special)
    click.echo(_json(token_ids) if as_json else " ".join(map(str, token_ids)))
    return 0


def _client(socket: str | None) -> Client:
    from ..client.client import Client
    from ..protocol.sockets import check_url

    return Client(None if socket is None else check_url(socket, "--socket"))


@contextlib.contextmanager
def _daemon_for(socket: str | None, model: str | None, stats: bool, chat: bool = False) -> Iterator[Client]:
    """Yield a client of a daemon that serves the model: one that runs, or one started for this call.

    A socket that was asked for by name must have its daemon: no other one is started then. With `chat` none
    is started for a model without a chat template.
    """
    path = None if model is None else Path(model).expanduser().absolute()
    with _client(socket) as client:
        try:
            served = client.connect().model
        except DaemonUnreachable as e:
            if socket is not None or os.environ.get("STERNA_SOCKET"):
                raise
            note = str(e).partition(";")[0]
        else:
            if path is None or Path(served.path).resolve() == path.resolve():
                yield client
                return
            note = f"the daemon at {client.url} serves {served.path}"
            if socket is not None:
                raise UsageError(f"{note}, not {path}")
    config = load_config(None, os.environ, {"model": model})
    if chat:
        _require_template(config.model or embedded_model())
    if stats:
        click.echo(f"sterna: {note}; starting one for this call", err=True)
    from ..client.client import Client
    from .private_daemon import private_daemon
    from .progress import StartProgress

    arguments = [] if path is None else [str(path)]
    with contextlib.ExitStack() as stack:
        with StartProgress() as progress:
            url = stack.enter_context(private_daemon(arguments, config.start_timeout_s, progress.update))
        yield stack.enter_context(Client(url))


def _as_prompt(client: Client, messages: list[dict[str, str]]) -> str:
    try:
        return client.apply_template(messages)
    except BadRequest as error:
        if not str(error).startswith("no chat template in "):
            raise
        said = str(error).rpartition(":")[0]  # the daemon's hint is for those who write programs
        raise BadRequest(f"{said}: leave out --chat") from None


def _require_template(path: Path) -> None:
    """Refuse a model without a chat template by its header alone; raises BadRequest and the file's errors."""
    from ...workers.checkpoint.file.gguf import GgufFile
    from ..chat.template import template_sources

    with GgufFile.open(path) as file:
        if not template_sources(file.metadata, file.label):
            raise BadRequest(f"no chat template in {path}: leave out --chat")


def _conversation(system: str | None, text: str) -> list[dict[str, str]]:
    told = [] if system is None else [{"role": "system", "content": system}]
    return [*told, {"role": "user", "content": text}]


def _print_answer(stream: Stream, before: str, as_json: bool) -> Result:
    shown: Callable[[str], str] = for_terminal if sys.stdout.isatty() else str
    if as_json:
        result = stream.read()
        click.echo(_json(_as_dict(result)))
        return result
    click.echo(shown(before), nl=False)
    for chunk in stream:
        click.echo(shown(chunk.text), nl=False)
        sys.stdout.flush()
    click.echo()
    return stream.read()


def _as_dict(result: Result) -> dict[str, Any]:
    import msgspec

    names = (
        "text", "token_ids", "prompt_token_ids", "finish_reason", "usage", "timings", "seed", "routing"
    )  # fmt: skip
    return {name: msgspec.to_builtins(getattr(result, name)) for name in names}


def _json(value: object, indent: int | None = None) -> str:
    import json

    return json.dumps(value, indent=indent, ensure_ascii=False)


def _read_stdin() -> str:
    return read_text(sys.stdin.buffer, "stdin", MAX_STDIN_BYTES)


def _exit_with_parent(parent_pid: int) -> None:
    """Have the system end this process when the command that started it dies."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the call
        sys.exit(EXIT_SIGTERM)


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
        return _complain(UsageError(e.format_message()))
    except SternaError as e:
        return _complain(e)
    except _ClosedPipeError:
        # Python flushes stdout once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SIGPIPE
    except Exception as e:
        if os.environ.get("STERNA_DEBUG") == "1":
            raise
        return _complain(e, f"unexpected {type(e).__name__}: {e} (STERNA_DEBUG=1 shows where)")


def _complain(error: Exception, text: str | None = None) -> int:
    with contextlib.suppress(OSError):
        click.echo(f"sterna: error: {one_line(text or str(error))}", err=True)
    return error.exit_code if isinstance(error, SternaError) else EXIT_INTERNAL


def main() -> NoReturn:
    """Entry point of the command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
