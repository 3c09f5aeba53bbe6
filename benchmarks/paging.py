"""How fast cold experts get into their slots, against what the disk gives to plain O_DIRECT reads.

    python benchmarks/paging.py [MODEL.gguf] [--rounds 5] [--json FILE]

Without a model a file of the shape of a 30B mixture (hidden 2048, 1536 in an expert, TQ2_0) is written
to --folder first, 1 GB. Every figure is of random experts that are not in the page cache. Plain reads
and the pager take turns, because a disk that others use too has other speeds from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sterna.scheduler.model.planner import read_plan
from sterna.shm.slots import SlotTable, arena_nbytes
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.held.formats import Format, MatrixShape
from sterna.workers.checkpoint.held.samples import sample
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME
from sterna.workers.messages import Configure, ExpertPage, FileSlab, LayerShape, Paged, PageIn
from sterna.workers.paging.checksums import Checksums
from sterna.workers.paging.loader import ExpertLoader, shapes_of
from sterna.workers.paging.pager import Pager
from sterna.workers.paging.reading import ModelFile, Staging

HIDDEN, INNER, LAYERS, EXPERTS = 2048, 1536, 7, 64
SLOTS, WARM_UP = 16, 24
THREADS, WAITING = (1, 2, 3, 4), (1, 2, 8)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; bytes are those of the slabs, times of one expert from request to answer."""

    what: str
    threads: int
    waiting: int
    mb_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s_per_gb: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """Where the experts lie and what becomes of them."""

    fd: int
    pages: Sequence[ExpertPage]
    shapes: Configure
    slot_nbytes: int


def of_file(path: Path) -> Model:
    """Return the experts of a GGUF file."""
    file = GgufFile.open(path)
    plan = read_plan(file)
    pages = [plan.expert_page(file, layer, e, 0) for layer in plan.experts for e in range(plan.hyper.experts)]
    return Model(
        fd=os.open(path, os.O_RDONLY),
        pages=pages,
        shapes=Configure(layers=plan.layer_shapes()),
        slot_nbytes=plan.slot_sizes()[-1],
    )


