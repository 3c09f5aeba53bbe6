"""The embedded model, slots of its own and a worker over them; no test in here."""

from __future__ import annotations

import gc
import os
import select
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sterna.scheduler.model.planner import read_plan
from sterna.shm.arena import Arena
from sterna.shm.slots import SlotTable, arena_nbytes
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.held.formats import Format, MatrixShape
from sterna.workers.checkpoint.held.packing import pack_matrix
from sterna.workers.checkpoint.types.table import TENSOR_TYPES, dequantize
from sterna.workers.kernels.cache import cache_dir
from sterna.workers.messages import Configure, ExpertPage, Paged, PageIn, Trouble
from sterna.workers.paging.checksums import Checksums
from sterna.workers.paging.loader import ExpertLoader
from sterna.workers.paging.pager import Pager
from sterna.workers.paging.reading import ModelFile
from sterna.workers.serve import ExpertWorker

from .. import oracles

Bytes = npt.NDArray[np.uint8]
PATIENT_S = 60.0


def environment() -> dict[str, str]:
    """Return the environment for a process that runs kernels: it finds those compiled here."""
    return {**os.environ, "NUMBA_CACHE_DIR": str(cache_dir())}


class Bench:
    """A plan, an arena with `slots` slots (all experts by default, each in the slot of its key), a worker."""

    def __init__(self, path: Path, slots: int | None = None) -> None:
        self.file = GgufFile.open(path)
        self.plan = read_plan(self.file)
        (size,) = self.plan.slot_sizes()
        classes = [(slots or self.plan.num_experts, size)]
        self.arena = Arena.create("weights", arena_nbytes(classes))
        self.slots = SlotTable(self.arena.bytes, classes)
        self.shapes = Configure(layers=self.plan.layer_shapes())
        self.worker = ExpertWorker(self.slots, self.file.fds)
        self.worker.configure(self.shapes)

    def page(self, layer: int, expert: int, slot: int | None = None) -> ExpertPage:
        slot = self.plan.key_of(layer, expert) if slot is None else slot
        return self.plan.expert_page(self.file, layer, expert, slot)

    def page_in(self, *pages: ExpertPage) -> list[Paged]:
        return [self.worker.page_in(PageIn(seq=i, page=page)) for i, page in enumerate(pages)]

    def loader(
        self, *, direct: bool = True, checksums: Checksums | None = None, fd: int | None = None
    ) -> ExpertLoader:
        file = ModelFile(self.file.fd if fd is None else fd, direct=direct)
        loader = ExpertLoader(self.slots, file, checksums or Checksums())
        loader.layers = self.worker.loader.layers
        return loader

    def pager(self, threads: int = 2, *, direct: bool = True) -> Pager:
        return Pager(self.loader(direct=direct), threads)

    def contents(self, slot: int) -> Bytes:
        """Return a copy of what lies in a slot."""
        at = self.slots.at(slot)
        return self.slots.memory[at : at + self.slots.nbytes(slot)].copy()

    def packed(self, page: ExpertPage) -> Bytes:
        """Return what a slot has to hold, made from the file's bytes as they are now."""
        matrices = self.shapes.layers[page.layer].precisions[page.precision]
        out = np.zeros(self.slots.nbytes(page.slot), np.uint8)
        for slab, (form, rows, columns, at) in zip(page.slabs, matrices, strict=True):
            raw = np.frombuffer(os.pread(self.file.fd, slab.nbytes, slab.offset), np.uint8)
            shape = MatrixShape(form=Format(form), rows=rows, columns=columns)
            pack_matrix(raw, TENSOR_TYPES[slab.type_id], shape, out, at)
        return out

    def weights(self, layer: int, expert: int) -> list[oracles.F64]:
        """Return gate, up and down as numbers."""
        found = []
        for name in ("gate", "up", "down"):
            info = self.file.tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
            values = dequantize(info.type, self.file.data(info), info.shape)
            found.append(values[expert].astype(np.float64))
        return found

    def close(self) -> None:
        self.worker.loader.file.close()
        self.file.close()
        self.arena.close()
        # The mapping has a descriptor of its own, which goes with the last array over it.
        self.__dict__.clear()
        gc.collect()


def answers(pager: Pager, count: int) -> list[Paged | Trouble]:
    """Wait until `count` answers are there."""
    poller = select.poll()
    poller.register(pager.fd, select.POLLIN)
    found: list[Paged | Trouble] = []
    while len(found) < count:
        assert poller.poll(PATIENT_S * 1000), f"{len(found)} answers instead of {count}"
        found += pager.finished()
    return found
