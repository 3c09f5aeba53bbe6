"""`sterna generate` with and without a daemon: what it prints, its exit codes, and that it leaves nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .daemon_process import COMMAND, Daemon, clean_env, left_behind, processes_in, wait_until
from .requests import run_alone

GREEDY = ["generate", "Once upon a time", "-t", "0", "-n", "12"]
TIMEOUT_S = 100


@pytest.fixture
def home() -> Iterator[Path]:
    """Return a folder where no daemon runs; at the end nothing of one may be there."""
    folder = Path(tempfile.mkdtemp(prefix="st-"))
    try:
        yield folder
        wait_until(lambda: not processes_in(folder), 3.0, "no process is left")
        assert left_behind(folder) == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sterna(home: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=clean_env(home),
        timeout=TIMEOUT_S,
    )


def test_without_a_daemon_one_is_started_for_the_call(home: Path, shared: Daemon) -> None:
    (expected,) = run_alone(
        shared.url, [{"prompt": "Once upon a time", "temperature": 0.0, "max_tokens": 12}]
    )
    done = sterna(home, *GREEDY)
    assert (done.returncode, done.stdout) == (0, expected.text + "\n")
    assert done.stderr.startswith("sterna: no daemon at ipc://")
    assert "answer 12 tokens" in done.stderr.splitlines()[-1]


def test_no_python_file_of_the_current_folder_is_run(home: Path) -> None:
    """Neither by the command nor by a process of the daemon that it starts."""
    downloads = home / "downloads"
    downloads.mkdir()
    for name in ("random", "numba", "zmq", "msgspec", "json"):
        (downloads / f"{name}.py").write_text(f"open({str(home / 'ran')!r}, 'a').write({name!r})\n")
    command = [sys.executable, "-P", "-m", "sterna.runtime.cli.main"]  # as the installed command starts
    done = subprocess.run(
        [*command, *GREEDY],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=clean_env(home),
        cwd=downloads,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert not (home / "ran").exists(), (home / "ran").read_text()


def test_chat_without_a_template_starts_no_daemon(home: Path) -> None:
    start_s = time.monotonic()
    done = sterna(home, *GREEDY, "--chat")
    print(f"refused after {time.monotonic() - start_s:.2f} s")
    assert (done.returncode, done.stdout) == (64, "")
    (line,) = done.stderr.splitlines()  # no "starting one for this call"
    assert line.startswith("sterna: error: no chat template in /")
    assert line.endswith(": leave out --chat")


def test_with_a_daemon_that_one_answers(home: Path, shared: Daemon) -> None:
    before = shared.status()["totals"]["requests_finished"]
    done = sterna(home, *GREEDY, "--socket", shared.url, "--json")
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    (expected,) = run_alone(
        shared.url, [{"prompt": "Once upon a time", "temperature": 0.0, "max_tokens": 12}]
    )
    assert answer["text"] == expected.text
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 12}
    assert shared.status()["totals"]["requests_finished"] == before + 2


def test_an_answer_that_was_cut_is_told_without_statistics_too(home: Path, shared: Daemon) -> None:
    done = sterna(home, *GREEDY, "--socket", shared.url, "--no-stats")
    assert (done.returncode, done.stderr) == (0, "sterna: the answer is cut at 12 tokens; -n sets how many\n")
    done = sterna(home, *GREEDY[:-1], "800", "--socket", shared.url, "--no-stats")
    assert done.returncode == 0
    assert done.stderr in ("", "sterna: the answer is cut at the context of 512 tokens\n")


def test_status_fits_a_screen(home: Path, shared: Daemon) -> None:
    lines = sterna(home, "status", "--socket", shared.url).stdout.splitlines()
    assert lines[0].startswith("tales-small (deepseek2): serving for ")
    assert len(lines) < 24
    assert all(len(line) <= 80 for line in lines[2:])


def test_status_and_tokenize(home: Path, shared: Daemon) -> None:
    report = json.loads(sterna(home, "status", "--json", "--socket", shared.url).stdout)
    assert report["model"]["name"] == "tales-small"
    shown = sterna(home, "status", "--all", "--socket", shared.url).stdout
    for word in ("worker 1", "memory_mib.arena", "memory_mib.kv", "sequences.running", "tokens_per_second"):
        assert word in shown
    done = sterna(home, "tokenize", "-", "--socket", shared.url, stdin="Once upon a time")
    assert done.stdout == "0 1470 324 680 259 515\n"


def test_socket_that_was_named_must_have_its_daemon(home: Path) -> None:
    done = sterna(home, *GREEDY, "--socket", f"ipc://{home}/none.sock")
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.startswith(f"sterna: error: no daemon at ipc://{home}/none.sock")
    assert sterna(home, "status").returncode == 69


def test_wrong_option_is_refused_by_the_daemon_s_rules(home: Path, shared: Daemon) -> None:
    done = sterna(home, *GREEDY, "--socket", shared.url, "--top-p", "2")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("sterna: error: --top-p: expected")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--top-p", "2"], "--top-p: expected float <= 1.0, found 2.0"),
        (["--max-tokens", "0"], "--max-tokens: expected int >= 1, found 0"),
        (["--seed", "-1"], "--seed: expected int >= 0, found -1"),
        (["--stop", "a", "--stop", "b" * 300], "--stop[1]: expected at most 256 bytes, found 300"),
        (["--lost-mass", "0", "--quality-budget", "1%"],
         "--quality-budget, --lost-mass: expected at most one of the two, found both"),
    ],
)  # fmt: skip
def test_wrong_option_starts_no_daemon(home: Path, options: list[str], line: str) -> None:
    start_s = time.monotonic()
    done = sterna(home, "generate", "Once upon a time", *options)
    print(f"refused after {time.monotonic() - start_s:.2f} s")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == f"sterna: error: {line}\n"  # no "starting one for this call"


def test_too_long_prompt(home: Path, shared: Daemon) -> None:
    done = sterna(home, "generate", "-", "--socket", shared.url, stdin="tale " * 2000)
    assert done.returncode == 65
    assert "512" in done.stderr


def test_private_daemon_that_cannot_start(home: Path) -> None:
    broken = home / "broken.gguf"
    broken.write_bytes(b"GGUF")
    done = sterna(home, *GREEDY, "--model", str(broken))
    assert done.stdout == ""
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sterna: error: ")
    assert str(broken) in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_signal_stops_the_private_daemon_too(home: Path, number: int, code: int) -> None:
    command = [*COMMAND, "generate", "Once upon a time", "-n", "500"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_env(home)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(10)
        process.send_signal(number)
        assert process.wait(30) == code


def test_killed_command_takes_its_daemon_with_it(home: Path) -> None:
    command = [*COMMAND, "generate", "Once upon a time", "-n", "500"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_env(home)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(10)
        process.kill()
        process.wait(10)
    wait_until(lambda: not processes_in(home), 10.0, "the private daemon has ended")
    # The folder of its socket was the command's to remove.
    for path in (home / "tmp").iterdir():
        shutil.rmtree(path)
