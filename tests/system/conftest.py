"""Daemons for system tests: one that many tests share, and as many own ones as a test starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .daemon_process import Daemon, wait_until

Serve = Callable[..., Daemon]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts `sterna serve ARGUMENTS`; each is stopped and checked for leaks."""
    started: list[Daemon] = []

    def start(
        *arguments: str,
        ready: bool = True,
        env: dict[str, str] | None = None,
        limit_bytes: int | None = None,
    ) -> Daemon:
        daemon = Daemon(*arguments, env=env, limit_bytes=limit_bytes)
        started.append(daemon)
        return daemon.start() if ready else daemon.launch()

    yield start
    for daemon in started:
        daemon.remove()


@pytest.fixture(scope="session")
def session_daemon() -> Iterator[Daemon]:
    daemon = Daemon("--workers", "2")
    try:
        yield daemon.start()
    finally:
        daemon.remove()


@pytest.fixture
def shared(session_daemon: Daemon) -> Iterator[Daemon]:
    """Return the daemon that tests share; it must be idle and unhurt after each of them."""
    before = session_daemon.status()["totals"]
    yield session_daemon
    wait_until(lambda: is_idle(session_daemon), 5.0, "the shared daemon is idle again")
    after = session_daemon.status()["totals"]
    assert after["scheduler_restarts"] == before["scheduler_restarts"]
    assert after["worker_restarts"] == before["worker_restarts"]
    assert "Traceback" not in session_daemon.stderr


def is_idle(daemon: Daemon) -> bool:
    """Tell whether nothing runs or waits and all blocks of the KV cache are free."""
    sequences = daemon.status()["sequences"]
    free = sequences["kv_blocks_free"] == sequences["kv_blocks"]
    return sequences["running"] == 0 and sequences["waiting"] == 0 and free