def written(folder: Path) -> Model:
    """Write stacked tensors of ternary experts, at an offset of 32 bytes as in real files."""
    file_type = TYPES_BY_NAME["TQ2_0"]
    sizes = [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    handle, name = tempfile.mkstemp(prefix="sterna-paging-", suffix=".bin", dir=folder)
    os.unlink(name)  # noqa: PTH108 - goes with this process
    choice = np.random.default_rng(0)
    offset, starts = 32, {}
    os.pwrite(handle, bytes(32), 0)
    for layer in range(LAYERS):
        for projection, (rows, columns) in enumerate(sizes):
            starts[layer, projection] = offset
            raw = sample(file_type, rows, columns, choice, worst=False)
            for expert in range(EXPERTS):
                offset += os.pwrite(handle, np.roll(raw.reshape(-1, 66), expert, 0).tobytes(), offset)
    os.fsync(handle)
    matrices, at = [], 0
    for rows, columns in sizes:
        matrices.append((int(Format.TL1), rows, columns, at))
        at += MatrixShape(form=Format.TL1, rows=rows, columns=columns).nbytes
    nbytes = file_type.nbytes((INNER, HIDDEN))
    pages = [
        ExpertPage(
            layer, e, 0, 0,
            [
                FileSlab(starts[layer, p] + e * nbytes, nbytes, file_type.id, f"blk.{layer}.{p}")
                for p in range(3)
            ],
        )
        for layer in range(LAYERS) for e in range(EXPERTS)
    ]  # fmt: skip
    shape = LayerShape(d_model=HIDDEN, d_ff=INNER, precisions=[matrices])
    return Model(
        fd=handle, pages=pages, shapes=Configure(layers=dict.fromkeys(range(LAYERS), shape)), slot_nbytes=at
    )


class Draw:
    """Experts in random order, each once before any comes again; drops the page cache of the file."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._left: list[ExpertPage] = []
        self._lock = threading.Lock()
        self._choice = random.Random(1)  # noqa: S311 - which experts
        os.posix_fadvise(model.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def next(self) -> ExpertPage:
        """Return the next expert."""
        with self._lock:
            if not self._left:
                self._left = self._choice.sample(self._model.pages, len(self._model.pages))
            return self._left.pop()


def timed(what: str, threads: int, waiting: int, run: Callable[[], tuple[int, list[int]]]) -> Row:
    """Return the row of `run`, which returns bytes and the ns of each expert."""
    before, began_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    nbytes, times = run()
    seconds, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    p50, p99 = np.percentile(np.array(times) / 1e6, [50, 99]).tolist()
    return Row(
        what=what, threads=threads, waiting=waiting, mb_per_s=nbytes / seconds / 1e6, p50_ms=p50, p99_ms=p99,
        cpu_s_per_gb=cpu / (nbytes / 1e9),
    )  # fmt: skip


def plain(model: Model, threads: int, seconds: float) -> Row:
    """Read experts with `threads` threads and do nothing with them."""
    file, draw = ModelFile(model.fd), Draw(model)

    def run() -> tuple[int, list[int]]:
        times: list[int] = []
        done = [0] * threads
        end = time.perf_counter() + seconds

        def read(index: int) -> None:
            staging = Staging()
            while (began_ns := time.perf_counter_ns()) < end * 1e9:
                for slab in draw.next().slabs:
                    done[index] += file.read(slab, staging).nbytes
                times.append(time.perf_counter_ns() - began_ns)

        readers = [threading.Thread(target=read, args=(i,)) for i in range(threads)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(seconds + 10)
        return sum(done), times

    row = timed(f"read {file.mode}", threads, threads, run)
    file.close()
    return row


def paged(model: Model, threads: int, waiting: int, seconds: float) -> Row:
    """Bring experts into slots, `waiting` requests at a time."""
    classes = [(SLOTS, model.slot_nbytes)]
    memory = np.zeros(arena_nbytes(classes), np.uint8)
    memory[::4096] = 1  # have it
    memory[::4096] = 0
    file, checksums, draw = ModelFile(model.fd), Checksums(), Draw(model)
    loader = ExpertLoader(SlotTable(memory, classes), file, checksums)
    loader.layers = shapes_of(model.shapes)
    pager = Pager(loader, threads)
    poller = select.poll()
    poller.register(pager.fd, select.POLLIN)

    def turn(slots: list[int]) -> list[Paged]:
        """Ask for another expert in each slot and return what is there meanwhile."""
        for slot in slots:
            page = draw.next()
            pager.submit(PageIn(seq=slot, page=ExpertPage(page.layer, page.expert, slot, 0, page.slabs)))
        poller.poll(1000)
        answers = pager.finished()
        for answer in answers:
            if not isinstance(answer, Paged):
                raise SystemExit(answer.text)
        return [answer for answer in answers if isinstance(answer, Paged)]

    def run() -> tuple[int, list[int]]:
        times: list[int] = []
        nbytes, end = 0, time.perf_counter() + seconds
        free = warm
        while time.perf_counter() < end:
            answers = turn(free)
            free = [answer.seq for answer in answers]
            nbytes += sum(answer.nbytes for answer in answers)
            times += [answer.busy_ns for answer in answers]
        return nbytes, times

    warm = list(range(waiting))
    for _ in range(WARM_UP):
        warm = [answer.seq for answer in turn(warm)]
    row = timed(f"page in {pager.mode}", threads, waiting, run)
    pager.close()
    file.close()
    return row


def one_round(model: Model, seconds: float) -> list[Row]:
    """Measure everything once."""
    rows = []
    for threads in THREADS:
        rows.append(plain(model, threads, seconds))
        rows += [paged(model, threads, waiting, seconds) for waiting in WAITING]
    return rows


def median(rows: Sequence[Row]) -> Row:
    """Return the medians of several measurements of the same."""

    def middle(name: str) -> float:
        return float(np.median([getattr(row, name) for row in rows]))

    return replace(
        rows[0],
        mb_per_s=middle("mb_per_s"),
        p50_ms=middle("p50_ms"),
        p99_ms=middle("p99_ms"),
        cpu_s_per_gb=middle("cpu_s_per_gb"),
    )


def share(rows: Sequence[Row], threads: int) -> float:
    """Return the speed of a busy pager with `threads` threads as a share of the best plain reads."""
    disk = max(row.mb_per_s for row in rows if row.what.startswith("read"))
    busy = next(r for r in rows if r.what[:4] == "page" and (r.threads, r.waiting) == (threads, max(WAITING)))
    return busy.mb_per_s / disk


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each row of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))  # noqa: S108 - a disk
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = of_file(options.model) if options.model else written(options.folder)
    size = sum(slab.nbytes for slab in model.pages[0].slabs)
    print(f"{len(model.pages)} experts of {size / 1e6:.2f} MB, medians of {options.rounds} rounds")
    rounds = [one_round(model, options.seconds) for _ in range(options.rounds)]
    rows = [median(same) for same in zip(*rounds, strict=True)]
    print(f"{'':16} threads waiting   MB/s   p50 ms  p99 ms  CPU s/GB")
    for row in rows:
        print(
            f"{row.what:16} {row.threads:7} {row.waiting:7} {row.mb_per_s:6.0f} {row.p50_ms:8.2f}"
            f" {row.p99_ms:7.2f} {row.cpu_s_per_gb:9.3f}"
        )
    for threads in THREADS:
        shares = [share(each, threads) for each in rounds]
        print(f"{threads} threads: of the best plain reads of its round {np.median(shares):.0%}", end=" ")
        print(", ".join(f"{each:.0%}" for each in sorted(shares)))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
