"""What the daemon can be told, from where, and whether it makes sense.

In here: `Config` with its defaults, SETTINGS with the range and meaning of each field, and `load_config`,
which merges flags, environment and TOML files in that order of precedence. Not in here: what a setting does.
Nothing creates a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ..shm.errors import ConfigError, ModelNotFound
from . import sizes
from .protocol.sockets import check_url, default_socket_url

Lane = Literal["auto", "zmq", "local"]
CacheType = Literal["f16", "f32"]
Ternary = Literal["auto", "2", "1.6"]
Activations = Literal["auto", "block", "token"]
Preset = Literal["auto", "raspberry-pi-5", "mobile", "desktop", "wasm-browser", "custom"]
Routing = Literal["exact", "budget"]
Switch = Literal["auto", "off"]
Prefetch = Literal["auto", "off", "on"]
Precision = Literal["off", "default", "memory-constrained", "quality-focused"]
LogLevel = Literal["debug", "info", "warning", "error"]

SYSTEM_CONFIG_DIR = Path("/etc/sterna")


EMBEDDED = "embedded"
"""The name of the model that comes with the package, wherever the path of a model is expected."""

MIN_MEMORY_NBYTES = 2**20
"""A smaller budget is a number whose unit was forgotten."""


@dataclass(frozen=True, slots=True)
class SettingRule:
    """What one field of `Config` may hold, and how it is explained."""

    help: str
    """What the setting does, without its default."""
    syntax: Literal["path", "url", "integer", "seconds", "choice", "size", "share", "percent"]
    low: float = 0
    """Least value of a number; of a percentage in percent."""
    high: float = 0
    """Largest value of a number."""
    choices: tuple[str, ...] = ()
    """All values of a choice: those of the field's Literal type."""
    short: str | None = None
    """A flag of one letter."""
    also: tuple[str, ...] = ()
    """Flags that are accepted and not shown."""
    unset: str = ""
    """What the default stands for, where it does not tell itself."""

    def expected(self) -> str:
        """Return what a value should have been, for an error text."""
        match self.syntax:
            case "integer":
                return f"an integer from {self.low:g} to {self.high:g}"
            case "seconds":
                return f"seconds from {self.low:g} to {self.high:g}"
            case "choice":
                return "one of " + ", ".join(self.choices)
            case "path":
                return "the path of a file"
            case "url":
                return "ipc:// and the absolute path of a socket"
            case "size":
                return '"auto" or a size such as "3GiB"'
            case "share":
                return '"auto", a share such as "50%" or a number of experts such as "128"'
            case "percent":
                return f'a share from {self.low:g} to {self.high:g} percent, such as "0.5%"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a daemon; `load_config` returns a checked one. Ranges and meanings are in SETTINGS.

    What a default of None or 0 stands for is told by `SettingRule.unset`.
    """

    model: Path | None = None
    socket: str = field(default_factory=default_socket_url)
    workers: int = 0
    ctx_size: int = 0
    max_num_seqs: int = 0
    max_queue: int = 256
    max_batch_tokens: int = 0
    threads: int = 0
    ternary: Ternary = "auto"
    activations: Activations = "auto"
    memory: str = "auto"
    resident_experts: str = "auto"
    preset: Preset = "auto"
    memory_pressure: Switch = "auto"
    routing: Routing = "exact"
    quality_budget: str = "0.5%"
    prefetch: Prefetch = "auto"
    precision: Precision = "off"
    cache_type: CacheType = "f16"
    lane: Lane = "auto"
    trace: Path | None = None
    log_level: LogLevel = "info"
    shutdown_timeout_s: float = 30.0
    step_timeout_s: float = 60.0
    start_timeout_s: float = 120.0

    @property
    def memory_nbytes(self) -> int | None:
        """Bytes that all of Sterna may use, None to find out."""
        return None if self.memory == "auto" else read_size(self.memory, "memory")

    @property
    def quality_fraction(self) -> float:
        """The quality budget as a fraction: 0.005 for 0.5%."""
        return percent(self.quality_budget)


def percent(text: str) -> float:
    """Return the fraction that a checked text such as "0.5%" stands for."""
    return float(text.removesuffix("%")) / 100


def resident_count(text: str, total: int) -> int | None:
    """Return how many of `total` routed experts `resident_experts` means, None for "auto"."""
    if text == "auto":
        return None
    wanted = int(percent(text) * total + 0.5) if text.endswith("%") else int(text)
    return min(total, wanted)


_DAY_S = 86_400
_TYPES = get_type_hints(Config)


def _choice(name: str, text: str) -> SettingRule:
    return SettingRule(text, "choice", choices=get_args(_TYPES[name]))


SETTINGS: dict[str, SettingRule] = {
    "model": SettingRule("GGUF file to serve", "path", unset="the embedded model"),
    "socket": SettingRule(
        "ipc:// URL to listen on",
        "url",
        unset="sterna.sock in $XDG_RUNTIME_DIR/sterna, else in /run/sterna, else in a folder below /tmp",
    ),
    "workers": SettingRule("Expert workers", "integer", 0, 256, unset="physical cores less one"),
    "ctx_size": SettingRule(
        "Tokens of prompt and answer together",
        "integer",
        0,
        2**20,
        short="-c",
        also=("--ctx",),
        unset="the model's, at most 4096, less where memory is short",
    ),
    "max_num_seqs": SettingRule(
        "Answers computed at a time", "integer", 0, 1024, unset="16, fewer where memory is short"
    ),
    "max_queue": SettingRule("Requests that may wait", "integer", 1, 65_536),
    "max_batch_tokens": SettingRule(
        "Prompt tokens computed per step", "integer", 0, 16_384, unset="512, fewer where memory is short"
    ),
    "threads": SettingRule(
        "Threads of the scheduler for dense layers", "integer", 0, 64, unset="one for each CPU it may use"
    ),
    "ternary": _choice("ternary", "Bits of a ternary weight in memory; auto: 2, or 1.6 where only that fits"),
    "activations": _choice(
        "activations",
        "Values that share a scale before row-scaled ternary weights; auto: as the model's weights bear it",
    ),
    "memory": SettingRule(
        "All memory that Sterna may use, such as 3GiB; experts beyond it are read from the file; "
        "auto: what is free, less a reserve",
        "size",
    ),
    "resident_experts": SettingRule(
        "Routed experts kept in memory, 50% or a number, for experiments; auto: as many as fit", "share"
    ),
    "preset": _choice("preset", "Memory granted to a class of machine, at most what is free"),
    "memory_pressure": _choice("memory_pressure", "Give memory back while the system is short of it"),
    "routing": _choice(
        "routing",
        "exact: the experts that the model's router chooses; "
        "budget: prefer experts in memory within the quality budget",
    ),
    "quality_budget": SettingRule("Rise of perplexity that routing by budget may cost", "percent", 0, 10),
    "prefetch": _choice("prefetch", "Read experts before they are needed; auto: while it pays"),
    "precision": _choice("precision", "Hold rarely used experts in fewer bits than the file"),
    "cache_type": _choice("cache_type", "Numbers that keys and values of past tokens are kept as"),
    "lane": _choice(
        "lane",
        "Transport to the workers; auto: zmq; local: none, the scheduler computes alone, for debugging",
    ),
    "trace": SettingRule(
        "Write which experts each token goes to into this new CSV file", "path", unset="no trace"
    ),
    "log_level": _choice("log_level", "Least severe event that is logged"),
    "shutdown_timeout_s": SettingRule("Time that running answers get after SIGTERM", "seconds", 0, _DAY_S),
    "step_timeout_s": SettingRule("Time after which a silent worker is replaced", "seconds", 0.1, _DAY_S),
    "start_timeout_s": SettingRule("Time for all processes to be ready", "seconds", 0.1, _DAY_S),
}


def default_text(name: str) -> str:
    """Return the default of a setting for a help text: "256", "0: physical cores less one"."""
    default = next(each.default for each in fields(Config) if each.name == name)
    unset = SETTINGS[name].unset
    if default is None or default is MISSING:
        return unset
    text = f"{default:g}" if isinstance(default, float) else str(default)
    return f"{text}: {unset}" if unset else text


def read_size(text: str, where: str) -> int:
    """Return the bytes that a text such as 3GiB stands for; raises ConfigError that begins with `where`."""
    try:
        return sizes.parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_memory(text: str, where: str) -> int:
    """Return the bytes of a memory budget; raises ConfigError as `read_size`, and for less than a MiB."""
    nbytes = read_size(text, where)
    if 0 < nbytes < MIN_MEMORY_NBYTES:
        raise ConfigError(
            f"{where}: {text} is {nbytes} bytes, too small for any model: give a unit, such as {text}MiB or "
            f"{text}GiB"
            if text.isdigit()
            else f"{where}: {text} is {nbytes} bytes, too small for any model"
        )
    return nbytes


def flag_of(name: str) -> str:
    """Return the flag of a setting: `ctx_size` is `--ctx-size`, `step_timeout_s` is `--step-timeout`."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def env_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"STERNA_{name.upper()}"


