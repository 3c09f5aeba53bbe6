"""`sterna plan`: the daemon's own arithmetic and a forecast, in seconds for a file of any size."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type

from sterna.runtime.cli.main import cli
from sterna.runtime.config import Config, embedded_model
from sterna.runtime.daemon.model.served_model import ServedModel
from sterna.runtime.examine.forecast import HIGH, LOW, Rates, describe_plan, hit_rate, probe
from sterna.runtime.sizes import format_size

from .sparse_model import write_flash

GIB = 2**30
RATES = Rates(disk=1e9, memory=10e9, how="given")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 18 GB that takes no room on the disk."""
    path = write_flash(tmp_path_factory.mktemp("m") / "large.gguf", layers=47, expert_type=Type.Q4_K)
    assert path.stat().st_size > 15e9
    return path


def planned(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["plan", *arguments, "--json"], standalone_mode=False)
    assert result.exception is None
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_the_embedded_model_fits() -> None:
    facts = planned("--workers", "2")
    assert (facts["fits"], facts["works"], facts["refusal"]) == (True, True, None)
    assert facts["experts"]["slots"] == facts["experts"]["total"] == sum(facts["experts"]["of_workers"]) == 80
    assert facts["used_total_bytes"] == sum(facts["used_bytes"].values()) <= facts["budget"]["bytes"]
    forecast = facts["forecast"]
    assert (forecast["hit_rate"], forecast["read_bytes_per_token"]) == ([1.0, 1.0], [0, 0])
    assert forecast["tokens_per_s"][0] > 0


def test_a_file_larger_than_memory_in_seconds(large: Path) -> None:
    start_s = time.monotonic()
    facts = planned(str(large), "--memory", "8GiB", "--workers", "2")
    print(f"\nplanned {large.stat().st_size / 1e9:.1f} GB in {time.monotonic() - start_s:.1f} s")
    assert (facts["fits"], facts["works"]) == (False, True)
    assert 0.1 < facts["experts"]["share"] < 0.9
    assert facts["used_total_bytes"] <= 8 * GIB < facts["whole_budget_bytes"]
    assert facts["smallest_budget_bytes"] < 8 * GIB
    low, high = facts["forecast"]["hit_rate"]
    assert 0.2 < low < high < 1
    assert facts["forecast"]["asked_bytes_per_token"] == 46 * 4 * 3 * 2048 * 1536 * 144 // 256
    assert facts["forecast"]["read_bytes_per_token"][1] == pytest.approx(
        facts["forecast"]["asked_bytes_per_token"] * (1 - high), rel=0.01
    )


def test_the_text_names_what_counts(large: Path) -> None:
    arguments = ["plan", str(large), "--preset", "mobile"]
    result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert result.exception is None
    facts = planned(*arguments[1:])
    assert result.stdout.startswith("does not work: a budget of 2 GiB is too small: without experts ")
    assert f"smallest budget   {format_size(facts['smallest_budget_bytes'])}" in result.stdout
    again = planned(str(large), "--memory", str(facts["smallest_budget_bytes"]))
    assert again["works"]
    assert not planned(str(large), "--memory", str(facts["smallest_budget_bytes"] - 1))["works"]


def test_the_daemon_does_as_was_planned() -> None:
    config = Config(memory="250MiB", workers=2, ctx_size=128)
    facts = describe_plan(config, RATES)
    model = ServedModel.load(config)
    try:
        assert sum(count for count, _ in model.slots) == facts["experts"]["slots"]
        assert model.decision.rows == facts["used_bytes"]
    finally:
        model.close()


def test_the_forecast_is_bound_by_disk_or_memory(large: Path) -> None:
    config = Config(model=large, memory="8GiB", workers=1)
    slow = describe_plan(config, Rates(disk=1e8, memory=1e12, how="given"))["forecast"]
    assert slow["tokens_per_s"][0] == pytest.approx(1e8 / slow["read_bytes_per_token"][0], rel=0.05)
    fast = describe_plan(config, Rates(disk=1e12, memory=1e9, how="given"))["forecast"]
    assert fast["tokens_per_s"][0] == pytest.approx(1 / fast["compute_s_per_token"], rel=0.01)
    assert slow["first_fill_s"] == pytest.approx(6.5e9 / 1e8, rel=0.1)


def test_curves_of_hits() -> None:
    for curve in (LOW, HIGH):
        assert [hit_rate(curve, share) for share in (0.0, 1.0)] == [0.0, 1.0]
        assert list(curve) == sorted(curve)
    assert hit_rate(LOW, 0.3125) == pytest.approx((0.526 + 0.654) / 2)


def test_this_machine_is_probed() -> None:
    rates = probe(embedded_model())
    print(f"\n{rates}")
    assert rates.disk > 1e5
    assert rates.memory > 1e8
