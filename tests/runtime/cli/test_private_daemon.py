"""A daemon for one call: it is started, awaited, heard and stopped, whatever it does."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from sterna.runtime.cli import private_daemon
from sterna.runtime.daemon.announcement import Announcement
from sterna.shm.errors import ConfigError, ModelFileError, StartFailed, error_of_exit

from .command import sterna


def script(folder: Path, text: str) -> str:
    """Return an executable that stands where the interpreter would."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho $$ >{folder}/pid\n{text}\n")
    path.chmod(0o755)
    return str(path)


def is_alive(folder: Path) -> bool:
    return Path(f"/proc/{(folder / 'pid').read_text().strip()}").exists()


def test_private_daemon_is_stopped_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "executable", script(tmp_path, "echo starting; echo ready socket=$7; exec sleep 60")
    )
    with private_daemon.private_daemon(["x.gguf"], 10) as url:
        folder = Path(url.removeprefix("ipc://")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert is_alive(tmp_path)
    assert not is_alive(tmp_path)
    assert not folder.exists()


def test_what_a_private_daemon_has_to_tell_reaches_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    private_daemon.announce(
        Announcement(socket="x", name="m", context=512, wished_context=4096, unused_precision="default")
    )
    lines = capsys.readouterr().out.splitlines()
    told = "; ".join(f"echo {line}" for line in lines)
    monkeypatch.setattr(sys, "executable", script(tmp_path, f"{told}; exec sleep 60"))
    notes: list[str] = []
    with private_daemon.private_daemon([], 10, on_note=notes.append):
        pass
    assert notes == [
        "the context is 512 tokens instead of 4096, for want of memory",
        "precision default changes nothing: experts are ternary or no larger in the file",
    ]
    private_daemon.announce(Announcement(socket="x", name="m", context=512, wished_context=512))
    assert capsys.readouterr().out == "ready socket=x\n"


def test_private_daemon_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = "trap '' TERM; echo ready socket=x; while :; do sleep 0.1; done"
    monkeypatch.setattr(sys, "executable", script(tmp_path, stubborn))
    monkeypatch.setattr(private_daemon, "STOP_TIMEOUT_S", 0.3)
    with private_daemon.private_daemon([], 10):
        pass
    assert not is_alive(tmp_path)


def test_private_daemon_that_is_never_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path, "echo loading the model >&2; exec sleep 60"))
    start_s = time.monotonic()
    text = r"^the daemon was not ready after 0\.5 s: loading the model$"
    with pytest.raises(StartFailed, match=text), private_daemon.private_daemon([], 0.5):
        pass
    assert time.monotonic() - start_s < 5
    assert not is_alive(tmp_path)


def test_private_daemon_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path, "kill -9 $$"))
    text = r"^the daemon was killed by signal 9 before it was ready$"
    with pytest.raises(StartFailed, match=text), private_daemon.private_daemon([], 10):
        pass


def test_private_daemon_that_refuses_its_settings() -> None:
    text = r"^the daemon ended with exit code 78 before it was ready: --workers: expected an integer"
    with pytest.raises(ConfigError, match=text), private_daemon.private_daemon(["--workers", "x"], 20):
        pass


def test_private_daemon_with_a_broken_model(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with (
        pytest.raises(ModelFileError, match=r"broken\.gguf") as caught,
        private_daemon.private_daemon([str(path)], 20),
    ):
        pass
    assert caught.value.exit_code == 65
    assert error_of_exit(65) is ModelFileError
    assert error_of_exit(1) is error_of_exit(250) is StartFailed


def test_private_daemon_whose_command_is_gone() -> None:
    assert sterna("serve", "--exit-with-parent", "1")[0] == 143
