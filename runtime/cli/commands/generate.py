"""The commands `sterna generate`, `embed` and `tokenize`: what a model makes of a text.

In here: arguments, and which daemon answers. Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import click

from ....shm.errors import BadRequest, DaemonUnreachable, NoChatTemplate, UsageError
from ...config import flag_of, load_config
from ..options import (
    JSON_OPTION,
    SOCKET_OPTION,
    json_text,
    model_path,
    open_client,
    quality_option,
    sampling_options,
)
from ..reading import read_text
from ..render import cut_line, embeddings, for_terminal, routing_line, statistics
from ..signals import exit_on_sigterm

if TYPE_CHECKING:
    from ...client.client import Client
    from ...client.options import GenerateOptions
    from ...client.results import Result
    from ...client.stream import Stream

MAX_STDIN_BYTES: Final = 16 * 2**20

_MODEL_OPTION = click.option(
    "-m",
    "--model",
    metavar="FILE",
    help="GGUF file, or `embedded`; a daemon is started for this call unless one serves it.",
)


@click.command()
@click.argument("prompt", nargs=-1, required=True, metavar="PROMPT")
@SOCKET_OPTION
@_MODEL_OPTION
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT; may be repeated.")
@quality_option("the daemon's")
@click.option("--lost-mass", type=float, metavar="X", hidden=True)
@click.option("--chat", is_flag=True, help="Ask PROMPT as a user, by the model's chat template.")
@click.option("--system", metavar="TEXT", help="What the model is told before PROMPT; implies --chat.")
@click.option("--echo", is_flag=True, help="Print the prompt before the answer.")
@JSON_OPTION
@click.option("--stats/--no-stats", default=True, help="Print speeds on stderr [--stats].")
def generate(
    prompt: tuple[str, ...],
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
    """Print the answer to PROMPT.

    Several words are one prompt; `-` is what stdin holds. The daemon that runs answers. Without one, or with
    -m if it serves another model, one is started for this call. A socket that --socket or STERNA_SOCKET
    names must have its daemon, unless -m says which model to start one with.
    """
    exit_on_sigterm()
    text = _prompt(prompt)
    given = {name: value for name, value in options.items() if value is not None}
    sampling = cast("GenerateOptions", {**given, "stop": list(stop)})
    _check(text, sampling)
    chat = chat or system is not None
    with _daemon_for(socket, model, stats, chat=chat) as client:
        if chat:
            text = _as_prompt(client, _conversation(system, text))
            sampling["special"] = True
        with client.generate(text, stream=True, **sampling) as stream:
            result = _print_answer(stream, text if echo else "", as_json)
        cut = cut_line(result, sampling.get("max_tokens"), client.connect().model.context_length)
    for line in (cut, *(_told(result) if stats else ())):
        if line:
            click.echo(line, err=True)
    return 0


def _prompt(words: tuple[str, ...]) -> str:
    """Return the prompt; raises UsageError for an empty stdin: an answer to nothing is babble."""
    if words != ("-",):
        return " ".join(words)
    text = _read_stdin()
    if not text:
        raise UsageError("stdin: expected a prompt, found nothing")
    return text


def _check(text: str, sampling: GenerateOptions) -> None:
    """Refuse a wrong value before a daemon is started for it; raises BadRequest, which names its flag."""
    from ...client.requests import generate_message
    from ...protocol.codec import encode

    try:
        encode(generate_message(text, None, sampling))
    except BadRequest as error:
        fields, colon, complaint = str(error).partition(":")
        flags = re.sub(r"\w+", lambda name: flag_of(name[0]) if name[0] in sampling else name[0], fields)
        raise BadRequest(f"{flags}{colon}{complaint}") from None


def _told(result: Result) -> list[str]:
    return [statistics(result), *([] if result.routing is None else [routing_line(result.routing)])]


@click.command()
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@SOCKET_OPTION
@_MODEL_OPTION
@click.option(
    "--pooling",
    type=click.Choice(("mean", "cls", "last")),
    help="How the tokens of a text become one vector [as the model's file says, else last].",
)
@click.option("--raw", is_flag=True, help="Do not scale vectors to length 1.")
@JSON_OPTION
def embed(
    texts: tuple[str, ...],
    socket: str | None,
    model: str | None,
    pooling: str | None,
    raw: bool,
    as_json: bool,
) -> int:
    """Print a vector for each TEXT.

    One line is one vector; a terminal shows the first values of each, and how similar up to 8 texts are.
    `-` is what stdin holds. Which daemon computes it is decided as for `generate`.
    """
    exit_on_sigterm()
    contents = [_read_stdin() if text == "-" else text for text in texts]
    with _daemon_for(socket, model, stats=True) as client:
        vectors = client.embed(contents, pooling=pooling, normalize=not raw)
    if sys.stdout.isatty() and not as_json:
        click.echo(embeddings(contents, vectors.tolist()))
        return 0
    # The shortest figures that give the same float32 again.
    rows = [[str(value) for value in vector] for vector in vectors]
    if as_json:
        numbers = [[float(value) for value in row] for row in rows]
        click.echo(json_text({"dim": vectors.shape[1], "embeddings": numbers}))
        return 0
    for row in rows:
        click.echo(" ".join(row))
    return 0


@click.command()
@click.argument("text")
@SOCKET_OPTION
@click.option("--special", is_flag=True, help="Read control tokens out of the text.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def tokenize(text: str, socket: str | None, special: bool, as_json: bool) -> int:
    """Print the token ids of TEXT.

    `-` is what stdin holds. A daemon must run: its model's tokenizer does it.
    """
    text = _read_stdin() if text == "-" else text
    with open_client(socket) as client:
        token_ids = client.tokenize(text, special=special)
    click.echo(json_text(token_ids) if as_json else " ".join(map(str, token_ids)))
    return 0


@contextlib.contextmanager
def _daemon_for(socket: str | None, model: str | None, stats: bool, chat: bool = False) -> Iterator[Client]:
    """Yield a client of a daemon that serves the model: one that runs, or one started for this call.

    A socket that was asked for by name must have its daemon, unless a model says what to start one with.
    With `chat` none is started for a model without a chat template.
    """
    path = None if model is None else model_path(model)
    with open_client(socket) as client:
        try:
            served = client.connect().model
        except DaemonUnreachable as e:
            if path is None and (socket is not None or os.environ.get("STERNA_SOCKET")):
                raise
            note = str(e).partition(";")[0]
        else:
            if path is None or Path(served.path).resolve() == path.resolve():
                yield client
                return
            note = f"the daemon at {client.url} serves {served.path}"
            if socket is not None:
                raise UsageError(f"{note}, not {path}")
    config = load_config(None, os.environ, {"model": path})
    if chat:
        _require_template(config.model or model_path(None))
    if stats:
        click.echo(f"sterna: {note}; starting one for this call", err=True)
    from ...client.client import Client
    from ..private_daemon import print_note, private_daemon
    from ..progress import StartProgress

    arguments = [] if path is None else [str(path)]
    with contextlib.ExitStack() as stack:
        with StartProgress() as progress:
            url = stack.enter_context(
                private_daemon(arguments, config.start_timeout_s, progress.update, print_note)
            )
        yield stack.enter_context(Client(url))


def _as_prompt(client: Client, messages: list[dict[str, str]]) -> str:
    try:
        return client.apply_template(messages)
    except NoChatTemplate as error:
        said = str(error).rpartition(":")[0]  # the daemon's hint is for those who write programs
        raise NoChatTemplate(f"{said}: leave out --chat") from None


def _require_template(path: Path) -> None:
    """Refuse a model without a chat template by its header; raises NoChatTemplate and the file's errors."""
    from ....workers.checkpoint.file.gguf import GgufFile
    from ...chat.template import template_sources

    with GgufFile.open(path) as file:
        if not template_sources(file.metadata, file.label):
            raise NoChatTemplate(f"no chat template in {path}: leave out --chat")


def _conversation(system: str | None, text: str) -> list[dict[str, str]]:
    told = [] if system is None else [{"role": "system", "content": system}]
    return [*told, {"role": "user", "content": text}]


def _print_answer(stream: Stream, before: str, as_json: bool) -> Result:
    shown: Callable[[str], str] = for_terminal if sys.stdout.isatty() else str
    if as_json:
        result = stream.read()
        click.echo(json_text(_as_dict(result)))
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


def _read_stdin() -> str:
    return read_text(sys.stdin.buffer, "stdin", MAX_STDIN_BYTES)
