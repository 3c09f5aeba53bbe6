"""Experts read by threads: what slots hold afterwards, who comes first, and what goes wrong."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sterna.runtime.config import embedded_model
from sterna.shm.slots import FILLING, READY
from sterna.workers import selftest
from sterna.workers.checkpoint.held.formats import Format
from sterna.workers.kernels.packing import repack
from sterna.workers.messages import Compute, ExpertPage, FileSlab, Paged, PageIn, Trouble
from sterna.workers.paging.checksums import Checksums
from sterna.workers.paging.loader import ExpertLoader, Part
from sterna.workers.paging.pager import Pager
from sterna.workers.paging.reading import ModelFile, Staging, staging_nbytes
from sterna.workers.paging.threads import COUNTS, calibrated_threads, choose

from ..expert_bench import Bench, Bytes, answers, environment
from ..kernels.packed import Tokens

LAYER = 2
IDLE_CLASS = 3


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    path = tmp_path / "model.gguf"
    shutil.copyfile(embedded_model(), path)
    made = Bench(path)
    yield made
    made.close()


class GatedLoader(ExpertLoader):
    """The loader, in front of which each page waits until the test lets it through."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.slots, ModelFile(bench.file.fd), Checksums())
        self.layers = bench.worker.loader.layers
        self.begun: list[int] = []  # experts
        self.idle: list[bool] = []  # whether each was begun at the lowest I/O priority
        self._begun = threading.Semaphore(0)
        self._gate = threading.Semaphore(0)

    def part(self, page: ExpertPage, index: int, staging: Staging) -> Part:
        self.begun.append(page.expert)
        self.idle.append(io_class() == IDLE_CLASS)
        self._begun.release()
        assert self._gate.acquire(timeout=10)
        return super().part(page, index, staging)

    def wait_begun(self) -> None:
        assert self._begun.acquire(timeout=10)

    def let(self, count: int) -> None:
        self._gate.release(count)


def io_class() -> int:
    """Return the I/O priority class of the calling thread."""
    number = 31 if platform.machine() == "aarch64" else 252  # ioprio_get
    return int(ctypes.CDLL(None).syscall(number, 1, 0)) >> 13


def asked(bench: Bench, expert: int, *, urgent: bool = True, slot: int | None = None) -> PageIn:
    return PageIn(seq=expert, page=bench.page(LAYER, expert, slot), urgent=urgent)


# ---- what slots hold ----


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_slots_hold_the_pack_of_the_files_bytes_after_any_sequence(threads: int, direct: bool) -> None:
    choice = random.Random(threads)
    bench = Bench(Path(embedded_model()), slots=6)
    pager = bench.pager(threads, direct=direct)
    hyper = bench.plan.hyper
    experts = [(layer, expert) for layer in hyper.moe_layers for expert in range(hyper.experts)]
    held: dict[int, ExpertPage] = {}
    packed: dict[tuple[int, int], Bytes] = {}
    for step in range(40):
        slots = choice.sample(range(6), choice.randint(1, 6))
        for slot, (layer, expert) in zip(slots, choice.sample(experts, len(slots)), strict=True):
            held[slot] = bench.page(layer, expert, slot)
            pager.submit(PageIn(seq=slot, page=held[slot], urgent=choice.random() < 0.7))
        found = answers(pager, len(slots))
        assert sorted(each.seq for each in found) == sorted(slots)
        assert all(isinstance(each, Paged) for each in found)
        for slot, page in held.items() if step % 8 == 7 else ():
            key = (page.layer, page.expert)
            if key not in packed:
                packed[key] = bench.packed(page)
            assert bench.slots.holds(slot, *key)
            assert (bench.contents(slot) == packed[key]).all()
    assert pager.outstanding == 0
    assert pager.staging_nbytes <= threads * staging_nbytes(max(slab.nbytes for slab in page.slabs))
    print(f"{pager.mode}, {pager.num_threads} threads, staging {pager.staging_nbytes} bytes")
    pager.close()
    bench.close()


@pytest.mark.parametrize("folder", ["/dev/shm", "/var/tmp"])  # memory and, mostly, a disk
def test_any_file_system_gives_the_same_bytes(folder: str) -> None:
    path = Path(folder) / f"sterna-test-{os.getpid()}.gguf"
    shutil.copyfile(embedded_model(), path)
    try:
        bench = Bench(path)
        slab = bench.page(LAYER, 3).slabs[1]
        size = path.stat().st_size
        pieces = [slab, FileSlab(size - 5, 5, 0, "tail"), FileSlab(size - 4096 * 3 - 1, 4097, 0, "near it")]
        for direct in (True, False):
            file = ModelFile(bench.file.fd, direct=direct)
            print(folder, file.mode)
            for piece in pieces:
                expected = os.pread(bench.file.fd, piece.nbytes, piece.offset)
                assert file.read(piece, Staging()).tobytes() == expected
            file.close()
        bench.close()
    finally:
        path.unlink()


