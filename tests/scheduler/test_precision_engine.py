"""Experts held in fewer bits than the file, through a whole engine: what lies in slots, and what it costs."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

from sterna.runtime.config import embedded_model
from sterna.runtime.text.tokenizer import Tokenizer
from sterna.scheduler.model.planner import read_plan
from sterna.scheduler.residency.expert_memory import ExpertMemory
from sterna.shm.errors import ConfigError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.held.convert import Converter
from sterna.workers.checkpoint.held.packing import pack_matrix
from sterna.workers.checkpoint.types.table import TENSOR_TYPES, TYPES_BY_NAME

from . import altered_model as altered
from .local_engine import Generated, LocalEngine

PRECISIONS = ("file", "Q4_K", "Q3_K", "Q2_K")
MIXED = [(key * 7 + key // 16) % 4 for key in range(80)]
TEXT = (
    "Once upon a time there was a poor woodcutter who lived with his wife and his two children at the edge "
    "of a great forest, and the winter was so hard that they had nothing left to eat but a crust of bread."
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with Q8_0 experts, and noise so that they are no longer ternary."""
    random = np.random.default_rng(2)

    def noisy(name: str) -> altered.Tensor:
        values = altered.values(name)
        noise = random.standard_normal(values.shape) * values.std() / 4
        return quantize((values + noise).astype(np.float32), Type.Q8_0), Type.Q8_0

    target = tmp_path_factory.mktemp("precisions") / "q8.gguf"
    return altered.write(target, change=altered.converted(altered.EXPERTS, noisy))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    with GgufFile.open(embedded_model()) as file:
        return Tokenizer.from_metadata(file.metadata, "embedded").encode(TEXT)


@pytest.fixture(scope="module")
def plain(path: Path, prompt: list[int]) -> Generated:
    return LocalEngine(path, streams=1).run([prompt], 12)[0]


def perplexity(result: Generated) -> float:
    return math.exp(-float(np.mean(result.prompt_logprobs)))


def assert_slots_hold_what_was_assigned(engine: LocalEngine) -> None:
    """INV-4: header and bytes of every slot are those of its expert in the precision assigned to it."""
    plan, slots, converter = engine.plan, engine.slots, Converter()
    for slot in np.flatnonzero(slots.headers["state"] == 2).tolist():
        header = slots.headers[slot]
        layer, expert = int(header["layer"]), int(header["expert"])
        precision = plan.precision_of(plan.key_of(layer, expert))
        assert header["precision"] == precision
        matrices = plan.tiers[layer][precision]
        assert header["format"] == matrices[0].shape.form
        expected = np.zeros(slots.nbytes(slot), np.uint8)
        page = plan.expert_page(engine.file, layer, expert, slot, precision)
        for slab, matrix in zip(page.slabs, matrices, strict=True):
            raw = np.frombuffer(os.pread(engine.file.fd, slab.nbytes, slab.offset), np.uint8)
            file_type, (rows, columns) = TENSOR_TYPES[slab.type_id], (matrix.shape.rows, matrix.shape.columns)
            if precision:
                target = TYPES_BY_NAME[PRECISIONS[precision]]
                raw, file_type = converter.convert(raw, file_type, rows, columns, target), target
            pack_matrix(raw, file_type, matrix.shape, expected, matrix.at)
        used = int(header["nbytes"])
        found = slots.memory[slots.at(slot) : slots.at(slot) + used]
        assert (found == expected[:used]).all(), f"layer {layer} expert {expert}"


def test_precision_zero_changes_no_bit(path: Path, prompt: list[int], plain: Generated) -> None:
    engine = LocalEngine(path, streams=1, precisions=PRECISIONS, assignment=[0] * 80)
    assert engine.run([prompt], 12)[0] == plain
    assert (engine.slots.headers["precision"] == 0).all()


def test_mixed_precisions_stay_close(path: Path, prompt: list[int], plain: Generated) -> None:
    engine = LocalEngine(path, streams=1, workers=2, precisions=PRECISIONS, assignment=MIXED)
    assert engine.memory.holds_all
    assert_slots_hold_what_was_assigned(engine)
    found = engine.run([prompt], 12)[0]
    whole = engine.plan.expert_nbytes.values()
    print(
        f"\nperplexity {perplexity(plain):.3f} as in the file, {perplexity(found):.3f} mixed; "
        f"{sum(whole) * 16} bytes, {int(engine.plan.slot_nbytes().sum())} mixed"
    )
    difference = np.abs(np.subtract(found.prompt_logprobs, plain.prompt_logprobs))
    assert 0 < difference.mean() < 0.3
    assert perplexity(found) == pytest.approx(perplexity(plain), rel=0.1)


@pytest.mark.parametrize("resident", [24, 40])
def test_fewer_slots_than_experts_change_no_bit(path: Path, prompt: list[int], resident: int) -> None:
    """Each class has its share of the slots; every expert that gave way comes back as it was."""
    prompts = [prompt, prompt[20:30]]
    expected = LocalEngine(path, streams=2, precisions=PRECISIONS, assignment=MIXED).run(prompts, 8)
    engine = LocalEngine(
        path, streams=2, workers=2, resident=resident, precisions=PRECISIONS, assignment=MIXED
    )
    assert engine.slots.num_slots == resident
    assert len(set(np.diff([engine.slots.at(slot) for slot in range(resident)]).tolist())) == 4
    assert engine.run(prompts, 8) == expected
    assert engine.runner.counts.fetched > resident
    assert_slots_hold_what_was_assigned(engine)


def test_a_successor_keeps_what_is_as_assigned(path: Path) -> None:
    engine = LocalEngine(path, streams=1, precisions=PRECISIONS, assignment=MIXED)
    owners = {
        (layer, expert): engine.memory.owner(engine.plan.key_of(layer, expert))
        for layer in engine.plan.tiers
        for expert in range(16)
    }
    again = ExpertMemory(engine.plan, engine.slots, engine.plan.all_slots(), owners, None)
    assert (again.slot_of == engine.memory.slot_of).all()
    assert again.num_resident == 80
    # Two experts have changed places: each lies in a slot of the wrong size and precision.
    changed = list(MIXED)
    one, other = changed.index(1), changed.index(3)
    changed[one], changed[other] = 3, 1
    plan = engine.plan.assigned(changed)
    successor = ExpertMemory(plan, engine.slots, plan.all_slots(), owners, None)
    assert sorted(successor.missing(range(80))) == sorted([one, other])
    assert successor.num_resident == 78
    assert engine.slots.num_ready() == 78


def test_ternary_experts_stay_as_they_are(prompt: list[int]) -> None:
    expected = LocalEngine(streams=1).run([prompt], 8)
    engine = LocalEngine(streams=1, precisions=PRECISIONS, assignment=MIXED)
    assert engine.run([prompt], 8) == expected
    assert engine.plan.all_slots() == LocalEngine(streams=1).plan.all_slots()


def test_assignments_are_checked(path: Path) -> None:
    with GgufFile.open(path) as file:
        plan = read_plan(file, precisions=PRECISIONS)
        with pytest.raises(ConfigError, match="precisions of 79 experts for 80"):
            plan.assigned([0] * 79)
        with pytest.raises(ConfigError, match="precisions 0 to 4: there are 4"):
            plan.assigned([0] * 79 + [4])
        assert plan.assigned([1] * 80).by_precision()["Q4_K"] == (80, 80 * plan.precision_nbytes[1][1])
