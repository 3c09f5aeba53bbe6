"""`--lane local`: the whole engine in one process, with the same bytes as one with workers."""

from __future__ import annotations

import pytest

from ..conftest import Serve
from ..daemon_process import Daemon, processes_in
from ..requests import Request, essence, run_together, sampled


def requests() -> list[Request]:
    return [sampled(number, 32) | {"logprobs": 2} for number in range(4)]


@pytest.mark.parametrize("resident", ["100%", "50%"])
def test_one_process_gives_the_bytes_of_many(serve: Serve, shared: Daemon, resident: str) -> None:
    expected = [essence(result) for result in run_together(shared.url, requests())]
    daemon = serve("--lane", "local", "--workers", "2", "--resident-experts", resident)
    assert [essence(result) for result in run_together(daemon.url, requests())] == expected
    names = sorted(process.name() for process in processes_in(daemon.folder) if process.pid != daemon.pid)
    assert names == ["sterna-nursery", "sterna-schedule"]
    status = daemon.status()
    assert [row["name"] for row in status["processes"] if row["name"].startswith("worker")] == []
    assert status["totals"]["worker_restarts"] == 0
    used = status["memory"]
    assert used["planned_mib"]["workers"] < 20  # two processes would take 50 MiB beside their buffers
    assert used["measured_mib"]["total"] <= used["planned_total_mib"]
