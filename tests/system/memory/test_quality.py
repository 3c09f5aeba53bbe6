"""Quality budgets through a whole daemon: nothing is lost where none is in force; the bound where one is."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import tempfile
from pathlib import Path

import msgspec
import pytest

from sterna.runtime.client.results import Result
from sterna.runtime.quality.calibration import Stored

from ..conftest import Serve
from ..daemon_process import COMMAND, Daemon, clean_env, wait_until
from ..faults.test_killed_processes import killer
from ..requests import Request, essence, run_alone, run_while, sampled

TALE = (
    "There was once a king who had three daughters, and the youngest of them was so fair that the sun "
    "itself, who had seen so much, wondered whenever it shone upon her face."
)
SCORED: Request = {"prompt": TALE, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": True}


def facts_hold(result: Result, epsilon: float) -> None:
    facts = result.routing
    assert facts is not None
    assert facts.epsilon == epsilon
    assert facts.swaps >= facts.changed > 0
    assert facts.lost_mass <= epsilon * (1 + 1e-9)
    assert facts.agreement == pytest.approx(1 - facts.changed / facts.events)


def test_no_budget_and_a_budget_without_need_are_exact(shared: Daemon) -> None:
    plain = sampled(3, 32) | {"logprobs": 3, "prompt_logprobs": True}
    exact, zero, lossy, stepped = run_alone(
        shared.url,
        [plain, plain | {"quality_budget": 0.0}, plain | {"lost_mass": 0.5}, plain | {"stepped": True}],
    )
    assert essence(exact) == essence(zero) == essence(lossy) == essence(stepped)
    assert exact.routing is zero.routing is stepped.routing is None
    assert lossy.routing is not None  # in force, but all experts are in memory
    assert (lossy.routing.events, lossy.routing.swaps, lossy.routing.agreement) == (0, 0, 1.0)


def test_stepped_prompt_takes_a_step_for_each_token(shared: Daemon) -> None:
    def steps(request: Request) -> int:
        before = shared.status()["totals"]["steps"]
        run_alone(shared.url, [request])
        count: int = shared.status()["totals"]["steps"] - before
        return count

    (scored,) = run_alone(shared.url, [SCORED])
    assert steps(SCORED) == 1
    assert steps(SCORED | {"stepped": True}) == len(scored.prompt_token_ids)


def test_budget_with_half_the_experts(serve: Serve, shared: Daemon) -> None:
    plain = sampled(1, 48) | {"logprobs": 2}
    exact = run_alone(shared.url, [plain])[0]
    daemon = serve("--resident-experts", "50%")
    again, zero, lossy, scored = run_alone(
        daemon.url,
        [
            plain,
            plain | {"quality_budget": 0.0},
            plain | {"lost_mass": 0.1},
            SCORED | {"stepped": True, "lost_mass": 0.1},
        ],
    )
    assert essence(exact) == essence(again) == essence(zero)
    facts_hold(lossy, 0.1)
    facts_hold(scored, 0.1)
    assert lossy.routing is not None
    assert lossy.routing.events == 5 * 47  # layers, and tokens after the first


@pytest.mark.slow
def test_a_budget_gives_the_same_bytes_with_any_number_of_workers(serve: Serve) -> None:
    """From the same start: which expert is in memory, also a foreseen one, depends on the requests alone."""
    found = []
    for workers in ("1", "2"):
        daemon = serve(
            "--workers", workers, "--resident-experts", "50%", "--prefetch", "on",
            "--routing", "budget", "--quality-budget", "3%",
        )  # fmt: skip
        results = run_alone(daemon.url, [sampled(number, max_tokens=60) for number in range(3)])
        found.append([(essence(result), result.routing) for result in results])
        daemon.stop()
    assert found[0] == found[1]
    assert any(routing is not None and routing.swaps for _, routing in found[0])


@pytest.mark.slow
def test_bound_holds_though_the_scheduler_dies(serve: Serve) -> None:
    daemon = serve("--resident-experts", "50%")
    request = sampled(2, 200) | {"lost_mass": 0.05}
    (result,) = run_while(daemon.url, [request], killer(daemon, "scheduler", 1))
    assert len(result.token_ids) == 200
    facts_hold(result, 0.05)


def test_perplexity_command(shared: Daemon) -> None:
    """Its figure is that of the tokens' scores; a budget costs nothing while all experts are in memory."""
    with shared.client() as client:
        ids = client.tokenize(TALE)
    (scored,) = run_alone(shared.url, [{"token_ids": ids, **SCORED, "prompt": None}])
    with tempfile.TemporaryDirectory(prefix="st-") as folder:
        home = Path(folder)
        (home / "tale.txt").write_text(TALE)
        command = [*COMMAND, "perplexity", "embedded", str(home / "tale.txt"), "--json"]
        done = subprocess.run(
            [*command, "--lost-mass", "0.05", "--kl"],
            capture_output=True, text=True, env=clean_env(home), timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        wait_until(lambda: not list((home / "tmp").iterdir()), 3.0, "the daemon's folder is gone")
    found = json.loads(done.stdout)
    values = [value for value in scored.prompt_logprobs or () if value is not None]
    assert found["tokens"] == len(values) == len(ids) - 1
    assert found["nats_per_token"] == pytest.approx(-math.fsum(values) / len(values))
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert found["stepped"] is True
    assert found["exact"]["mean_abs_difference_nats"] == found["exact"]["rise"] == 0.0
    assert "scoring, exact" in done.stderr


@pytest.mark.slow
def test_interrupted_calibration_keeps_what_was_measured() -> None:
    with tempfile.TemporaryDirectory(prefix="st-") as folder:
        home = Path(folder)
        (home / "tale.txt").write_text(TALE * 3)
        output = home / "tales.json"
        command = [*COMMAND, "calibrate", "embedded", str(home / "tale.txt"), "-o", str(output)]
        with subprocess.Popen(
            [*command, "--resident-experts", "50%", "--tokens", "96", "--budgets", "3%"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env(home),
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            runs = 0
            while runs < 2:
                line = process.stderr.readline()
                assert line, "the second epsilon is tried"
                runs += "scoring, lost mass" in line
            process.send_signal(signal.SIGINT)
            shown = process.stdout.read()
            assert process.wait(30) == 130
        wait_until(lambda: not list((home / "tmp").iterdir()), 3.0, "the daemon's folder is gone")
        stored = msgspec.json.decode(output.read_bytes(), type=Stored)
    (table,) = stored.tables
    assert (table.resident_share, table.tokens) == (0.5, 96)
    (point,) = table.points
    assert point.epsilon == 0.06  # twice the budget is tried first
    assert 0 < point.lost_mass <= point.epsilon
    assert point.swap_share > 0
    assert "| 3.00%  |" in shown
