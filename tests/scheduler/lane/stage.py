"""A ZeroMQ lane over the embedded model with real worker processes, and a scripted peer; no test here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from sterna.runtime.config import embedded_model
from sterna.scheduler.lane.interface import Computed, Loaded, WorkerBatch
from sterna.scheduler.lane.presence import Presence
from sterna.scheduler.lane.roster import Change, FillSlots, Join, Leave, SlotsFilled
from sterna.scheduler.lane.zeromq import ZmqLane
from sterna.scheduler.model.planner import read_plan
from sterna.shm.arena import Arena
from sterna.shm.slots import SlotTable, arena_nbytes
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.kernels.layers.activations import QuantizedRows
from sterna.workers.messages import Compute, Configure, Hello, PageIn, decode_for_worker, encode
from sterna.workers.serve import ExpertWorker

# A cold cache makes the first compute wait for the compiler.
PATIENT_S, START_S = 90.0, 30.0
LAYER, D_MODEL = 2, 256
PROGRAM = """
import json, sys
from sterna.workers.process import run
run(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
"""
Floats = npt.NDArray[np.float32]


class Stage:
    """A model, an arena, a lane, and the workers that were started on it."""

    def __init__(self, folder: Path, timeout_s: float, presence: Presence | None = None) -> None:
        path = folder / "model.gguf"
        shutil.copyfile(embedded_model(), path)
        self.file = GgufFile.open(path)
        self.plan = read_plan(self.file)
        plan = self.plan
        self.arena = Arena.create("weights", arena_nbytes(plan.all_slots()))
        self.slots = SlotTable(self.arena.bytes, plan.all_slots())
        self.url = f"ipc://{folder}/lane.sock"
        self.configure = Configure(layers=plan.layer_shapes())
        self.lane = ZmqLane(self.url, self.configure, D_MODEL, timeout_s, presence)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, index: int, incarnation: int = 0) -> subprocess.Popen[bytes]:
        """Start a real worker; it joins when it has said hello."""
        spec = {
            "index": index, "incarnation": incarnation, "lane_url": self.url,
            "slots": self.plan.all_slots(), "model_path": str(self.file.path), "model_id": (0, 0, 0, 0),
            "cache_dir": "",
        }  # fmt: skip
        fds = {"weights": self.arena.fd, "model.0": self.file.fd}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(spec), json.dumps(fds)], pass_fds=list(fds.values())
        )
        self.processes.append(process)
        return process

    def join(self, *indices: int) -> None:
        """Wait until exactly these workers have joined."""
        waiting, until_s = set(indices), time.monotonic() + START_S
        while waiting:
            assert time.monotonic() < until_s, f"worker {waiting} did not come"
            self.wait(100)
            waiting -= {change.worker for change in self.settle() if isinstance(change, Join)}

    def wait(self, timeout_ms: int) -> bool:
        """Return whether something has come to the lane in time."""
        poller = zmq.Poller()
        for source in self.lane.sources():
            poller.register(source, zmq.POLLIN)
        return bool(poller.poll(timeout_ms))

    def settle(self) -> list[Join | Leave]:
        """Return who has joined and left; there is nothing to be read before one may join."""
        self.lane.receive()
        found: list[Change] = []
        while changes := self.lane.changes():
            found += changes
            peers = tuple(change.peer for change in changes if isinstance(change, FillSlots))
            self.lane.tell(SlotsFilled(peers=peers))
        return [change for change in found if not isinstance(change, FillSlots)]

    def batch(self, worker: int, pairs: dict[int, list[int]], seed: int = 1) -> WorkerBatch:
        """Return a batch of random rows for {expert: rows}."""
        count = 1 + max(row for rows in pairs.values() for row in rows)
        q = QuantizedRows.allocate(count, D_MODEL, 256)
        q.fill(np.random.default_rng(seed).standard_normal((count, D_MODEL)).astype(np.float32), count)
        return WorkerBatch(
            worker=worker,
            layer=LAYER,
            precision=0,
            activation_kind=256,
            experts=list(pairs),
            slots=[self.plan.key_of(LAYER, expert) for expert in pairs],
            starts=np.concatenate(([0], np.cumsum([len(rows) for rows in pairs.values()]))).tolist(),
            rows=np.array([row for rows in pairs.values() for row in rows], np.int32),
            activations=(q.q, q.scales, q.sums),
        )

    def page_in(self, worker: int, *experts: int) -> None:
        """Have `worker` read experts of LAYER in, each into the slot of its key; raises what it met."""
        waiting = {
            self.lane.page_in(
                worker,
                self.plan.expert_page(self.file, LAYER, expert, self.plan.key_of(LAYER, expert)),
                urgent=True,
            )
            for expert in experts
        }
        while waiting:
            answer = self.lane.collect((), waiting, "a test")
            assert isinstance(answer, Loaded)
            waiting.remove(answer.seq)
            if answer.error is not None:
                raise answer.error

    def exchange(
        self, batches: Sequence[WorkerBatch], meanwhile: Callable[[], object] = lambda: None
    ) -> list[Floats]:
        """Have all batches computed and return their outputs in the order of the batches."""
        waiting = [self.lane.compute(batch) for batch in batches]
        meanwhile()
        found: dict[int, Floats] = {}
        try:
            while len(found) < len(waiting):
                answer = self.lane.collect(set(waiting) - set(found), (), f"layer {LAYER}")
                assert isinstance(answer, Computed)
                found[answer.seq] = answer.rows
        except BaseException:
            self.lane.give_up()
            raise
        return [found[seq] for seq in waiting]

    def expected(self, batch: WorkerBatch) -> Floats:
        """Return what an in-process worker makes of `batch`."""
        worker = ExpertWorker(self.slots, self.file.fds)
        worker.configure(self.configure)
        message = Compute(
            seq=0, layer=batch.layer, precision=0, activation_kind=batch.activation_kind,
            tokens=len(batch.activations[0]), experts=batch.experts, slots=batch.slots, starts=batch.starts,
        )  # fmt: skip
        arrays = (*batch.activations, batch.rows)
        return worker.compute(message, [memoryview(array.tobytes()) for array in arrays])[1].copy()

    def close(self) -> None:
        self.lane.close()
        for process in self.processes:
            process.kill()
            process.wait(START_S)
        self.arena.close()
        self.file.close()


class Peer:
    """Says what it is told to; its process is a sleeping one, so that it can die."""

    def __init__(self, stage: Stage, index: int, identity: bytes = b"") -> None:
        self.process = subprocess.Popen(["sleep", "600"])
        stage.processes.append(self.process)
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.setsockopt(zmq.ROUTING_ID, identity or f"peer {index}".encode())
        self.socket.connect(stage.url)
        self.hello = Hello(index=index, incarnation=0, pid=self.process.pid)

    def say(self, message: msgspec.Struct, *frames: bytes) -> None:
        self.socket.send_multipart([encode(message), *frames])

    def hear(self) -> tuple[Configure | Compute | PageIn, list[bytes]]:
        assert self.socket.poll(5000), "the lane sent nothing"
        first, *frames = self.socket.recv_multipart()
        return decode_for_worker(first), frames

    def computation(self) -> Compute:
        """Return the next `compute`, which must come."""
        message, _ = self.hear()
        assert isinstance(message, Compute)
        return message

    def close(self) -> None:
        self.socket.close()
        self.context.term()
