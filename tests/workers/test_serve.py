"""A worker's work without its socket: reading experts in, computing from slots, and refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from sterna.runtime.config import embedded_model
from sterna.scheduler.model.plan import ModelPlan
from sterna.shm.errors import InternalError, ModelReadError
from sterna.shm.slots import FILLING, SlotTable, arena_nbytes
from sterna.workers.checkpoint.gguf import GgufFile
from sterna.workers.checkpoint.types import dequantize
from sterna.workers.messages import Compute, Configure, ExpertPage, PageIn
from sterna.workers.serve import ExpertWorker

from .. import oracles
from .kernels.packed import Tokens, same_bits

D_MODEL, LAYER = 256, 2
EXPERTS = (3, 7, 11)


class Bench:
    """The embedded model's plan, an arena of its own, and a worker over them."""

    def __init__(self, path: Path) -> None:
        self.file = GgufFile.open(path)
        self.plan = ModelPlan.from_file(self.file)
        plan = self.plan
        memory = np.zeros(arena_nbytes(plan.num_slots, plan.slot_nbytes), np.uint8)
        self.slots = SlotTable(memory, plan.num_slots, plan.slot_nbytes)
        self.worker = ExpertWorker(self.slots, self.file.fd)
        self.worker.configure(Configure(layers=plan.layer_shapes()))

    def page(self, layer: int, expert: int) -> ExpertPage:
        return self.plan.expert_page(self.file, layer, expert)

    def page_in(self, *pages: ExpertPage) -> list[tuple[int, int]]:
        message = PageIn(seq=5, experts=list(pages))
        return [(paged.slot, paged.left) for paged in self.worker.page_in(message)]

    def weights(self, layer: int, expert: int) -> list[oracles.F64]:
        """Return gate, up and down as numbers."""
        found = []
        for name in ("gate", "up", "down"):
            info = self.file.tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
            values = dequantize(info.type, self.file.data(info), info.shape)
            found.append(values[expert].astype(np.float64))
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    path = tmp_path / "model.gguf"
    shutil.copyfile(embedded_model(), path)
    made = Bench(path)
    yield made
    made.file.close()


@pytest.fixture
def loaded(bench: Bench) -> Bench:
    bench.page_in(*(bench.page(LAYER, expert) for expert in EXPERTS))
    return bench


def request(
    bench: Bench, count: int, pairs: dict[int, list[int]], **changes: object
) -> tuple[Compute, oracles.I32]:
    """Return the message for `pairs` (expert: rows) and its routing rows."""
    starts = np.concatenate(([0], np.cumsum([len(rows) for rows in pairs.values()]))).tolist()
    fields = {
        "seq": 9, "layer": LAYER, "kind": 256, "tokens": count, "experts": list(pairs),
        "slots": [bench.plan.slot_of(LAYER, expert) for expert in pairs], "starts": starts,
    }  # fmt: skip
    rows = np.array([row for some in pairs.values() for row in some], np.int32)
    return Compute(**{**fields, **changes}), rows  # type: ignore[arg-type]


def frames(tokens: Tokens, rows: oracles.I32) -> list[memoryview]:
    return [memoryview(each.tobytes()) for each in (tokens.q, tokens.scales, tokens.sums, rows)]


def activations(count: int) -> Tokens:
    x = np.random.default_rng(count).standard_normal((count, D_MODEL)).astype(np.float32)
    return Tokens.quantized(x, 256)


# ---- computing ----


def test_outputs_come_in_the_order_of_the_pairs(loaded: Bench) -> None:
    tokens = activations(4)
    pairs = {7: [0, 3], 3: [1], 11: [3, 2, 0, 1, 3]}
    message, rows = request(loaded, 4, pairs)
    answer, found = loaded.worker.compute(message, frames(tokens, rows))
    assert answer.seq == 9
    assert answer.busy_ns > 0
    assert found.shape == (8, D_MODEL)
    heard = tokens.q * tokens.scales.astype(np.float64)
    at = 0
    for expert, mine in pairs.items():
        true = oracles.feed_forward(*loaded.weights(LAYER, expert), heard[mine])
        part = found[at : at + len(mine)]
        assert ((part - true) ** 2).sum() / (true**2).sum() < 2e-3
        at += len(mine)