def load_config(
    file: Path | None,
    env: Mapping[str, str],
    flags: Mapping[str, object],
    *,
    system_dir: Path = SYSTEM_CONFIG_DIR,
    defaults: Mapping[str, object] | None = None,
) -> Config:
    """Return the settings: a flag beats the environment, that beats the file, that the default.

    `defaults`, where given, stand instead of the fields' own.

    Without `file` (or STERNA_CONFIG) the files of the system and then of the user are read, each over the one
    before, and none need exist. A flag of value None was not given. Raises ConfigError, which names file and
    line, variable or flag.
    """
    values: dict[str, Any] = dict(defaults or {})
    if file is None and env.get("STERNA_CONFIG"):
        file = Path(env["STERNA_CONFIG"])
    for path in [file] if file is not None else _default_files(env, system_dir):
        values.update(_read_file(path))
    for name, rule in SETTINGS.items():
        text = env.get(env_of(name), "")
        if text:
            values[name] = _checked(rule, _from_text(rule, text), f"environment {env_of(name)}")
    for name, value in flags.items():
        if name not in SETTINGS:
            raise ConfigError(f"unknown setting {name!r}{_hint(name)}")
        if value is not None:
            rule = SETTINGS[name]
            parsed = _from_text(rule, value) if isinstance(value, str) else value
            values[name] = _checked(rule, parsed, flag_of(name))
    if "socket" not in values:
        values["socket"] = default_socket_url(env)
    return Config(**values)


