"""The options of the commands, made from what they set: a daemon's `Config`, a request's `Generate`.

In here: one function for each family of options, and what a command does with their values first. Names,
ranges, choices and defaults stand in `config.SETTINGS`, `Config` and `messages.Generate` and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ...shm.errors import UsageError
from ..config import EMBEDDED, SETTINGS, SettingRule, default_text, embedded_model, env_of, flag_of
from ..examine.recognize import refuse_other_files

if TYPE_CHECKING:
    from ..client.client import Client

Command = Callable[..., int]

MAX_BUDGET: Final = SETTINGS["quality_budget"].high / 100
MAX_TEMPERATURE: Final = 5.0
"""A larger one is a slip of the finger: every token would be about as likely as any other."""

_METAVARS: Final = {
    "integer": "N", "seconds": "SECONDS", "url": "URL", "size": "SIZE", "share": "N|PERCENT",
    "percent": "PERCENT", "path": "FILE",
}  # fmt: skip

SOCKET_OPTION = click.option(
    "--socket", metavar="URL", help=f"ipc:// URL of the daemon ({env_of('socket')})."
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
MODEL_ARGUMENT = click.argument("model", required=False)


class SpelledOption(click.Option):
    """An option with other spellings, which are accepted and not shown in the help."""

    def __init__(self, *args: Any, also: Sequence[str] = (), **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._also = also

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:  # noqa: ANN401 - private class of click
        """Have the parser know every spelling."""
        shown = self.opts
        self.opts = [*shown, *self._also]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown


# ---- a daemon's settings ----


def metavar_of(rule: SettingRule) -> str:
    """Return what stands for the value in a help text: N, SIZE, auto|off."""
    return "|".join(rule.choices) or _METAVARS[rule.syntax]


def setting_options(names: Iterable[str]) -> Callable[[Command], Command]:
    """Return a decorator that gives a command a flag for each of these settings, in that order.

    A value is the text that was given, which `load_config` checks, or None.
    """
    wanted = list(names)

    def add(command: Command) -> Command:
        for name in reversed(wanted):
            rule = SETTINGS[name]
            text = f"{rule.help} [{default_text(name)}] ({env_of(name)})."
            spellings = [*([rule.short] if rule.short else []), flag_of(name)]
            command = click.option(
                name, *spellings, cls=SpelledOption, also=rule.also, metavar=metavar_of(rule), help=text
            )(command)
        return command

    return add


def window_option(default: int) -> Callable[[Command], Command]:
    """Return the option --ctx-size of commands that cut a text into windows."""
    rule = SETTINGS["ctx_size"]
    return click.option(
        "ctx", rule.short or "", flag_of("ctx_size"), cls=SpelledOption, also=rule.also, metavar="N",
        type=NumberRange(2), help=f"Tokens per window [{default}].",
    )  # fmt: skip


class NumberRange(click.IntRange):
    """Whole numbers within limits, which the error names and not the help."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """Return the number; fails outside of the limits."""
        number = int(click.INT.convert(value, param, ctx))
        return (
            number if _within(number, self.min, self.max) else self.fail(_refused(self, number), param, ctx)
        )

    def _describe_range(self) -> str:
        return ""


class FractionRange(click.FloatRange):
    """Numbers within limits, which the error names and not the help; NaN is left to whoever computes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """Return the number; fails outside of the limits."""
        number = float(click.FLOAT.convert(value, param, ctx))
        return (
            number if _within(number, self.min, self.max) else self.fail(_refused(self, number), param, ctx)
        )

    def _describe_range(self) -> str:
        return ""


def _within(number: float, low: float | None, high: float | None) -> bool:
    return not ((low is not None and number < low) or (high is not None and number > high))


def _refused(limits: click.IntRange | click.FloatRange, number: float) -> str:
    low, high = limits.min, limits.max
    if high is None:
        return f"{number:g} is not in the range from {low:g} on"
    start = "" if low is None else f"{low:g} "
    return f"{number:g} is not in the range {start}to {high:g}"


# ---- quality budgets ----


def fraction(text: str, flag: str) -> float:
    """Return what a text such as "0.5%" says of perplexity; raises UsageError outside 0 to MAX_BUDGET."""
    with contextlib.suppress(ValueError):
        number = float(text.removesuffix("%")) / 100
        if text.endswith("%") and 0 <= number <= MAX_BUDGET:
            return number
    raise UsageError(f"{flag}: expected a share from 0% to {MAX_BUDGET:.0%}, such as 0.5%, found {text!r}")


def _budget(context: click.Context, option: click.Parameter, text: str | None) -> float | None:
    return None if text is None else fraction(text, option.opts[0])


def quality_option(default: str) -> Callable[[Command], Command]:
    """Return the option --quality-budget; its value is a fraction, or None."""
    text = f"Rise of perplexity that speed may cost [{default}]."
    return click.option("--quality-budget", callback=_budget, metavar="PERCENT", help=text)


# ---- a request's options ----


class RequestOption(click.Option):
    """An option of a request; its help ends with the default of the field of `messages.Generate`."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return both columns of the help."""
        record = super().get_help_record(ctx)
        if record is None or self.name is None:
            return record
        from ..protocol.messages import Generate  # here: it costs time that only this help takes

        default = getattr(Generate(id="none", prompt=""), self.name)
        return record if default is None else (record[0], f"{record[1].removesuffix('.')} [{default}].")


# Flags, type, metavar, help.
_SAMPLING: Final[tuple[tuple[tuple[str, ...], Any, str, str], ...]] = (
    (("-n", "--max-tokens"), click.INT, "N", "Tokens that the answer may have."),
    (
        ("-t", "--temperature"),
        FractionRange(0, MAX_TEMPERATURE),
        "X",
        f"Spread of the choice, 0 to {MAX_TEMPERATURE:g}; 0 always takes the most probable token.",
    ),
    (("--top-k",), click.INT, "N", "Choose among the N most probable tokens; 0 for all."),
    (
        ("--top-p",),
        click.FLOAT,
        "P",
        "Choose among the most probable tokens whose probabilities add up to P.",
    ),
    (("--min-p",), click.FLOAT, "P", "Leave out tokens with less than P times the highest probability."),
    (("--seed",), click.INT, "N", "The same seed gives the same answer again; by default one is drawn."),
)


def sampling_options(command: Command) -> Command:
    """Give a command the options of a request that decide how tokens are drawn; None where not given."""
    for spellings, value_type, metavar, text in reversed(_SAMPLING):
        command = click.option(*spellings, cls=RequestOption, type=value_type, metavar=metavar, help=text)(
            command
        )
    return command


# ---- models and daemons ----


def model_path(model: str | None) -> Path:
    """Return the path of MODEL, by default the embedded one's.

    Raises ModelNotFound and ModelFileError with a hint for what is no GGUF file but a URL, a name of a model
    or a file of another format.
    """
    if model in (None, EMBEDDED):
        return embedded_model()
    refuse_other_files(str(model))
    return Path(str(model)).expanduser().absolute()


def open_client(socket: str | None) -> Client:
    """Return a client of the daemon at `socket`, by default the one that is found; raises ConfigError."""
    from ..client.client import Client
    from ..protocol.sockets import check_url

    return Client(None if socket is None else check_url(socket, "--socket"))


def json_text(value: object, indent: int | None = None) -> str:
    """Return a value as JSON text."""
    return json.dumps(value, indent=indent, ensure_ascii=False)
