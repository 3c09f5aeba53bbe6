"""Two daemons for one socket, and what a daemon finds and leaves where it listens."""

from __future__ import annotations

import signal
import socket
import stat
import time

import pytest

from sterna.shm.errors import DaemonUnreachable

from ..conftest import Serve
from ..daemon_process import Daemon
from ..requests import run_alone, run_while, sampled


def second_on(first: Daemon) -> Daemon:
    """Return a daemon, not started, that shares the socket of another but not its folder."""
    second = Daemon()
    second.url = first.url
    return second


def test_second_daemon_refuses_at_once_and_disturbs_nobody(shared: Daemon) -> None:
    requests = [sampled(0, 200)]
    (expected,) = run_alone(shared.url, requests)
    second = second_on(shared)

    def try_second() -> None:
        began_s = time.monotonic()
        assert second.launch().wait() == 75
        # What takes the time is Python's start; the lock itself does not wait.
        assert time.monotonic() - began_s < 5

    try:
        (found,) = run_while(shared.url, requests, try_second)
        assert second.stderr.splitlines()[-1] == f"sterna: error: another daemon serves {shared.url}"
        assert second.stdout == ""
    finally:
        second.remove()
    assert found.text == expected.text


def test_socket_file_of_a_dead_daemon_is_taken_over(serve: Serve) -> None:
    daemon = serve(ready=False)
    daemon.signal(signal.SIGKILL)  # this one never gets to listen
    daemon.wait()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(daemon.path))
    with pytest.raises(DaemonUnreachable, match="nothing listens there"):
        daemon.status()
    daemon.start()
    assert daemon.status()["state"] == "serving"


def test_only_the_owner_may_connect_and_the_lock_file_stays(serve: Serve) -> None:
    daemon = serve()
    mode = stat.S_IMODE(daemon.path.stat().st_mode)
    assert mode & 0o022 == 0  # connecting takes the right to write
    assert stat.S_IMODE((daemon.folder / "sterna.sock.lock").stat().st_mode) == 0o600
    assert daemon.stop() == 0
    assert not daemon.path.exists()
    assert (daemon.folder / "sterna.sock.lock").exists()


def test_folder_of_the_socket_is_made_for_the_owner_alone(serve: Serve) -> None:
    daemon = serve(ready=False)
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    inner = daemon.folder / "new" / "deeper"
    daemon.path = inner / "sterna.sock"
    daemon.url = f"ipc://{daemon.path}"
    daemon.start()
    assert stat.S_IMODE(inner.stat().st_mode) == 0o700
    assert daemon.status()["state"] == "serving"


def test_socket_where_no_socket_can_be(serve: Serve) -> None:
    daemon = Daemon()
    (daemon.folder / "file").write_text("")
    daemon.url = f"ipc://{daemon.folder}/file/sterna.sock"
    try:
        assert daemon.launch().wait() == 77
        assert "sterna: error: cannot make the socket's lock" in daemon.stderr
    finally:
        daemon.remove()


def test_folder_in_the_place_of_the_socket_is_one_line() -> None:
    daemon = Daemon()
    daemon.path.mkdir()
    try:
        assert daemon.launch().wait() == 77
        assert daemon.stderr.splitlines()[-1].startswith(f"sterna: error: cannot listen on {daemon.url}: ")
    finally:
        daemon.remove()
