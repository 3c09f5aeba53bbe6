"""`--log-level` reaches every process of a daemon, and what they log has the documented form."""

from __future__ import annotations

import re

from ..conftest import Serve
from ..requests import run_alone, sampled

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\w+) sterna\.\w+ [a-z]+\.[a-z_]+(?: |$)")


def logged(serve: Serve, level: str) -> str:
    """Return what a daemon has logged that answered a request and was stopped."""
    daemon = serve("--workers", "1", "--log-level", level)
    run_alone(daemon.url, [sampled(1, 4)])
    assert daemon.stop() == 0
    return daemon.stderr


def test_every_process_logs_events_of_the_level_that_was_set(serve: Serve) -> None:
    text = logged(serve, "debug")
    for event in ("daemon.ready", "scheduler.ready", "worker.started", "worker.filling"):
        assert event in text
    for line in text.splitlines():
        assert LINE.match(line), line


def test_a_daemon_without_trouble_warns_of_nothing(serve: Serve) -> None:
    assert logged(serve, "warning") == ""
