"""SIGUSR1 makes each process write where its threads stand, and harms nothing (docs/debugging.md)."""

from __future__ import annotations

import os
import re
import signal

from ..conftest import Serve
from ..daemon_process import wait_until
from ..requests import essence, run_alone, run_while, sampled

# The function in which a process waits while nothing is to be done.
IDLE_IN = {
    "daemon": "runtime/daemon/daemon.py",
    "nursery": "runtime/processes/nursery.py",
    "scheduler": "scheduler/process.py",
    "worker": "workers/process.py",
}


def stacks(stderr: str) -> list[str]:
    """Return what each stack names, the innermost call first."""
    return re.findall(r"^(?:Current thread|Thread) 0x.*\n((?:  File .*\n)+)", stderr, re.MULTILINE)


def test_every_process_tells_where_it_stands(serve: Serve) -> None:
    daemon = serve("--workers", "1")
    expected = run_alone(daemon.url, [sampled(1, 64)])
    for process, file in IDLE_IN.items():
        (pid,) = [daemon.pid] if process == "daemon" else daemon.pids(process)
        before = len(stacks(daemon.stderr))
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda before=before: len(stacks(daemon.stderr)) > before, 5.0, f"the stack of {process}")
        found = stacks(daemon.stderr)[before:]
        assert any(file in stack for stack in found), (process, found)

    def ask_all() -> None:
        for process in ("scheduler", "worker"):
            os.kill(daemon.pids(process)[0], signal.SIGUSR1)

    found_results = run_while(daemon.url, [sampled(1, 64)], ask_all)
    assert [essence(each) for each in found_results] == [essence(each) for each in expected]
    assert daemon.status()["totals"]["worker_restarts"] == 0
    assert daemon.status()["totals"]["scheduler_restarts"] == 0