def embedded_model() -> Path:
    """Return the model that comes with the package; raises ModelNotFound if it was not installed."""
    path = Path(__file__).parent / "models" / "tales-small.gguf"
    if not path.is_file():
        raise ModelNotFound(f"the embedded model is missing from the installation: {path}")
    return path


def _default_files(env: Mapping[str, str], system_dir: Path) -> list[Path]:
    found = [system_dir / "config.toml", *sorted((system_dir / "conf.d").glob("*.toml"))]
    if env.get("XDG_CONFIG_HOME", "").startswith("/"):
        found.append(Path(env["XDG_CONFIG_HOME"]) / "sterna" / "config.toml")
    elif env.get("HOME", "").startswith("/"):
        found.append(Path(env["HOME"]) / ".config" / "sterna" / "config.toml")
    return [path for path in found if path.exists()]


def _read_file(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        text = path.read_bytes().decode()
        table = tomllib.loads(text)
    except OSError as e:
        raise ConfigError(f"config file {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as e:
        at = re.search(r"\(at line (\d+), column \d+\)", str(e))
        where = f"{path}:{at[1]}" if at else str(path)
        raise ConfigError(f"{where}: not TOML: {e}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not TOML: nested too deep") from None
    values = {}
    for key, value in table.items():
        where = f"{path}:{_line_of(key, text)}:{key}"
        if key not in SETTINGS:
            raise ConfigError(f"{where}: unknown setting{_hint(key)}")
        values[key] = _checked(SETTINGS[key], value, where)
    return values


def _line_of(key: str, text: str) -> int:
    """Return the line on which a key (or its table) stands: the TOML reader of Python keeps no positions."""
    pattern = re.compile(rf"""^\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    for number, line in enumerate(text.splitlines(), 1):
        if pattern.match(line):
            return number
    return 1


def _hint(key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, SETTINGS, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(SETTINGS)}"


def _from_text(rule: SettingRule, text: str) -> object:
    """Return the value that a text from the environment or a flag stands for, or the text itself."""
    try:
        if rule.syntax == "integer":
            return int(text)
        if rule.syntax == "seconds":
            return float(text)
    except ValueError:
        pass
    return text


_PERCENT = re.compile(r"\d+(\.\d+)?%")


def _is_share(value: str) -> bool:
    if _PERCENT.fullmatch(value):
        return 0 < float(value[:-1]) <= 100
    return value == "auto" or (value.isascii() and value.isdigit() and 0 < int(value) < 2**31)


def _checked(rule: SettingRule, value: object, where: str) -> object:
    """Return the value in the field's type; raises ConfigError that begins with `where`."""
    match rule.syntax:
        case "integer" if type(value) is int and rule.low <= value <= rule.high:
            return value
        case "seconds" if type(value) in (int, float) and rule.low <= value <= rule.high:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        case "choice" if value in rule.choices:
            return value
        case "path" if value == EMBEDDED and rule is SETTINGS["model"]:
            return None
        case "path" if isinstance(value, (str, os.PathLike)) and str(value) and "\0" not in str(value):
            return Path(value).expanduser()
        case "url" if isinstance(value, str):
            return check_url(value, where)
        case "size" if value == "auto" or (isinstance(value, str) and read_memory(value, where) > 0):
            return value
        case "share" if isinstance(value, str) and _is_share(value):
            return value
        case "percent" if isinstance(value, str) and _PERCENT.fullmatch(value):
            if rule.low <= float(value[:-1]) <= rule.high:
                return value
    raise ConfigError(f"{where}: expected {rule.expected()}, found {ascii(value)[:80]}")