def test_a_pair_has_the_same_bits_alone(loaded: Bench) -> None:
    tokens = activations(5)
    message, rows = request(loaded, 5, {3: [0, 1, 2, 3, 4], 7: [4, 4]})
    together = loaded.worker.compute(message, frames(tokens, rows))[1].copy()
    for pair, (expert, row) in enumerate([(3, 0), (3, 1), (3, 2), (3, 3), (3, 4), (7, 4), (7, 4)]):
        one = Tokens(
            tokens.x, tokens.q[row : row + 1], tokens.scales[row : row + 1], tokens.sums[row : row + 1]
        )
        message, rows = request(loaded, 1, {expert: [0]})
        assert same_bits(loaded.worker.compute(message, frames(one, rows))[1][0], together[pair])


def test_any_worker_computes_what_another_has_read_in(loaded: Bench) -> None:
    other = ExpertWorker(loaded.slots, -1)  # has no model file
    other.configure(Configure(layers=loaded.plan.layer_shapes()))
    tokens = activations(2)
    message, rows = request(loaded, 2, {3: [0, 1]})
    mine = loaded.worker.compute(message, frames(tokens, rows))[1]
    assert same_bits(other.compute(message, frames(tokens, rows))[1], mine)


def test_a_smaller_batch_after_a_larger_one(loaded: Bench) -> None:
    tokens = activations(9)
    first, rows = request(loaded, 9, {3: [0]})
    alone = loaded.worker.compute(first, frames(tokens, rows))[1].copy()
    message, many = request(loaded, 9, {3: list(range(9)) * 3})
    loaded.worker.compute(message, frames(tokens, many))
    again = loaded.worker.compute(first, frames(tokens, rows))[1]
    assert again.shape == (1, D_MODEL)
    assert same_bits(again, alone)


def test_no_pairs_give_no_rows(loaded: Bench) -> None:
    message, rows = request(loaded, 1, {3: []})
    assert loaded.worker.compute(message, frames(activations(1), rows))[1].shape == (0, D_MODEL)


# ---- refusals ----


def refused(bench: Bench, message: Compute, parts: list[memoryview]) -> str:
    with pytest.raises(InternalError) as caught:
        bench.worker.compute(message, parts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_expert_that_is_not_there_is_an_error_and_not_a_guess(loaded: Bench) -> None:
    message, rows = request(loaded, 1, {3: [0], 4: [0]})
    text = refused(loaded, message, frames(activations(1), rows))
    assert "expert 4 of layer 2 is not in slot" in text
    message, rows = request(loaded, 1, {3: [0]}, slots=[loaded.plan.slot_of(LAYER, 7)])
    assert "expert 3" in refused(loaded, message, frames(activations(1), rows))
    loaded.slots.begin(loaded.plan.slot_of(LAYER, 3))
    message, rows = request(loaded, 1, {3: [0]})
    assert "expert 3" in refused(loaded, message, frames(activations(1), rows))


def test_a_layer_never_configured_is_an_error(loaded: Bench) -> None:
    message, rows = request(loaded, 1, {3: [0]}, layer=0)
    assert "layer 0" in refused(loaded, message, frames(activations(1), rows))


@pytest.mark.parametrize("rows", [[0, 4], [-1, 0], [0], [0, 1, 2], []], ids=str)
def test_routing_rows_outside_the_batch_are_an_error(loaded: Bench, rows: list[int]) -> None:
    message, _ = request(loaded, 4, {3: [0, 1]})
    refused(loaded, message, frames(activations(4), np.array(rows, np.int32)))


@pytest.mark.parametrize("short", range(4))
def test_frames_of_the_wrong_length_are_an_error(loaded: Bench, short: int) -> None:
    message, rows = request(loaded, 2, {3: [0, 1]})
    parts = frames(activations(2), rows)
    parts[short] = parts[short][:-1]
    refused(loaded, message, parts)


def test_too_few_frames_are_an_error(loaded: Bench) -> None:
    message, rows = request(loaded, 2, {3: [0, 1]})
    refused(loaded, message, frames(activations(2), rows)[2:])


# What makes the kernels write outside comes last: it spoils the process for the others.
MISSHAPEN: list[dict[str, object]] = [
    {"slots": [10**6]}, {"slots": [-1]}, {"slots": []}, {"kind": 0}, {"kind": 32}, {"kind": 7},
    {"tokens": -1}, {"starts": []}, {"starts": [1, 2]}, {"starts": [-2, 2]}, {"starts": [0, 1, 2]},
    {"starts": [0, 5, 2]},
]  # fmt: skip


@cache
def misshapen_outcomes() -> list[str]:
    """Return what became of each of MISSHAPEN, tried in a process of its own: it may crash."""
    outcomes: list[str] = []
    root = str(Path(__file__).parents[2])
    while len(outcomes) < len(MISSHAPEN):
        code = f"from tests.workers.test_serve import try_misshapen; try_misshapen({len(outcomes)})"
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
        )
        outcomes += process.stdout.splitlines()
        if process.returncode:
            outcomes.append(f"the process ended with {process.returncode}: {process.stderr[-300:]}")
    return outcomes


