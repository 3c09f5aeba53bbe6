"""Memory of a running daemon: what is used stays within the budget, and slots may change between answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import Any

import pytest

from sterna import Client
from sterna.shm.errors import OutOfResources

from ..conftest import Serve
from ..daemon_process import COMMAND, Daemon, wait_until
from ..requests import essence, run_alone, run_while, sampled

REQUESTS = [sampled(number, max_tokens=40) for number in range(3)]


def plan(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [*COMMAND, "plan", *arguments, "--ternary", "2", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def memory(daemon: Daemon, size: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "memory", size, "--socket", daemon.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def answers(daemon: Daemon) -> list[bytes]:
    return [essence(result) for result in run_alone(daemon.url, REQUESTS)]


@pytest.fixture
def expected(shared: Daemon) -> list[bytes]:
    """Return the answers with every expert in memory."""
    return answers(shared)


@pytest.mark.parametrize(("share", "slots"), [pytest.param("50%", 40, marks=pytest.mark.slow), ("25%", 20)])
def test_what_is_used_stays_within_a_tight_budget(
    serve: Serve, expected: list[bytes], share: str, slots: int
) -> None:
    facts = plan("--workers", "2", "--memory", "1GiB", "--resident-experts", share)
    budget = facts["used_total_bytes"]
    daemon = serve("--workers", "2", "--resident-experts", share, "--memory", str(budget))
    assert answers(daemon) == expected
    status = daemon.status()
    used, experts = status["memory"], status["experts"]
    print(f"\nbudget {used['budget_mib']} planned {used['planned_mib']} measured {used['measured_mib']}")
    assert (experts["slots"], experts["total"], experts["resident"]) == (slots, 80, slots)
    assert sum(experts["resident_of_workers"]) == slots
    assert used["measured_mib"]["total"] <= used["budget_mib"]
    assert used["planned_total_mib"] <= used["budget_mib"]


def test_shrinking_and_growing_change_no_answer(serve: Serve, expected: list[bytes]) -> None:
    facts = plan("--workers", "2", "--max-num-seqs", "16", "--ctx-size", "512", "--max-batch-tokens", "512")
    daemon = serve("--workers", "2")
    before = daemon.status()
    smallest = str(facts["smallest_budget_bytes"])

    def shrink() -> None:
        done = memory(daemon, smallest)
        print(f"\n{done.stdout.strip()}")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("11 of 80 experts may stay in memory")

    between = run_while(daemon.url, REQUESTS, shrink)
    assert [essence(result) for result in between] == expected
    held = daemon.status()
    assert (held["experts"]["slots"], held["experts"]["resident"]) == (11, 11)
    freed = before["memory"]["measured_mib"]["arenas"] - held["memory"]["measured_mib"]["arenas"]
    assert freed == pytest.approx(69 * 53_248 / 2**20, abs=0.2)
    assert answers(daemon) == expected

    with daemon.client() as client:
        grown = client.resize("auto")
    assert (grown["slots"], grown["share"]) == (80, 1.0)
    assert grown["freed_bytes"] == -69 * 53_248
    assert answers(daemon) == expected
    arenas = daemon.status()["memory"]["measured_mib"]["arenas"]
    assert arenas == before["memory"]["measured_mib"]["arenas"]


@pytest.mark.slow
def test_a_new_scheduler_keeps_to_the_limits(serve: Serve, expected: list[bytes]) -> None:
    facts = plan("--workers", "1", "--max-num-seqs", "16", "--ctx-size", "512", "--max-batch-tokens", "512")
    daemon = serve("--workers", "1")
    assert memory(daemon, str(facts["smallest_budget_bytes"])).returncode == 0
    arenas = daemon.status()["memory"]["measured_mib"]["arenas"]
    os.kill(daemon.pids("scheduler")[0], signal.SIGKILL)
    wait_until(lambda: daemon.status()["totals"]["scheduler_restarts"] == 1, 10.0, "a new scheduler")
    wait_until(lambda: daemon.status()["experts"]["resident"] == 11, 10.0, "its experts")
    assert answers(daemon) == expected
    status = daemon.status()
    assert status["experts"]["resident"] == 11
    assert status["memory"]["measured_mib"]["arenas"] == arenas


@pytest.mark.slow
def test_sizes_that_cannot_be_are_refused_with_numbers(serve: Serve) -> None:
    facts = plan("--workers", "1", "--resident-experts", "50%")
    budget = facts["smallest_budget_bytes"] + 20 * facts["experts"]["slot_bytes"][0]
    settings = facts["settings"]
    daemon = serve(
        "--workers", "1", "--memory", str(budget), "--ternary", "2",
        "--max-num-seqs", "1", "--ctx-size", "512", "--max-batch-tokens", "64",
    )  # fmt: skip
    print(f"\n{settings} {daemon.status()['experts']}")
    done = memory(daemon, "50MiB")
    assert done.returncode == OutOfResources.exit_code
    assert "one token uses 10 experts; at least" in done.stderr
    assert "lower" not in done.stderr  # a running daemon cannot
    done = memory(daemon, "4GiB")
    assert done.returncode == OutOfResources.exit_code
    assert "slots were made for" in done.stderr
    assert memory(daemon, "a lot").returncode == 78
    with Client(daemon.url) as client:
        start = time.monotonic()
        client.resize("auto")
        print(f"a resize that changes nothing takes {(time.monotonic() - start) * 1000:.1f} ms")


def test_a_budget_that_is_too_small_stops_the_start(serve: Serve) -> None:
    daemon = serve("--memory", "100MiB", ready=False)
    assert daemon.wait() == 71
    assert "a budget of 100 MiB is too small" in daemon.stderr
    assert "one token uses 10 experts; at least" in daemon.stderr
