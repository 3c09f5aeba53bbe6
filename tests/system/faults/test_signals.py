"""SIGTERM and SIGINT at every moment of a daemon's life, `drain`, and what the service manager is told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.runtime.client.results import Result
from sterna.shm.errors import DaemonUnreachable, ShuttingDown, SternaError

from ..conftest import Serve
from ..daemon_process import Daemon, wait_until
from ..requests import Request, run_alone, run_together, run_while, sampled

REQUESTS = [sampled(number, 100) for number in range(3)]
ENDLESS: Request = sampled(0, 500)


def test_running_answers_are_finished(serve: Serve) -> None:
    daemon = serve()
    expected = [result.text for result in run_together(daemon.url, REQUESTS)]
    found = run_while(daemon.url, REQUESTS, lambda: daemon.signal(signal.SIGTERM))
    assert [result.text for result in found] == expected
    assert daemon.wait() == 0


def test_last_words_reach_the_client(serve: Serve) -> None:
    """The end of an answer that is the last thing before the sockets close must not be lost with them."""
    for _ in range(2):
        # A service manager that does not listen is no reason to fail.
        daemon = serve("--workers", "1", env={"NOTIFY_SOCKET": "/nowhere/notify"})
        (found,) = run_while(
            daemon.url, [sampled(0, 12)], lambda daemon=daemon: daemon.signal(signal.SIGTERM)
        )
        assert found.finish_reason == "length"
        assert daemon.wait() == 0


@pytest.mark.slow
def test_new_requests_are_refused_while_the_running_finish(serve: Serve) -> None:
    daemon = serve()
    errors: list[SternaError] = []

    with daemon.client() as late:
        late.status()  # connected before

        def stop() -> None:
            daemon.signal(signal.SIGTERM)
            wait_until(lambda: "daemon.signal" in daemon.stderr, 5.0, "the signal is seen")
            with pytest.raises(ShuttingDown) as caught:
                late.generate("abc", max_tokens=1)
            errors.append(caught.value)

        found = run_while(daemon.url, [ENDLESS], stop)
    assert [len(result.token_ids) for result in found] == [500]
    assert errors[0].retryable
    assert daemon.wait() == 0


@pytest.mark.slow
def test_waiting_answers_are_finished_too(serve: Serve) -> None:
    daemon = serve("--max-num-seqs", "1")
    results: list[Result] = []

    def wait_in_line() -> None:
        results.extend(run_alone(daemon.url, [sampled(1, 8)]))

    thread = threading.Thread(target=wait_in_line)

    def stop() -> None:
        thread.start()
        wait_until(lambda: daemon.status()["sequences"]["waiting"] == 1, 10.0, "one waits")
        daemon.signal(signal.SIGTERM)

    run_while(daemon.url, [sampled(0, 200)], stop)
    thread.join(20)
    assert [len(result.token_ids) for result in results] == [8]
    assert daemon.wait() == 0


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        pytest.param(signal.SIGTERM, signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_second_signal_ends_at_once(serve: Serve, first: int, second: int, code: int) -> None:
    daemon = serve()
    with daemon.client() as client, client.generate(stream=True, **ENDLESS) as stream:
        next(stream)
        daemon.signal(first)
        wait_until(lambda: "daemon.signal" in daemon.stderr, 5.0, "the first signal is seen")
        assert daemon.process.poll() is None
        daemon.signal(second)
        began_s = time.monotonic()
        with pytest.raises(ShuttingDown):
            stream.read()
        assert daemon.wait() == code
    assert time.monotonic() - began_s < 10.0


def test_answers_that_take_too_long_are_given_up(serve: Serve) -> None:
    daemon = serve("--shutdown-timeout", "0.2")
    with daemon.client() as client, client.generate(stream=True, **ENDLESS) as stream:
        next(stream)
        daemon.signal(signal.SIGTERM)
        with pytest.raises(ShuttingDown):
            stream.read()
    assert daemon.wait() == 0


@pytest.mark.slow
def test_client_that_reads_nothing_does_not_hold_up_the_end(serve: Serve) -> None:
    daemon = serve()
    with daemon.client() as client, client.generate(stream=True, **sampled(0, 200)) as stream:
        next(stream)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(20) == 0  # nothing was read meanwhile
        assert len(stream.read().token_ids) == 200


@pytest.mark.parametrize("delay_s", [0.3, 0.9])
def test_signal_while_starting(serve: Serve, delay_s: float) -> None:
    daemon = serve(ready=False)
    time.sleep(delay_s)
    daemon.signal(signal.SIGTERM)
    # Before it has a handler the signal simply kills it; `serve` checks that nothing is left.
    assert daemon.wait(20) in (0, -signal.SIGTERM)
    assert "error" not in daemon.stderr


def test_drain_by_a_client_stops_the_daemon(serve: Serve) -> None:
    daemon = serve()
    with daemon.client() as client:
        found = run_while(daemon.url, REQUESTS, client.drain)
        assert [len(result.token_ids) for result in found] == [100] * 3
        assert daemon.wait(10) == 0
        with pytest.raises(DaemonUnreachable):
            client.status()


@pytest.mark.slow
def test_drain_and_signal_together(serve: Serve) -> None:
    daemon = serve()
    with daemon.client() as client, daemon.client() as other:
        drains = [threading.Thread(target=each.drain) for each in (client, other)]

        def stop() -> None:
            for drain in drains:
                drain.start()
            wait_until(lambda: daemon.status()["state"] == "draining", 5.0, "it drains")
            daemon.signal(signal.SIGTERM)

        run_while(daemon.url, REQUESTS, stop)
        for drain in drains:
            drain.join(10)
            assert not drain.is_alive()
    assert daemon.wait(10) == 0


@contextlib.contextmanager
def manager(folder: Path) -> Iterator[socket.socket]:
    """Yield the socket at which a service manager would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(60)
        channel.bind(str(folder / "notify"))
        yield channel


def test_service_manager_is_told(serve: Serve, tmp_path: Path) -> None:
    with manager(tmp_path) as channel:
        daemon = serve(env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        told = [""]
        while "READY=1" not in told[-1]:
            told.append(channel.recv(4096).decode())
        assert told[-1] == "READY=1\nSTATUS=serving tales-small"
        assert "STATUS=loading the model" in told
        daemon.stop()
        assert channel.recv(4096).decode() == "STOPPING=1\nSTATUS=draining"


def test_ctrl_c_to_the_whole_group_is_the_daemon_s_alone(serve: Serve) -> None:
    """A terminal signals every process; scheduler and workers go on until the answers are complete."""
    daemon = serve()
    children = [*daemon.pids("scheduler"), *daemon.pids("worker"), *daemon.pids("nursery")]
    found = run_while(daemon.url, REQUESTS, lambda: interrupt(daemon, children))
    assert [len(result.token_ids) for result in found] == [100] * 3
    assert daemon.wait() == 0
    assert "process.lost" not in daemon.stderr


def interrupt(daemon: Daemon, children: list[int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGINT)
    daemon.signal(signal.SIGINT)
