"""What the daemon can be told, from where, and whether it makes sense.

In here: `Config` with the range of each field and `load_config`, which merges flags, environment and TOML
files in that order of precedence. Not in here: presets, and what a setting does. Nothing creates a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..shm.errors import ConfigError, ModelNotFound
from .sockets import check_url, default_socket_url

Lane = Literal["auto", "zmq"]
Ternary = Literal["auto", "2", "1.6"]
Activations = Literal["auto", "block", "token"]
LogLevel = Literal["debug", "info", "warning", "error"]

SYSTEM_CONFIG_DIR = Path("/etc/sterna")


@dataclass(frozen=True, slots=True)
class Setting:
    """What one field may hold and how it is explained; `flag` is its name on the command line."""

    help: str
    kind: Literal["path", "url", "integer", "seconds", "choice"]
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    short: str | None = None

    def expected(self) -> str:
        """Return what a value should have been, for an error text."""
        match self.kind:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a daemon; `load_config` returns a checked one. Ranges and meanings are in SETTINGS.

    `model` None is the embedded model, `workers` 0 one per core, `ctx_size` 0 the model's but at most 4096.
    """

    model: Path | None = None
    socket: str = field(default_factory=default_socket_url)
    workers: int = 0
    ctx_size: int = 0
    max_num_seqs: int = 16
    max_queue: int = 256
    max_batch_tokens: int = 512
    threads: int = 0
    ternary: Ternary = "auto"
    activations: Activations = "auto"
    lane: Lane = "auto"
    log_level: LogLevel = "info"
    shutdown_timeout_s: float = 30.0
    step_timeout_s: float = 60.0
    start_timeout_s: float = 120.0


_DAY_S = 86_400
SETTINGS: dict[str, Setting] = {
    "model": Setting("GGUF file to serve [the embedded model]", "path"),
    "socket": Setting("ipc:// URL to listen on", "url"),
    "workers": Setting("Expert workers [0: one per core]", "integer", 0, 256),
    "ctx_size": Setting("Context in tokens [0: the model's, at most 4096]", "integer", 0, 2**20, short="-c"),
    "max_num_seqs": Setting("Answers computed at a time [16]", "integer", 1, 1024),
    "max_queue": Setting("Requests that may wait [256]", "integer", 1, 65_536),
    "max_batch_tokens": Setting("Prompt tokens computed per step [512]", "integer", 1, 16_384),
    "threads": Setting("Threads of the scheduler for dense layers; 0: one per core [0]", "integer", 0, 64),
    "ternary": Setting(
        "Bits of a ternary weight in memory; auto: 2, or 1.6 where only that fits [auto]",
        "choice",
        choices=("auto", "2", "1.6"),
    ),
    "activations": Setting(
        "Values that share a scale before row-scaled ternary weights; auto: measured [auto]",
        "choice",
        choices=("auto", "block", "token"),
    ),
    "lane": Setting("Transport to local workers [auto]", "choice", choices=("auto", "zmq")),
    "log_level": Setting(
        "Least severe event logged [info]", "choice", choices=("debug", "info", "warning", "error")
    ),
    "shutdown_timeout_s": Setting("Time to finish what runs after SIGTERM [30]", "seconds", 0, _DAY_S),
    "step_timeout_s": Setting("Time after which a step counts as hung [60]", "seconds", 0.1, _DAY_S),
    "start_timeout_s": Setting("Time for all processes to be ready [120]", "seconds", 0.1, _DAY_S),
}


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
) -> Config:
    """Return the settings: a flag beats the environment, that beats the file, that the default.

    Without `file` (or STERNA_CONFIG) the files of the system and then of the user are read, each over the one
    before, and none need exist. A flag of value None was not given. Raises ConfigError, which names file and
    line, variable or flag.
    """
    values: dict[str, Any] = {}
    if file is None and env.get("STERNA_CONFIG"):
        file = Path(env["STERNA_CONFIG"])
    for path in [file] if file is not None else _default_files(env, system_dir):
        values.update(_read_file(path))
    for name, setting in SETTINGS.items():
        text = env.get(env_of(name), "")
        if text:
            values[name] = _checked(setting, _from_text(setting, text), f"environment {env_of(name)}")
    for name, value in flags.items():
        if name not in SETTINGS:
            raise ConfigError(f"unknown setting {name!r}{_hint(name)}")
        if value is not None:
            setting = SETTINGS[name]
            parsed = _from_text(setting, value) if isinstance(value, str) else value
            values[name] = _checked(setting, parsed, flag_of(name))
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


def _from_text(setting: Setting, text: str) -> object:
    """Return the value that a text from the environment or a flag stands for, or the text itself."""
    try:
        if setting.kind == "integer":
            return int(text)
        if setting.kind == "seconds":
            return float(text)
    except ValueError:
        pass
    return text


def _checked(setting: Setting, value: object, where: str) -> object:
    """Return the value in the field's type; raises ConfigError that begins with `where`."""
    match setting.kind:
        case "integer" if type(value) is int and setting.low <= value <= setting.high:
            return value
        case "seconds" if type(value) in (int, float) and setting.low <= value <= setting.high:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        case "choice" if value in setting.choices:
            return value
        case "path" if isinstance(value, (str, os.PathLike)) and str(value) and "\0" not in str(value):
            return Path(value).expanduser()
        case "url" if isinstance(value, str):
            return check_url(value, where)
    raise ConfigError(f"{where}: expected {setting.expected()}, found {ascii(value)[:80]}")