def test_a_page_compiles_no_packer_that_the_self_test_has_not(bench: Bench) -> None:
    """Workers are forked with what the self-test compiled; a further variant would cost them a second."""
    selftest.check("TQ2_0", Format.TL1)
    before = len(repack.tq2_0.signatures)
    bench.loader().load(bench.page(LAYER, 3), Staging())
    assert len(repack.tq2_0.signatures) == before


def test_where_o_direct_is_refused_the_page_cache_is_used() -> None:
    fd = os.open("/proc/version", os.O_RDONLY)
    file = ModelFile(fd)
    assert file.mode == "buffered"
    assert file.read(FileSlab(6, 7, 0, "version"), Staging()).tobytes() == b"version"
    os.close(fd)


# ---- order ----


def test_what_is_awaited_comes_first_and_alone(bench: Bench) -> None:
    loader = GatedLoader(bench)
    pager = Pager(loader, 2)
    for expert, urgent in ((0, False), (1, False), (2, True), (3, False), (4, True)):
        pager.submit(asked(bench, expert, urgent=urgent))
        if expert == 0:
            loader.wait_begun()
    loader.wait_begun()
    assert loader.begun == [0, 2]  # a thread was kept free for it
    assert loader.idle == [True, False]
    loader.let(15)
    assert len(answers(pager, 5)) == 5
    assert sorted(loader.begun[2:7]) == [2, 2, 4, 4, 4]
    assert loader.begun[7:] == [0, 0, 1, 1, 1, 3, 3, 3]
    assert loader.idle[2:] == [False] * 5 + [True] * 8
    pager.close()


def test_a_quiet_request_that_somebody_awaits_hurries(bench: Bench) -> None:
    loader = GatedLoader(bench)
    pager = Pager(loader, 1)
    for expert, urgent in ((0, True), (1, False), (2, False)):
        pager.submit(asked(bench, expert, urgent=urgent))
    again = msgspec.structs.replace(asked(bench, 2), seq=20)
    pager.submit(again)
    loader.let(9)
    found = answers(pager, 4)
    assert [each.seq for each in found] == [0, 2, 20, 1]
    assert loader.begun == [0, 0, 0, 2, 2, 2, 1, 1, 1]
    nbytes = sum(slab.nbytes for slab in again.page.slabs)
    assert [each.nbytes for each in found if isinstance(each, Paged)] == [nbytes, nbytes, 0, nbytes]
    pager.close()


def test_a_slot_is_never_filled_by_two(bench: Bench) -> None:
    loader = GatedLoader(bench)
    pager = Pager(loader, 2)
    pager.submit(asked(bench, 0, slot=5))
    loader.wait_begun()
    pager.submit(asked(bench, 1, slot=5))
    (refused,) = answers(pager, 1)
    assert isinstance(refused, Trouble)
    assert (refused.seq, refused.code) == (1, "internal")
    assert "slot 5" in refused.text
    loader.let(3)
    assert isinstance(answers(pager, 1)[0], Paged)
    assert bench.slots.holds(5, LAYER, 0)
    pager.close()


def test_the_main_thread_computes_while_a_read_hangs(bench: Bench) -> None:
    bench.page_in(bench.page(LAYER, 3))
    loader = GatedLoader(bench)
    pager = Pager(loader, 1)
    pager.submit(asked(bench, 7))
    loader.wait_begun()
    x = np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)
    tokens = Tokens.quantized(x, 256)
    parts = (tokens.q, tokens.scales, tokens.sums, np.zeros(1, np.int32))
    slot = bench.plan.key_of(LAYER, 3)
    message = Compute(
        seq=1,
        layer=LAYER,
        precision=0,
        activation_kind=256,
        tokens=1,
        experts=[3],
        slots=[slot],
        starts=[0, 1],
    )
    _, rows = bench.worker.compute(message, [memoryview(part.tobytes()) for part in parts])
    assert np.abs(rows).max() > 0
    assert pager.finished() == []
    loader.let(3)
    assert isinstance(answers(pager, 1)[0], Paged)
    pager.close()


def test_several_threads_share_a_lone_expert(bench: Bench) -> None:
    loader = GatedLoader(bench)
    pager = Pager(loader, 4)
    pager.submit(asked(bench, 7))
    for _ in range(3):
        loader.wait_begun()  # the gate let none of them through yet
    loader.let(3)
    assert isinstance(answers(pager, 1)[0], Paged)
    assert (bench.contents(bench.plan.key_of(LAYER, 7)) == bench.packed(bench.page(LAYER, 7))).all()
    pager.close()


# ---- what goes wrong ----


