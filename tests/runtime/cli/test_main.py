"""The command line as users and scripts meet it: streams, exit codes, one line per error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from sterna import __version__
from sterna.runtime.cli import main
from sterna.runtime.cli.commands import status as commands
from sterna.runtime.config import SETTINGS, flag_of
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import REQUEST_ERRORS

from ..client.peer import Peer
from .command import COMMAND, ENV, error_line, sterna


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with Peer(tmp_path) as peer:
        yield peer


def test_version() -> None:
    assert sterna("--version") == (0, f"sterna {__version__}\n", "")


def test_version_and_help_load_nothing_heavy() -> None:
    heavy = {"zmq", "numpy", "numba", "msgspec", "msgpack", "rich", "uvloop", "asyncio", "tomllib"}
    script = (
        "import sys\nfrom sterna.runtime.cli import main as cli\n"
        f"cli.run(['--version']); cli.run(['serve', '--help'])\nprint({heavy!r} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout.endswith("\nset()\n")


def test_help_shows_every_setting() -> None:
    text = CliRunner().invoke(main.cli, ["serve", "--help"]).output
    for name in SETTINGS:
        assert name == "model" or flag_of(name) in text
    assert "--exit-with-parent" not in text
    words = text.split()  # the lines break anywhere
    files = [
        "/etc/sterna/config.toml,",
        "/etc/sterna/conf.d/*.toml,",
        "then",
        "~/.config/sterna/config.toml.",
    ]
    assert words[words.index(files[0]) :][:4] == files


# ---- with a daemon ----


def test_generate(peer: Peer) -> None:
    code, out, err = sterna("generate", "abc", "--socket", peer.url)
    assert (code, out) == (0, "abc!\n")
    assert err == ("prompt 2 tokens (4.0 tok/s), answer 3 tokens (8.0 tok/s), stop, seed 7\n")


def test_generate_finds_the_daemon_by_environment(peer: Peer) -> None:
    assert sterna("generate", "abc", "--no-stats", STERNA_SOCKET=peer.url) == (0, "abc!\n", "")


def test_generate_passes_options_on(peer: Peer) -> None:
    options = [
        "-n",
        "5",
        "-t",
        "0",
        "--top-k",
        "1",
        "--top-p",
        "0.5",
        "--min-p",
        "0.25",
        "--seed",
        "3",
        "--stop",
        "a",
        "--stop",
        "b",
    ]
    code, _, err = sterna("generate", "abc", "--socket", peer.url, *options)
    assert code == 0, err
    (sent,) = peer.messages(m.Generate)
    assert (sent.max_tokens, sent.temperature, sent.top_k, sent.top_p, sent.min_p) == (5, 0.0, 1, 0.5, 0.25)
    assert (sent.seed, sent.stop) == (3, ["a", "b"])


def test_generate_from_stdin(peer: Peer) -> None:
    code, out, _ = sterna("generate", "-", "--socket", peer.url, stdin="hé".encode())
    assert (code, out) == (0, "hé!\n")
    code, _, err = sterna("generate", "-", "--socket", peer.url, stdin=b"ab\xff")
    assert code == 64
    assert error_line(err) == "stdin: expected UTF-8 text, found the byte 0xff at 2"


def test_several_words_are_one_prompt(peer: Peer) -> None:
    assert sterna("generate", "ab", "c", "--no-stats", "d", "--socket", peer.url)[:2] == (0, "ab c d!\n")


def test_nothing_on_stdin_is_no_prompt(peer: Peer) -> None:
    code, out, err = sterna("generate", "-", "--socket", peer.url)
    assert (code, out, error_line(err)) == (64, "", "stdin: expected a prompt, found nothing")


def test_generate_json(peer: Peer) -> None:
    code, out, _ = sterna("generate", "ab", "--socket", peer.url, "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("ab!", [97, 98], "stop")
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 2}


def test_generate_streams(peer: Peer) -> None:
    with subprocess.Popen(
        [*COMMAND, "generate", "slow", "--socket", peer.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
    ) as child:
        assert child.stdout is not None
        assert os.read(child.stdout.fileno(), 1) == b"x"  # while the answer goes on
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130
        assert child.stderr is not None
        assert b"Traceback" not in child.stderr.read()
    assert len(peer.messages(m.Cancel)) == 1


def test_generate_ended_by_sigterm(peer: Peer) -> None:
    with subprocess.Popen(
        [*COMMAND, "generate", "mute", "--socket", peer.url], stdout=subprocess.PIPE, env=ENV
    ) as child:
        peer.wait_for(m.Generate)
        child.terminate()
        assert child.wait(10) == 143
    peer.wait_for(m.Cancel)
    assert len(peer.messages(m.Cancel)) == 1


def test_generate_into_a_closed_pipe(peer: Peer) -> None:
    with subprocess.Popen(
        [*COMMAND, "generate", "slow", "--socket", peer.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
    ) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.wait(10) == 141
        assert child.stderr is not None
        assert child.stderr.read() == b""
    assert len(peer.messages(m.Cancel)) == 1


def test_status(peer: Peer) -> None:
    shown = sterna("status", "--all", "--socket", peer.url)
    assert shown == (0, "model.name  tiny\nworkers     1\n", "")
    code, out, _ = sterna("status", "--socket", peer.url, "--json")
    assert (code, json.loads(out)) == (0, {"model": {"name": "tiny"}, "workers": [1]})


def test_tokenize(peer: Peer) -> None:
    assert sterna("tokenize", "ab", "--socket", peer.url) == (0, "97 98\n", "")
    assert sterna("tokenize", "-", "--json", "--socket", peer.url, stdin=b"a") == (0, "[97]\n", "")


# ---- errors ----


@pytest.mark.parametrize("code", ["overloaded", "too_long", "internal", "engine_lost"])
def test_failed_request(peer: Peer, code: str) -> None:
    exit_code, out, err = sterna("generate", f"fail {code}", "--socket", peer.url)
    assert (exit_code, out) == (REQUEST_ERRORS[code].exit_code, "")
    assert error_line(err) == "as you wish"


def test_no_daemon(tmp_path: Path) -> None:
    url = f"ipc://{tmp_path}/none.sock"
    for arguments in (["status"], ["tokenize", "a"], ["generate", "a"]):
        code, out, err = sterna(*arguments, "--socket", url)
        assert (code, out) == (69, "")
        assert (
            error_line(err) == f"no daemon at {url}: there is no such socket; start one with 'sterna serve'"
        )
    assert sterna("generate", "a", STERNA_SOCKET=url)[0] == 69


def test_a_named_socket_without_a_daemon_and_a_model(tmp_path: Path) -> None:
    """With a model a daemon is started for the call: here it finds no file."""
    url, missing = f"ipc://{tmp_path}/none.sock", f"{tmp_path}/none.gguf"
    for arguments, env in ((["--socket", url], {}), ([], {"STERNA_SOCKET": url})):
        code, out, err = sterna("generate", "a", "-m", missing, *arguments, **env)
        assert (code, out) == (66, "")
        assert err.startswith(
            f"sterna: no daemon at {url}: there is no such socket; starting one for this call"
        )
        assert f"{missing}: no such model file" in err.splitlines()[-1]


def test_other_model_than_the_one_that_is_served(peer: Peer) -> None:
    code, _, err = sterna("generate", "a", "--socket", peer.url, "--model", "/models/other.gguf")
    assert code == 64
    assert error_line(err) == f"the daemon at {peer.url} serves /models/tiny.gguf, not /models/other.gguf"
    assert sterna("generate", "a", "--socket", peer.url, "--model", "/models/tiny.gguf")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        (["generate"], 64, "Missing argument 'PROMPT'."),
        (["generate", "a", "--max-tokens", "x"], 64, "'x' is not a valid integer"),
        (["serv"], 64, "No such command 'serv'"),
        (["serve", "--wrokers", "1"], 64, "No such option"),
        (["serve", "a.gguf", "-m", "b.gguf"], 64, "the model is given twice"),
        (["generate", "a", "-t", "9"], 64, "9 is not in the range 0 to 5"),
        (["memory", "10"], 78, "SIZE: 10 is 10 bytes, too small for any model: give a unit, such as 10MiB"),
        (["serve", "--memory", "10"], 78, "--memory: 10 is 10 bytes, too small"),
        (["validate", "a.gguf", "b.gguf"], 64, "unexpected extra argument"),
        (["perplexity", "a.gguf", "b.txt", "c"], 64, "expected MODEL and TEXT, or TEXT alone, found 3"),
        (["serve", "--workers", "x"], 78, "--workers: expected an integer from 0 to 256, found 'x'"),
        (["serve", "--config", "/none.toml"], 78, "config file /none.toml: No such file or directory"),
        (["serve", "--socket", "tcp://*:1"], 78, "CURVE"),
        (["status", "--socket", "x"], 78, "--socket: expected ipc://"),
        (["status", "--socket", "ipc:///" + "x" * 200], 78, "at most 107 bytes"),
    ],
)
def test_wrong_command_line(arguments: list[str], exit_code: int, text: str) -> None:
    code, out, err = sterna(*arguments)
    assert (code, out) == (exit_code, "")
    assert text in error_line(err)


def test_wrong_values_of_a_request(peer: Peer) -> None:
    code, _, err = sterna("generate", "a", "--socket", peer.url, "--temperature", "nan")
    assert (code, error_line(err)) == (64, "--temperature: expected a finite number, found nan")
    code, _, err = sterna("generate", os.fsdecode(b"a\xff"), "--socket", peer.url)
    assert code == 64
    assert "expected valid Unicode" in error_line(err)


def test_without_a_command() -> None:
    code, out, err = sterna()
    assert (code, out) == (64, "")
    assert err.startswith("Usage: sterna")


def test_unexpected_exception_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("one\ntwo")

    monkeypatch.setattr(commands, "open_client", broken)
    monkeypatch.delenv("STERNA_DEBUG", raising=False)
    assert main.run(["status"]) == 70
    text = error_line(capsys.readouterr().err)
    assert text == "unexpected ValueError: one two (STERNA_DEBUG=1 shows where)"
    monkeypatch.setenv("STERNA_DEBUG", "1")
    assert main.run(["status"]) == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert ", in broken\n" in said
    assert said.endswith("ValueError: one\ntwo\nsterna: error: unexpected ValueError: one two\n")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "where"), [(["inspect", "garbage.gguf"], 65, "gguf"), (["serv"], 64, "click")]
)
def test_debugging_adds_the_traceback_of_every_error(
    tmp_path: Path, arguments: list[str], exit_code: int, where: str
) -> None:
    path = tmp_path / "garbage.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    arguments = [str(path) if each == path.name else each for each in arguments]
    code, out, plain = sterna(*arguments)
    assert (code, out) == (exit_code, "")
    error_line(plain)
    code, out, err = sterna(*arguments, STERNA_DEBUG="1")
    assert (code, out) == (exit_code, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert f"/{where}" in err.removesuffix(plain)
    assert err.endswith(f"\n{plain}")
