"""A daemon with experts in fewer bits than the file: it answers, and no killed process changes a byte."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from .. import gguf_copy as gc
from ..conftest import Serve
from ..daemon_process import COMMAND, Daemon
from ..faults.test_killed_processes import killer, restarts
from ..requests import essence, run_alone, run_together, run_while, sampled

REQUESTS = [sampled(number, max_tokens=40) for number in range(2)]
SETTINGS = ("--workers", "2", "--max-num-seqs", "3", "--ctx-size", "256", "--max-batch-tokens", "64")


def plan(path: Path, *arguments: str) -> dict[str, Any]:
    command = [*COMMAND, "plan", str(path), *SETTINGS, "--precision", "default", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.mark.slow
def test_killed_processes_change_no_byte(serve: Serve, tmp_path: Path) -> None:
    path = gc.copy_model(tmp_path / "model.gguf", gc.experts_as(Type.Q8_0))
    whole = plan(path, "--memory", "1GiB")
    assert whole["experts"]["by_precision"]["Q4_K"]["experts"] == 80
    # Less by a fifth than all experts as Q4_K need: too little for that, enough for Q2_K.
    budget = whole["used_total_bytes"] - whole["used_bytes"]["slots"] // 5
    arguments = ("--precision", "default", "--memory", str(budget), "--resident-experts", "75%")
    daemon = serve(str(path), *SETTINGS, *arguments)
    expected = [essence(result) for result in run_together(daemon.url, REQUESTS)]
    experts = daemon.status()["experts"]
    print(f"\n{experts['by_precision']}, {experts['fetched']} read, half in {experts['page_in_p50_ms']} ms")
    held = {name: row["experts"] for name, row in experts["by_precision"].items() if row["experts"]}
    assert sum(held.values()) == 80
    assert len(held) >= 2
    assert "file" not in held
    assert (experts["slots"], experts["resident"]) == (60, 60)
    for process in ("worker", "scheduler"):
        found = run_while(daemon.url, REQUESTS, killer(daemon, process, 1))
        assert restarts(daemon, process) == 1
        assert [essence(result) for result in found] == expected
    assert "model.precision experts='default, without counts of use: Q4_K" in daemon.stderr


def test_a_ternary_model_answers_as_ever(serve: Serve, shared: Daemon) -> None:
    daemon = serve("--workers", "1", "--precision", "memory-constrained")
    requests = [sampled(number, max_tokens=24) for number in range(2)]
    found = [essence(result) for result in run_alone(daemon.url, requests)]
    assert found == [essence(result) for result in run_alone(shared.url, requests)]
    assert "memory-constrained changes nothing: experts are ternary" in daemon.stderr