def test_a_file_that_is_cut_short_is_named_and_the_next_page_comes(bench: Bench) -> None:
    good, cut = bench.page(1, 0), bench.page(LAYER, 3)
    size = cut.slabs[1].offset + 100
    os.truncate(bench.file.path, size)
    for direct in (True, False):
        pager = bench.pager(2, direct=direct)
        pager.submit(PageIn(seq=1, page=cut))
        pager.submit(PageIn(seq=2, page=good))
        trouble, paged = sorted(answers(pager, 2), key=lambda each: each.seq)
        assert isinstance(trouble, Trouble)
        assert trouble.code == "model_read"
        assert any(slab.tensor in trouble.text for slab in cut.slabs)
        assert f"ends at byte {size}" in trouble.text
        assert isinstance(paged, Paged)
        assert bench.slots.headers[cut.slot]["state"] == FILLING
        assert bench.slots.headers[good.slot]["state"] == READY
        pager.close()


def test_a_file_that_changes_is_noticed(bench: Bench) -> None:
    page = bench.page(LAYER, 3)
    slab = page.slabs[2]
    pager = bench.pager(1)
    pager.submit(PageIn(seq=1, page=page))
    assert isinstance(answers(pager, 1)[0], Paged)
    with Path(bench.file.path).open("r+b") as file:
        file.seek(slab.offset + slab.nbytes // 2)
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 1]))
    bench.slots.clear(page.slot)
    pager.submit(PageIn(seq=2, page=page))
    (trouble,) = answers(pager, 1)
    assert isinstance(trouble, Trouble)
    assert trouble.code == "model_read"
    assert trouble.text.startswith("blk.2 expert 3: the file's bytes changed since they were first read")
    assert bench.slots.headers[page.slot]["state"] == FILLING
    pager.close()


def test_bytes_that_arrive_wrong_once_are_read_again(bench: Bench) -> None:
    class Flaky(ModelFile):
        wrong = 0

        def read(self, slab: FileSlab, staging: Staging) -> Bytes:
            found = super().read(slab, staging)
            if self.wrong and slab == page.slabs[1]:
                self.wrong -= 1
                staging.view[slab.offset % 4096] ^= 1
            return found

    page = bench.page(LAYER, 3)
    file = Flaky(bench.file.fd)
    loader = ExpertLoader(bench.slots, file, Checksums())
    loader.layers = bench.worker.loader.layers
    nbytes, _ = loader.load(page, Staging())
    bench.slots.clear(page.slot)
    file.wrong = 1
    assert loader.load(page, Staging())[0] == 2 * nbytes
    assert (bench.contents(page.slot) == bench.packed(page)).all()
    file.close()


def test_a_bug_in_a_thread_ends_the_process_and_not_the_answers_alone(bench: Bench) -> None:
    pager = bench.pager(1)
    pager.submit(PageIn(seq=1, page=msgspec.structs.replace(bench.page(LAYER, 3), slabs=[1, 2, 3])))
    with pytest.raises(AttributeError):
        answers(pager, 1)
    pager.close()


# ---- how many threads ----


def test_as_few_threads_as_are_fast_enough() -> None:
    speeds = ([1.0, 0.9, 0.8, 0.9], [0.8, 1.2, 1.21, 1.2], [0.3, 0.6, 0.9, 0.95], [1, 2, 3, 4], [0.0] * 4)
    assert [choose(each) for each in speeds] == [1, 2, 3, 4, 1]


def test_the_number_of_threads_is_measured_once(bench: Bench, tmp_path: Path) -> None:
    file, page = ModelFile(bench.file.fd), bench.page(LAYER, 3)
    cache = tmp_path / "cache"
    first = calibrated_threads(file, str(cache), page)
    assert first in COUNTS
    if file.mode == "direct":
        kept = cache / "io-threads.json"
        text = kept.read_text()
        assert str(first) in text
        kept.write_text(text.replace(f" {first}", " 1"))
        assert calibrated_threads(file, str(cache), page) == 1
        for garbage in ("[]", text.replace(f" {first}", " 9"), "{", "\0"):
            kept.write_text(garbage)
            assert calibrated_threads(file, str(cache), page) in COUNTS
    assert calibrated_threads(file, "/proc/none", page) in COUNTS
    file.close()


def test_a_pager_without_a_number_asks_for_one(bench: Bench) -> None:
    pager = Pager(bench.loader(), 0, lambda page: 3 if page.expert == 3 else 1)
    for expert in (3, 7, 11, 12):
        pager.submit(asked(bench, expert))
    assert all(isinstance(each, Paged) for each in answers(pager, 4))
    assert pager.num_threads == 3
    pager.close()


# ---- killed while loading ----


def test_no_reader_sees_a_half_loaded_slot_however_its_loader_dies() -> None:
    """kill -9 at random moments, in a process of its own, which forks the loaders."""
    root = str(Path(__file__).parents[3])
    code = "from tests.workers.paging.stress import main; main(4.0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment(), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    print(done.stdout)
