"""The process in which chat templates are parsed and rendered: `python -m sterna.runtime.chat.renderer`.

A template comes with a model from anywhere. Fuel bounds its steps, but one step may double a string or sort a
list: minijinja then aborts its process for want of memory, and the jinja2 sandbox knows no bounds at all. So
templates run here, under RLIMIT_AS and a timer of CPU time that kills; nobody else is in this process.

In here: both engines in the environment that templates are written for, limits, the loop over requests. Not
in here: who starts and ends this process (`process.py`), what a template is given (`template.py`).

A request and its reply are each `frame_of` a JSON object:

    {"cpu_s", "open": {name: source}}                     -> {"engines": {name: engine}}
                                                          -> {"error": one line, "failed": name}
    {"cpu_s", "render": name, "context", "now", "limit"}  -> {"text"} | {"error": one line}
"""

from __future__ import annotations

import importlib
import json
import re
import resource
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO

MEMORY_NBYTES = 256 * 2**20
# One step is 0.05 to 0.2 us. Gemma 4 looks at all messages for each one: it gets as far as some 2,000.
FUEL = 500_000
FUEL_PER_MESSAGE = 10_000
MAX_FRAME_BYTES = 64 * 2**20

_LENGTH = struct.Struct("<I")
# Blocks that mark the assistant's words for training; what stays keeps the white space as it would be.
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")

Render = Callable[[dict[str, Any], datetime], str]


class RefusedError(Exception):
    """The template called `raise_exception`; the text is its own."""


class UnparsableError(Exception):
    """Neither engine takes the source; the text is one line."""


def frame_of(value: object) -> bytes:
    """Return a JSON value with its length before it, as four bytes, little-endian."""
    data = json.dumps(value, separators=(",", ":")).encode()
    return _LENGTH.pack(len(data)) + data


def read_frame(file: BinaryIO) -> dict[str, Any] | None:
    """Return the next value, or None where the file ends; raises ValueError for too long a frame."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (nbytes,) = _LENGTH.unpack(head)
    if nbytes > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {nbytes} bytes")
    data = file.read(nbytes)
    value = json.loads(data) if len(data) == nbytes else None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"a frame with a {type(value).__name__}")
    return value


def refuse(message: object) -> None:
    """Be the `raise_exception` of templates."""
    raise RefusedError(str(message))


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Be the `tojson` of templates: Python's own, without the escapes that Jinja's has for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def plain(source: str) -> str:
    """Return the template with blocks of `generation` as blocks that are always taken."""
    return _GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", source)


def open_template(name: str, source: str) -> tuple[str, Render]:
    """Return the engine's name and what renders with it; raises UnparsableError."""
    import minijinja

    try:
        return "minijinja", _minijinja(name, source)
    except minijinja.TemplateError as error:
        complaint = one_line(error)
    except BaseException as error:  # a panic of the engine derives from BaseException alone
        complaint = f"{type(error).__name__}: {one_line(error)}"
    try:
        return "jinja2", _jinja2(name, source)
    except ImportError:
        raise UnparsableError(
            f"{complaint}; jinja2 might parse it, but is not installed (the extra `jinja2`)"
        ) from None
    except Exception as error:
        line = getattr(error, "lineno", None)
        at = f" (line {line})" if line else ""
        raise UnparsableError(f"{complaint}; jinja2: {one_line(error)}{at}") from None


def _minijinja(name: str, source: str) -> Render:
    import minijinja

    # With debug, an error carries source and variables along.
    environment = minijinja.Environment(debug=False, trim_blocks=True, lstrip_blocks=True)
    environment.auto_escape_callback = lambda _: None
    environment.add_filter("tojson", tojson)
    environment.add_global("raise_exception", refuse)
    environment.add_template(name, plain(source))

    def render(context: dict[str, Any], now: datetime) -> str:
        environment.fuel = fuel_for(context)
        environment.add_global("strftime_now", now.strftime)
        return environment.render_template(name, **context)

    return render


def _jinja2(name: str, source: str) -> Render:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # What is rendered is a prompt, not a page: autoescape would change the user's words.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(plain(source))
    template.name = name

    def render(context: dict[str, Any], now: datetime) -> str:
        return template.render(**context, strftime_now=now.strftime)

    return render


def fuel_for(context: dict[str, Any]) -> int:
    """Return how many steps minijinja may run for a conversation."""
    return FUEL + FUEL_PER_MESSAGE * len(context.get("messages", ()))


def one_line(error: BaseException) -> str:
    """Return the first line of what an error says, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class Renderer:
    """The templates of one model."""

    def __init__(self) -> None:
        self._renders: dict[str, Render] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a request; raises nothing but a panic of an engine."""
        try:
            return self._open(request["open"]) if "open" in request else self._render(request)
        except RefusedError as error:
            return {"error": str(error)[:1000]}
        except MemoryError:
            return {"error": f"it needs more than {MEMORY_NBYTES >> 20} MiB of memory"}
        except BaseException as error:
            reason = getattr(error, "kind", None)
            if reason == "OutOfFuel":
                return {"error": f"more than {fuel_for(request['context'])} steps"}
            return {"error": one_line(error)}

    def _open(self, sources: dict[str, str]) -> dict[str, Any]:
        engines = {}
        for name, source in sources.items():
            try:
                engines[name], self._renders[name] = open_template(name, source)
            except UnparsableError as error:
                return {"failed": name, "error": str(error)}
        return {"engines": engines}

    def _render(self, request: dict[str, Any]) -> dict[str, Any]:
        now = datetime.fromisoformat(request["now"])
        text = self._renders[request["render"]](request["context"], now)
        nbytes = len(text.encode("utf-8", "surrogatepass"))
        if nbytes > request["limit"]:
            return {"error": f"it writes {nbytes} bytes, expected at most {request['limit']}"}
        return {"text": text}


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more; the CPU time of each is bounded by its `cpu_s`."""
    renderer = Renderer()
    while (request := read_frame(requests)) is not None:
        # Its signal is left to the system, which ends this process in the midst of any step.
        signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
        reply = frame_of(renderer.answer(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply)
        replies.flush()


def main() -> None:
    """Set the limits of this process and serve its standard input."""
    importlib.import_module("minijinja")  # without it no template is to blame
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_NBYTES, MEMORY_NBYTES))
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
