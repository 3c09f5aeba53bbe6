"""`sterna simulate` as a user meets it: table, JSON, plot, and one line per error."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sterna.runtime.cli.commands.simulate import simulate
from sterna.scheduler.residency.replay.simulate import POLICIES
from sterna.shm.errors import ModelNotFound, SternaError, UsageError

SAMPLE = str(Path(__file__).parents[2] / "data/route-sample.csv")


def run(*arguments: str) -> str:
    done = CliRunner().invoke(simulate, [SAMPLE, *arguments], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout


def test_table() -> None:
    lines = run("--policy", "lru", "--policy", "belady", "--memory", "100MiB", "--memory", "25%").splitlines()
    assert lines[0] == "58 tokens, 2 layers of 128 experts, 6 used: 698 MiB, 32.7 MiB used by a token"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[:3] for row in rows] == [
        ["lru", "100 MiB", "14.3%"],
        ["belady", "100 MiB", "14.3%"],
        ["lru", "174 MiB", "25.0%"],
        ["belady", "174 MiB", "25.0%"],
    ]
    assert float(rows[0][3]) < float(rows[2][3]) < float(rows[3][3])


def test_json_has_every_policy_that_the_trace_allows() -> None:
    body = json.loads(run("--json", "--policy", "all", "--memory", "50%", "--per-layer"))
    assert [report["policy"] for report in body["reports"]] == [p for p in POLICIES if p != "cache-prior"]
    assert body["trace"]["experts"] == 128
    assert all(report["peak_bytes"] <= report["memory_bytes"] for report in body["reports"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--memory", "5x"], "--memory: expected a size"),
        (["--memory", "101%"], "--memory: expected a share"),
        (["--policy", "cache-prior"], "runner-ups"),
        (["--floor", "200"], "a floor of 200"),
    ],
)
def test_errors(arguments: list[str], text: str) -> None:
    with pytest.raises(SternaError, match=text) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)


def test_errors_of_click_and_of_the_file() -> None:
    with pytest.raises(click.UsageError, match="fifo"):
        run("--policy", "fifo")
    with pytest.raises(ModelNotFound):
        raise CliRunner().invoke(simulate, ["/nonexistent.csv"], standalone_mode=False).exception or OSError


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        with pytest.raises(UsageError, match=r"install sterna\[plot\]"):
            run("--plot", str(path))
        return
    run("--policy", "lru", "--policy", "belady", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="--plot: "):
        run("--policy", "lru", "--plot", str(tmp_path / "none" / "a.png"))
