"""Which experts are held in fewer bits than the file within a budget, and what `sterna plan` says of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type

from sterna.runtime.cli.main import cli
from sterna.runtime.config import Config, Precision
from sterna.runtime.daemon.model.served_model import ServedModel
from sterna.runtime.memory.budget import Wants, least_slots
from sterna.runtime.memory.choice import UNLIMITED, Choices, known_counts
from sterna.scheduler.residency.policies import new_policy
from sterna.scheduler.residency.saved_counts import COUNT_ROW, SavedCounts, read_counts
from sterna.scheduler.spec import model_id
from sterna.shm.errors import ConfigError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.kernels.routing import eviction
from sterna.workers.user_cache import user_cache

from ..examine.sparse_model import write_flash

WANTS = Wants(workers=2, threads=2, max_batch_tokens=64, streams=1, context=512)
COUNTS = np.arange(7 * 64, 0, -1, dtype=np.float64)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-4.7-Flash's shape with 8 layers and experts of Q8_0: 448 of 10 MB."""
    return write_flash(tmp_path_factory.mktemp("m") / "flash.gguf", layers=8, expert_type=Type.Q8_0)


def choices(file: GgufFile, precision: Precision, counts: npt.NDArray[np.float64] | None = COUNTS) -> Choices:
    return Choices(file, "2", "block", precision, counts)


def test_room_is_spent_on_the_experts_that_are_used_most(path: Path) -> None:
    with GgufFile.open(path) as file:
        found = choices(file, "default")
        most = found.within(UNLIMITED, WANTS)
        assert most.plan.assignment == (1,) * 448  # nothing is held finer than the preset's best
        assert most.plan.precisions == ("file", "Q4_K", "Q3_K", "Q2_K")
        slot = dict(enumerate(most.plan.precision_nbytes[1]))
        room = 300 * slot[3] + 148 * slot[2]
        budget = most.decision.total - 448 * slot[1] + room
        tight = found.within(budget, WANTS)
        assert budget - slot[1] < tight.decision.total <= budget
        assert tight.decision.num_slots == 448
        assert tight.decision.fits_all
        order = list(tight.plan.assignment)
        print(f"\n{tight.precision}")
        assert order[0] < order[-1] == 3
        assert tight.decision.classes == tight.plan.all_slots()
        assert tight.plan.by_precision()["file"] == (0, 0)
        assert sum(count for count, _ in tight.plan.by_precision().values()) == 448
        uniform = choices(file, "default", None).within(budget, WANTS)
        assert "without counts of use" in uniform.precision
        assert choices(file, "off").within(budget, WANTS).plan.precisions == ("file",)


def test_below_the_smallest_there_are_fewer_slots(path: Path) -> None:
    with GgufFile.open(path) as file:
        found = choices(file, "memory-constrained")
        most = found.within(UNLIMITED, WANTS)
        cold = most.plan.precision_nbytes[1][2]
        budget = most.decision.total - 448 * most.plan.precision_nbytes[1][1] + 100 * cold
        tight = found.within(budget, WANTS)
        assert set(tight.plan.assignment) == {2}
        assert tight.decision.classes == [(100, cold)]
        assert tight.decision.total <= budget
        off = choices(file, "off").within(budget, WANTS)
        assert off.decision.num_slots < 100 / 3
        with pytest.raises(ConfigError, match="resident_experts: 10 of 448"):
            found.within(budget, Wants(workers=2, threads=2, max_batch_tokens=64, resident="10"))


def test_a_share_of_experts_is_that_share_of_each_class(path: Path) -> None:
    with GgufFile.open(path) as file:
        found = choices(file, "default")
        most = found.within(UNLIMITED, WANTS)
        slot = most.plan.precision_nbytes[1]
        budget = most.decision.total - 448 * slot[1] + 150 * sum(slot[1:])
        whole = found.within(budget, WANTS).plan.all_slots()
        half = found.within(
            budget, Wants(workers=2, threads=2, max_batch_tokens=64, streams=1, context=512, resident="50%")
        )
        assert len(whole) >= 2
        assert half.plan.all_slots() == whole
        assert half.decision.num_slots == 224
        for (kept, nbytes), (all_of_it, same) in zip(half.decision.classes, whole, strict=True):
            assert nbytes == same
            assert kept == pytest.approx(all_of_it / 2, abs=1.1)
        least = least_slots(half.plan, whole)
        assert sum(least) <= 7 * 4 + 2 * len(whole)


def test_the_daemon_reads_what_the_scheduler_counted(path: Path, tmp_path: Path) -> None:
    assert eviction.COUNT == COUNT_ROW
    policy = new_policy(448, 7)
    policy.touch(np.array([3, 5], np.int32), np.array([4.0, 1.0], np.float32))
    identity = model_id(str(path))
    assert read_counts(str(tmp_path), identity) is None
    SavedCounts(str(tmp_path), identity).save(policy)
    counts = read_counts(str(tmp_path), identity)
    assert counts is not None
    assert counts.shape == (448,)
    assert np.argsort(-counts)[:2].tolist() == [3, 5]
    next((tmp_path / "counts").iterdir()).write_bytes(b"not a zip")
    assert read_counts(str(tmp_path), identity) is None
    assert read_counts("", identity) is None


def test_the_setting_reaches_the_plan(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    policy = new_policy(448, 7)
    policy.touch(np.arange(440, 448, dtype=np.int32))
    SavedCounts(str(user_cache()), model_id(str(path))).save(policy)
    assert known_counts(Config(), path) is None
    arguments = ["plan", str(path), "--precision", "default", "--workers", "1", "--memory", "3GiB"]
    told = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert told.exception is None
    assert "held as           " in told.stdout
    facts = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False).stdout)
    held = facts["experts"]["by_precision"]
    assert sum(row["experts"] for row in held.values()) == 448
    assert sum(row["bytes"] for row in held.values()) == facts["used_bytes"]["slots"]
    config = Config(model=path, precision="default", workers=1, memory="3GiB")
    with caplog.at_level(logging.INFO, "sterna.model"):
        model = ServedModel.load(config)
    assert set(model.plan.assignment[440:]) == {min(model.plan.assignment)}
    assert {name: row["experts"] for name, row in held.items()} == {
        name: count for name, (count, _) in model.plan.by_precision().items()
    }
    assert "default, by counts of use: Q4_K" in caplog.text
    less = model.plan_resize(2 * 2**30)
    assert less.total <= 2 * 2**30
    assert less.num_slots < 448
    for (kept, _), (all_of_it, _) in zip(less.classes, model.slots, strict=True):
        assert kept < all_of_it or all_of_it == 1
    model.close()


def test_a_ternary_model_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    plain = ServedModel.load(Config(memory="250MiB", workers=1))
    with caplog.at_level(logging.WARNING, "sterna.model"):  # what `sterna serve` on a terminal shows
        model = ServedModel.load(Config(memory="250MiB", workers=1, precision="default"))
    assert (model.plan.precisions, model.plan.assignment) == (("file",), ())
    assert model.decision == plain.decision
    assert [line for line in caplog.messages if "default changes nothing: experts are ternary" in line]
    model.close()
    plain.close()
