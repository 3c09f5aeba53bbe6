"""Memory's arithmetic: what is accounted never exceeds the budget, and too small a budget is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sterna.runtime.config import Config, embedded_model
from sterna.runtime.memory.budget import (
    SLACK,
    WORKER,
    BudgetTooSmall,
    SlotDecision,
    Wants,
    decide,
    least_slots,
    spread,
)
from sterna.runtime.memory.choice import Choices, wants_of
from sterna.scheduler.model.plan import ModelPlan
from sterna.scheduler.model.planner import read_plan
from sterna.shm.errors import ConfigError
from sterna.shm.slots import arena_nbytes
from sterna.workers.checkpoint.file.gguf import GgufFile

from ...families.tiny_files import write
from ...families.tiny_models import tiny_model
from ..examine.sparse_model import write_flash

MIB = 2**20
WANTS = Wants(workers=1, threads=2, max_batch_tokens=0)
READ = 2_433_024


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> ModelPlan:
    path = write_flash(tmp_path_factory.mktemp("m") / "flash.gguf", layers=8)
    with GgufFile.open(path) as file:
        return read_plan(file)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ModelPlan:
    """Two sizes of experts: 4 layers of 16 at 2 bits, 3 at 4.5."""
    path = write_flash(
        tmp_path_factory.mktemp("m") / "mixed.gguf",
        experts=16,
        expert_type=Type.TQ2_0,
        other={5: Type.Q4_K, 6: Type.Q4_K, 7: Type.Q4_K},
    )
    with GgufFile.open(path) as file:
        return read_plan(file)


def check(plan: ModelPlan, decision: SlotDecision, most: list[tuple[int, int]]) -> None:
    """INV-3: the rows name all memory that is used, and their sum is within the budget."""
    assert decision.total == sum(decision.rows.values()) <= decision.budget
    assert decision.rows["slots"] + decision.rows["headers"] >= arena_nbytes(decision.classes)
    streams = decision.rows["kv"] + decision.rows["streams"]
    assert streams >= decision.streams.layout().nbytes
    least = least_slots(plan, most)
    for (count, nbytes), (limit, same), low in zip(decision.classes, most, least, strict=True):
        assert nbytes == same
        assert low <= count <= limit


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    budget=st.integers(0, 4000 * MIB),
    workers=st.integers(1, 4),
    tokens=st.sampled_from([0, 1, 64, 512, 4096]),
    streams=st.sampled_from([0, 1, 16]),
    context=st.sampled_from([0, 300, 4096]),
    two_sizes=st.booleans(),
)
def test_the_sum_is_kept(
    flash: ModelPlan, mixed: ModelPlan, budget: int, workers: int, tokens: int, streams: int, context: int,
    two_sizes: bool,
) -> None:  # fmt: skip
    plan = mixed if two_sizes else flash
    wants = Wants(
        workers=workers, threads=2, max_batch_tokens=tokens, streams=streams, context=context,
    )  # fmt: skip
    try:
        decision = decide(plan, wants, budget, READ)
    except BudgetTooSmall as error:
        smallest = error.smallest
        decision = decide(plan, wants, smallest, READ)
        assert budget < smallest
        assert decision.num_slots == sum(least_slots(plan, plan.all_slots()))
    check(plan, decision, plan.all_slots())
    assert decision.streams.streams in ({streams} if streams else {16, 8, 4, 2, 1})
    assert decision.streams.context in ({context} if context else {4096, 2048, 1024, 512})
    more = decide(plan, wants, decision.budget + 200 * MIB, READ)
    if (more.streams, more.max_batch_tokens) == (decision.streams, decision.max_batch_tokens):
        assert more.num_slots >= decision.num_slots
    smaller = decide(plan, wants, decision.smallest, READ)
    check(plan, smaller, plan.all_slots())


def test_a_dense_model_is_refused_without_a_word_on_experts(tmp_path: Path) -> None:
    with (
        GgufFile.open(write(tiny_model("qwen3"), tmp_path / "dense.gguf")) as file,
        pytest.raises(BudgetTooSmall) as caught,
    ):
        Choices(file, activations="block").within(10_000_000, WANTS)
    assert str(caught.value).startswith("a budget of 10 MB is too small: ")
    assert "expert" not in str(caught.value)


def test_a_model_without_ternary_weights_is_not_said_to_hold_them(tmp_path: Path) -> None:
    with GgufFile.open(write(tiny_model("qwen3"), tmp_path / "dense.gguf")) as file:
        assert Choices(file).within(2**31, WANTS).ternary == "no ternary weights"
    with GgufFile.open(embedded_model()) as file:
        assert Choices(file).within(2**31, WANTS).ternary == "2 bits: fits in memory"


def test_the_smallest_budget_is_exact_and_named(flash: ModelPlan) -> None:
    with pytest.raises(BudgetTooSmall, match=r"one token uses 28 experts; at least") as caught:
        decide(flash, WANTS, 300 * MIB, READ)
    named = int(re.findall(r"\((\d+) bytes\)", str(caught.value))[0])
    assert named == caught.value.smallest
    assert decide(flash, WANTS, named, READ).num_slots == 7 * 4 + 1
    with pytest.raises(BudgetTooSmall):
        decide(flash, WANTS, named - 1, READ)


def test_everything_fits_or_not_by_one_slot(flash: ModelPlan) -> None:
    wants = Wants(workers=1, threads=2, max_batch_tokens=64, streams=1, context=512)
    whole = decide(flash, wants, 2**40, READ)
    assert (whole.classes, whole.share, whole.fits_all) == (flash.all_slots(), 1.0, True)
    assert decide(flash, wants, whole.total, READ).classes == whole.classes
    less = decide(flash, wants, whole.total - 1, READ)
    assert (less.num_slots, less.fits_all, less.why) == (447, False, "447 of 448 experts fit")


def test_classes_get_slots_in_proportion(mixed: ModelPlan) -> None:
    most = mixed.all_slots()
    assert [count for count, _ in most] == [64, 48]
    whole = decide(mixed, WANTS, 2**40, READ)
    half = decide(mixed, whole.settled(WANTS), whole.total - whole.rows["slots"] // 2, READ)
    assert 0 < half.share < 1
    assert half.classes[0][0] / 64 == pytest.approx(half.classes[1][0] / 48, abs=0.05)
    assert spread(mixed, most, 56) == [32, 24]
    assert spread(mixed, most, 0) == least_slots(mixed, most) == [17, 13]


def test_a_number_of_experts_as_set() -> None:
    with GgufFile.open(embedded_model()) as file:
        plan = read_plan(file)
    for text, slots in (("50%", 40), ("25%", 20), ("11", 11), ("100%", 80), ("auto", 80)):
        decision = decide(plan, Wants(workers=1, threads=1, max_batch_tokens=64, resident=text), 2**32, READ)
        assert (decision.num_slots, decision.fits_all) == (slots, True)
    with pytest.raises(ConfigError, match=r"resident_experts: 10 of 80 experts are fewer than the 11"):
        decide(plan, Wants(workers=1, threads=1, max_batch_tokens=64, resident="10"), 2**32, READ)


def test_streams_give_way_only_where_nothing_was_set(flash: ModelPlan) -> None:
    ample = decide(flash, WANTS, 2**40, READ)
    assert (ample.streams.streams, ample.streams.context, ample.notes) == (16, 4096, [])
    tight = decide(flash, WANTS, 1200 * MIB, READ)
    assert tight.streams.streams < 16
    assert tight.notes[-1].startswith("max_num_seqs is ")
    kv = tight.rows["kv"]
    assert kv <= 0.25 * (1200 * MIB - tight.total + tight.rows["slots"] + kv) or tight.streams.streams == 1
    with pytest.raises(BudgetTooSmall, match="lower max_num_seqs, ctx_size, "):
        decide(
            flash,
            Wants(workers=1, threads=2, max_batch_tokens=512, streams=64, context=4096),
            1200 * MIB,
            READ,
        )


def test_resizing_stays_within_the_slots_that_there_are(flash: ModelPlan) -> None:
    start = decide(flash, WANTS, 1500 * MIB, READ)
    wants = start.settled(WANTS)
    for budget in (1200 * MIB, 1400 * MIB, 1500 * MIB, 3000 * MIB):
        decision = decide(flash, wants, budget, READ, at_most=start.classes)
        check(flash, decision, start.classes)
    assert decision.classes == start.classes


def test_a_file_s_size_costs_no_room(tmp_path: Path) -> None:
    path = write_flash(tmp_path / "large.gguf", layers=47, expert_type=Type.Q4_K)
    assert path.stat().st_size > 15e9
    assert path.stat().st_blocks * 512 < 2**20


def test_local_lane_counts_no_worker_processes(flash: ModelPlan) -> None:
    settings = {"workers": 3, "threads": 2, "max_batch_tokens": 64, "max_num_seqs": 1, "ctx_size": 512}
    among = wants_of(Config(**settings))  # type: ignore[arg-type]
    alone = wants_of(Config(**settings, lane="local"))  # type: ignore[arg-type]
    with_processes = decide(flash, among, 4000 * MIB, READ)
    without = decide(flash, alone, 4000 * MIB, READ)
    assert with_processes.rows["workers"] - without.rows["workers"] == 3 * WORKER
    assert without.rows["workers"] > 0  # their buffers are in the scheduler
    saved = with_processes.smallest - without.smallest
    assert saved == pytest.approx(3 * WORKER * (1 + SLACK), abs=1)
