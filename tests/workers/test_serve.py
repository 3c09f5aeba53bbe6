"""A worker's work without its socket: reading experts in, computing from slots, and refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash

from sterna.runtime.config import embedded_model
from sterna.shm.errors import InternalError, ModelReadError
from sterna.shm.slots import FILLING
from sterna.workers.checkpoint.held.formats import Format, MatrixShape
from sterna.workers.messages import Compute, PageIn
from sterna.workers.paging.checksums import combined
from sterna.workers.serve import ExpertWorker

from .. import oracles
from .expert_bench import Bench
from .kernels.packed import Tokens, same_bits

D_MODEL, LAYER = 256, 2
EXPERTS = (3, 7, 11)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    path = tmp_path / "model.gguf"
    shutil.copyfile(embedded_model(), path)
    made = Bench(path)
    yield made
    made.close()


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
        "seq": 9, "layer": LAYER, "precision": 0, "activation_kind": 256, "tokens": count,
        "experts": list(pairs),
        "slots": [bench.plan.key_of(LAYER, expert) for expert in pairs], "starts": starts,
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
    other = ExpertWorker(loaded.slots, [])  # has no model file
    other.configure(loaded.shapes)
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
    message, rows = request(loaded, 1, {3: [0]}, slots=[loaded.plan.key_of(LAYER, 7)])
    assert "expert 3" in refused(loaded, message, frames(activations(1), rows))
    loaded.slots.begin(loaded.plan.key_of(LAYER, 3))
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
    {"slots": [10**6]}, {"slots": [-1]}, {"slots": []},
    {"activation_kind": 0}, {"activation_kind": 32}, {"activation_kind": 7},
    {"tokens": -1}, {"starts": []}, {"starts": [1, 2]}, {"starts": [-2, 2]}, {"starts": [0, 1, 2]},
    {"starts": [0, 5, 2]}, {"precision": 1}, {"precision": -1},
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


def test_an_expert_is_read_packed_and_published(bench: Bench) -> None:
    pages = [bench.page(LAYER, expert) for expert in EXPERTS]
    nbytes = sum(slab.nbytes for slab in pages[0].slabs)
    answers = bench.page_in(*pages)
    assert [(paged.seq, paged.nbytes) for paged in answers] == [(i, nbytes) for i in range(3)]
    assert all(0 < paged.read_ns < paged.busy_ns for paged in answers)
    assert bench.slots.num_ready() == 3
    for page in pages:
        assert bench.slots.holds(page.slot, LAYER, page.expert)
        header = bench.slots.headers[page.slot]
        raw = [os.pread(bench.file.fd, slab.nbytes, slab.offset) for slab in page.slabs]
        assert header["checksum"] == combined(xxhash.xxh3_64_intdigest(slab) for slab in raw)
        assert (header["precision"], header["format"]) == (0, Format.TL1)
        assert (bench.contents(page.slot) == bench.packed(page)).all()


def test_what_is_there_is_not_read_again(loaded: Bench) -> None:
    page = loaded.page(LAYER, 3)
    generation = int(loaded.slots.headers[page.slot]["generation"])
    blind = ExpertWorker(loaded.slots, [])
    blind.configure(loaded.shapes)
    paged = blind.page_in(PageIn(seq=1, page=page))
    assert (paged.nbytes, paged.read_ns) == (0, 0)
    assert loaded.slots.headers[page.slot]["generation"] == generation


def test_another_precision_of_what_is_there_is_read(bench: Bench) -> None:
    """The format of what lies in a slot is in its header, and what is asked for replaces it."""
    shape = bench.shapes.layers[LAYER]
    rows = [(int(Format.B3), *matrix[1:]) for matrix in shape.precisions[0]]
    both = msgspec.structs.replace(shape, precisions=[shape.precisions[0], rows])
    bench.shapes.layers[LAYER] = both
    bench.worker.configure(bench.shapes)
    page = bench.page(LAYER, 3)
    for precision, form in ((0, Format.TL1), (1, Format.B3), (0, Format.TL1)):
        asked = msgspec.structs.replace(page, precision=precision)
        assert bench.page_in(asked)[0].nbytes > 0
        header = bench.slots.headers[page.slot]
        assert (header["precision"], header["format"]) == (precision, form)
        for form_number, height, width, at in both.precisions[precision]:
            matrix = MatrixShape(form=Format(form_number), rows=height, columns=width)
            part = slice(at, at + matrix.nbytes)
            assert (bench.contents(page.slot)[part] == bench.packed(asked)[part]).all()


def test_a_slot_left_half_full_is_filled_again(bench: Bench) -> None:
    """Its worker was killed in the middle; the successor must not trust what lies there."""
    page = bench.page(LAYER, 3)
    bench.page_in(page)
    clean = bench.contents(page.slot)
    bench.slots.begin(page.slot)
    bench.slots.memory[bench.slots.at(page.slot) :][:1000] = 0xEE
    bench.page_in(page)
    assert bench.slots.holds(page.slot, LAYER, 3)
    assert (bench.contents(page.slot) == clean).all()


def test_an_expert_fills_its_own_slot_only(bench: Bench) -> None:
    page = bench.page(LAYER, 3)
    before = bench.slots.memory.copy()
    bench.page_in(page)
    changed = np.flatnonzero(bench.slots.memory != before)
    header = bench.slots.headers.itemsize
    inside = (changed >= bench.slots.at(page.slot)) & (changed < bench.slots.at(page.slot + 1))
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
    worker = ExpertWorker(bench.slots, [fd])
    worker.configure(bench.shapes)
    with pytest.raises(ModelReadError, match=r"blk\.2\.ffn_"):
        worker.page_in(PageIn(seq=1, page=bench.page(LAYER, 3)))
    os.close(fd)
