"""Where settings come from, which one wins, and what is said about a wrong one."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import pytest

from sterna.runtime.config import (
    SETTINGS,
    Config,
    default_text,
    embedded_model,
    env_of,
    flag_of,
    load_config,
    read_memory,
    read_size,
    resident_count,
)
from sterna.runtime.protocol.sockets import check_url, default_socket_url, probe
from sterna.runtime.sizes import format_size
from sterna.shm.errors import ConfigError, DaemonUnreachable, NotPermitted

SOCKET = "ipc:///run/test/s.sock"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(file: Path | None = None, env: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, env or {}, flags, system_dir=Path("/nonexistent"))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_setting_has_a_range_and_a_valid_default() -> None:
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(Config)]
    default = load_config(None, {"STERNA_SOCKET": SOCKET}, {}, system_dir=Path("/nonexistent"))
    assert default == Config(socket=SOCKET)
    given = {name: value for name, value in dataclasses.asdict(default).items() if value is not None}
    assert load_config(None, {}, given, system_dir=Path("/nonexistent")) == default


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'workers = 1\nctx_size = 100\nmax_queue = 5\nlane = "zmq"\n')
    env = {"STERNA_SOCKET": SOCKET, "STERNA_WORKERS": "2", "STERNA_CTX_SIZE": "200", "STERNA_LANE": ""}
    config = load_config(file, env, {"workers": "3", "ctx_size": None})
    assert (config.workers, config.ctx_size, config.max_queue, config.max_num_seqs) == (3, 200, 5, 0)
    assert config.lane == "zmq"


def test_values_get_their_types(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'shutdown_timeout_s = 5\nmodel = "~/m.gguf"\n')
    config = load_config(file, {"STERNA_STEP_TIMEOUT_S": "1.5", "STERNA_SOCKET": SOCKET}, {"workers": 2})
    assert type(config.shutdown_timeout_s) is float
    assert config.step_timeout_s == 1.5
    assert config.model == Path.home() / "m.gguf"
    assert config.workers == 2


def test_sizes_and_shares_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.toml", 'memory = "1.5GiB"\nresident_experts = "37.5%"\nquality_budget = "3%"\n'
    )
    config = load_config(file, {"STERNA_SOCKET": SOCKET}, {})
    assert (config.memory_nbytes, config.quality_fraction) == (3 * 2**29, 0.03)
    assert resident_count(config.resident_experts, 80) == 30
    default = Config()
    assert (default.memory_nbytes, default.quality_fraction) == (None, 0.005)
    assert [resident_count(text, 80) for text in ("auto", "100%", "12", "999")] == [None, 80, 12, 80]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("17", 17), ("2KiB", 2048), ("2k", 2048), ("800 MiB", 800 * 2**20), ("2GB", 2 * 10**9), ("0.5T", 2**39)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert read_size(text, "here") == nbytes
    assert read_size(format_size(2**31), "here") == 2**31


def test_a_budget_without_its_unit_is_refused() -> None:
    expected = "memory: 10 is 10 bytes, too small for any model: give a unit, such as 10MiB or 10GiB"
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        read_memory("10", "memory")
    with pytest.raises(ConfigError, match=r"^memory: 12kB is 12000 bytes, too small for any model$"):
        read_memory("12kB", "memory")
    assert read_memory("219938169", "memory") == 219_938_169
    assert refusal(env={"STERNA_MEMORY": "700"}).startswith("environment STERNA_MEMORY: 700 is 700 bytes")


def test_the_embedded_model_by_name(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'model = "embedded"\n')
    for found in (
        load_config(file, {"STERNA_SOCKET": SOCKET}, {}),
        load_config(None, {}, {"model": "embedded"}),
    ):
        assert found.model is None
    assert load_config(file, {}, {"model": "./embedded"}).model == Path("./embedded").expanduser()


def test_defaults_of_a_caller_give_way_to_all_else(tmp_path: Path) -> None:
    env = {"STERNA_SOCKET": SOCKET}
    quiet = {"log_level": "warning"}
    assert load_config(None, env, {}, defaults=quiet).log_level == "warning"
    assert load_config(None, env, {"log_level": "info"}, defaults=quiet).log_level == "info"
    file = write(tmp_path / "c.toml", 'log_level = "debug"\n')
    assert load_config(file, env, {}, defaults=quiet).log_level == "debug"


def test_defaults_in_words() -> None:
    shown = [default_text(name) for name in ("max_queue", "lane", "step_timeout_s", "model", "workers")]
    assert shown == ["256", "auto", "60", "the embedded model", "0: physical cores less one"]


def test_default_files_of_system_and_user(tmp_path: Path) -> None:
    system = tmp_path / "etc"
    write(system / "config.toml", "workers = 1\nmax_queue = 1\nctx_size = 1\n")
    write(system / "conf.d" / "20.toml", "max_queue = 3\n")
    write(system / "conf.d" / "10.toml", "max_queue = 2\nctx_size = 2\n")
    write(tmp_path / "xdg" / "sterna" / "config.toml", "ctx_size = 4\n")
    write(tmp_path / "home" / ".config" / "sterna" / "config.toml", "ctx_size = 5\n")
    env = {"HOME": str(tmp_path / "home"), "STERNA_SOCKET": SOCKET}
    config = load_config(None, env, {}, system_dir=system)
    assert (config.workers, config.max_queue, config.ctx_size) == (1, 3, 5)
    env["XDG_CONFIG_HOME"] = str(tmp_path / "xdg")
    assert load_config(None, env, {}, system_dir=system).ctx_size == 4
    env["STERNA_CONFIG"] = str(write(tmp_path / "own.toml", "workers = 7\n"))
    config = load_config(None, env, {}, system_dir=system)
    assert (config.workers, config.ctx_size) == (7, 0)


def test_unknown_key_names_file_line_and_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", "# a comment\nworkers = 1\n\nmax_que = 4\n")
    assert refusal(file) == f"{file}:4:max_que: unknown setting, did you mean 'max_queue'?"
    file = write(tmp_path / "c.toml", "[server]\nworkers = 1\n")
    assert refusal(file).startswith(f"{file}:1:server: unknown setting")
    file = write(tmp_path / "c.toml", "zzz = 1\n")
    assert "there are model, socket, workers" in refusal(file)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("workers = 257", "workers: expected an integer from 0 to 256, found 257"),
        ("workers = true", "workers: expected an integer from 0 to 256, found True"),
        ("workers = 1.0", "workers: expected an integer from 0 to 256, found 1.0"),
        ('workers = "2"', "workers: expected an integer from 0 to 256, found '2'"),
        ("max_num_seqs = -1", "max_num_seqs: expected an integer from 0 to 1024, found -1"),
        ("step_timeout_s = nan", "step_timeout_s: expected seconds from 0.1 to 86400, found nan"),
        ("step_timeout_s = 0", "step_timeout_s: expected seconds from 0.1 to 86400, found 0"),
        ("memory = 3", 'memory: expected "auto" or a size such as "3GiB", found 3'),
        ('memory = "3 apples"', "memory: expected a size such as 700MiB, 3GiB or 1.5G, found '3 apples'"),
        ('memory = "0GiB"', 'memory: expected "auto" or a size such as "3GiB", found \'0GiB\''),
        ('resident_experts = "0%"', 'resident_experts: expected "auto", a share such as "50%"'),
        ("resident_experts = 8", 'resident_experts: expected "auto", a share such as "50%"'),
        ('quality_budget = "11%"', 'quality_budget: expected a share from 0 to 10 percent, such as "0.5%"'),
        ("quality_budget = 0.05", 'quality_budget: expected a share from 0 to 10 percent, such as "0.5%"'),
        ('preset = "pi"', "preset: expected one of auto, raspberry-pi-5, mobile, desktop, wasm-browser"),
        ('lane = "tcp"', "lane: expected one of auto, zmq, local, found 'tcp'"),
        ("lane = []", "lane: expected one of auto, zmq, local, found []"),
        ("model = 1", "model: expected the path of a file, found 1"),
        ('model = ""', "model: expected the path of a file, found ''"),
        ("socket = 1", "socket: expected ipc:// and the absolute path of a socket, found 1"),
        ('socket = "tcp://*:1"', "socket: expected ipc://PATH, found 'tcp://*:1': TCP comes"),
        ("workers = ", "not TOML: Invalid value (at line 1, column 11)"),
        ("workers = 1\nworkers = 2", "2: not TOML: Cannot overwrite a value"),
        ("workers = " + "[" * 2000, "not TOML"),
    ],
)  # fmt: skip
def test_wrong_value_in_a_file(tmp_path: Path, line: str, text: str) -> None:
    found = refusal(write(tmp_path / "c.toml", line + "\n"))
    assert found.startswith(f"{tmp_path}/c.toml")
    assert text in found


def test_unreadable_files(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml") == f"config file {tmp_path}/none.toml: No such file or directory"
    assert refusal(tmp_path) == f"config file {tmp_path}: Is a directory"
    (tmp_path / "c.toml").write_bytes(b"workers = '\xff'")
    assert refusal(tmp_path / "c.toml") == f"config file {tmp_path}/c.toml: not UTF-8 text"
    missing = refusal(env={"STERNA_CONFIG": str(tmp_path / "none.toml")})
    assert missing == f"config file {tmp_path}/none.toml: No such file or directory"


def test_wrong_value_in_environment_or_flag() -> None:
    text = refusal(env={"STERNA_WORKERS": "many"})
    assert text == "environment STERNA_WORKERS: expected an integer from 0 to 256, found 'many'"
    assert refusal(env={"STERNA_SOCKET": "/run/x"}).startswith("environment STERNA_SOCKET: expected ipc://")
    text = refusal(shutdown_timeout_s="soon")
    assert text == "--shutdown-timeout: expected seconds from 0 to 86400, found 'soon'"
    assert refusal(wrokers=1) == "unknown setting 'wrokers', did you mean 'workers'?"
    assert refusal(workers="9" * 5000).startswith("--workers: expected an integer from 0 to 256, found '999")


def test_names() -> None:
    assert flag_of("max_num_seqs") == "--max-num-seqs"
    assert flag_of("start_timeout_s") == "--start-timeout"
    assert env_of("ctx_size") == "STERNA_CTX_SIZE"


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(socket=SOCKET).workers = 1  # type: ignore[misc]


def test_embedded_model_is_a_gguf_file() -> None:
    assert embedded_model().read_bytes()[:4] == b"GGUF"


# ---- sockets ----


def test_default_socket(tmp_path: Path) -> None:
    system = tmp_path / "system.sock"
    last = default_socket_url({}, system_socket=system)
    assert last.startswith("ipc:///tmp/sterna-")
    assert default_socket_url({"XDG_RUNTIME_DIR": str(tmp_path / "none")}, system_socket=system) == last
    system.touch()
    assert default_socket_url({}, system_socket=system) == f"ipc://{system}"
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert default_socket_url(env, system_socket=system) == f"ipc://{tmp_path}/sterna/sterna.sock"
    assert not (tmp_path / "sterna").exists()
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    assert default_socket_url({"XDG_RUNTIME_DIR": str(deep)}, system_socket=system) == f"ipc://{system}"
    env["STERNA_SOCKET"] = SOCKET
    assert default_socket_url(env, system_socket=system) == SOCKET


def test_length_of_a_socket_path() -> None:
    fits = "ipc:///" + "x" * 106
    assert check_url(fits) == fits
    with pytest.raises(ConfigError, match="at most 107 bytes, found 108"):
        check_url(fits + "x")
    with pytest.raises(ConfigError, match="at most 107 bytes, found 157"):
        check_url("ipc:///" + "ä" * 78)


@pytest.mark.parametrize(
    "url", ["", "ipc://", "ipc://relative", "ipc://@abstract", "/run/x", "ipc:///x/", "ipc:///a\0b"]
)
def test_what_is_no_socket(url: str) -> None:
    with pytest.raises(ConfigError, match="absolute path of a socket"):
        check_url(url)


def test_probe_of_a_socket_that_a_dead_daemon_left(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left.sock"))
        left.listen()
        probe(f"ipc://{tmp_path}/left.sock")
    with pytest.raises(DaemonUnreachable, match=r"left\.sock: nothing listens there; start one with"):
        probe(f"ipc://{tmp_path}/left.sock")
    with pytest.raises(DaemonUnreachable, match="there is no such socket"):
        probe(f"ipc://{tmp_path}/none.sock")


@pytest.mark.skipif(os.getuid() != 0, reason="needs to give a folder away")
def test_probe_in_a_strangers_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "sterna").mkdir()
    os.chown(tmp_path / "sterna", 12345, 12345)
    with pytest.raises(NotPermitted, match=f"the folder {tmp_path}/sterna belongs to user 12345, not to you"):
        probe(f"ipc://{tmp_path}/sterna/sterna.sock")