def try_misshapen(first: int) -> None:
    """Print one line for each of MISSHAPEN from `first` on."""
    bench = Bench(Path(embedded_model()))
    bench.page_in(bench.page(LAYER, 3))
    for changes in MISSHAPEN[first:]:
        message, rows = request(bench, 2, {3: [0, 1]}, **changes)
        try:
            bench.worker.compute(message, frames(activations(2), rows))
            print("computed", flush=True)
        except Exception as error:
            print(type(error).__name__, flush=True)


@pytest.mark.parametrize("number", range(len(MISSHAPEN)), ids=[str(changes) for changes in MISSHAPEN])
def test_numbers_that_point_outside_are_an_error(number: int) -> None:
    """The kernels check nothing: what they are given must lie inside, whoever sent it."""
    assert misshapen_outcomes()[number] == "InternalError"


# ---- reading experts in ----


def test_experts_are_read_in_one_after_the_other_and_published(bench: Bench) -> None:
    pages = [bench.page(LAYER, expert) for expert in EXPERTS]
    assert bench.page_in(*pages) == [(page.slot, left) for page, left in zip(pages, (2, 1, 0), strict=True)]
    assert bench.slots.num_ready() == 3
    for page in pages:
        assert bench.slots.holds(page.slot, LAYER, page.expert)
        raw = b"".join(os.pread(bench.file.fd, slab.nbytes, slab.offset) for slab in page.slabs)
        assert bench.slots.headers[page.slot]["crc32"] == zlib.crc32(raw)


def test_what_is_there_is_not_read_again(loaded: Bench) -> None:
    page = loaded.page(LAYER, 3)
    generation = int(loaded.slots.headers[page.slot]["generation"])
    blind = ExpertWorker(loaded.slots, -1)
    blind.configure(Configure(layers=loaded.plan.layer_shapes()))
    assert [paged.left for paged in blind.page_in(PageIn(seq=1, experts=[page]))] == [0]
    assert loaded.slots.headers[page.slot]["generation"] == generation


def test_a_slot_left_half_full_is_filled_again(bench: Bench) -> None:
    """Its worker was killed in the middle; the successor must not trust what lies there."""
    page = bench.page(LAYER, 3)
    bench.page_in(page)
    clean = bench.slots.memory[bench.slots.at(page.slot) :][: bench.plan.slot_nbytes].copy()
    bench.slots.begin(page.slot)
    bench.slots.memory[bench.slots.at(page.slot) :][:1000] = 0xEE
    bench.page_in(page)
    assert bench.slots.holds(page.slot, LAYER, 3)
    assert (bench.slots.memory[bench.slots.at(page.slot) :][: bench.plan.slot_nbytes] == clean).all()


def test_an_expert_fills_its_own_slot_only(bench: Bench) -> None:
    page = bench.page(LAYER, 3)
    before = bench.slots.memory.copy()
    bench.page_in(page)
    changed = np.flatnonzero(bench.slots.memory != before)
    header = bench.slots.headers.itemsize
    inside = (changed >= bench.slots.at(page.slot)) & (
        changed < bench.slots.at(page.slot) + bench.plan.slot_nbytes
    )
    inside |= (changed >= page.slot * header) & (changed < (page.slot + 1) * header)
    assert inside.all()


def test_a_file_that_was_cut_short_is_named_and_nothing_is_published(bench: Bench) -> None:
    good, cut = bench.page(1, 0), bench.page(LAYER, 3)
    os.truncate(bench.file.path, cut.slabs[1].offset + 100)
    with pytest.raises(ModelReadError) as caught:
        bench.page_in(good, cut)
    text = str(caught.value)
    assert any(slab.tensor in text for slab in cut.slabs)
    assert str(Path(bench.file.path).stat().st_size) in text
    assert "\n" not in text
    assert bench.slots.holds(good.slot, 1, 0)
    assert not bench.slots.holds(cut.slot, LAYER, 3)
    assert bench.slots.headers[cut.slot]["state"] == FILLING


def test_a_descriptor_that_cannot_be_read_is_an_error(bench: Bench, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # a folder: EISDIR
    worker = ExpertWorker(bench.slots, fd)
    worker.configure(Configure(layers=bench.plan.layer_shapes()))
    with pytest.raises(ModelReadError, match=r"blk\.2\.ffn_"):
        list(worker.page_in(PageIn(seq=1, experts=[bench.page(LAYER, 3)])))
    os.close(fd)
