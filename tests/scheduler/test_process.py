"""The scheduler process by itself: how it ends, and that it does so in time whatever sockets are open."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from sterna.runtime.config import embedded_model
from sterna.scheduler import messages as wire
from sterna.scheduler.assembly import EngineSettings
from sterna.scheduler.model.planner import read_plan
from sterna.scheduler.spec import SchedulerSpec, model_id
from sterna.shm.arena import Arena
from sterna.shm.slots import arena_nbytes
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.messages import Hello, encode

from ..workers.expert_bench import environment

PATIENT_S = 90  # a cold cache compiles
PROGRAM = """
import json, sys
from sterna.scheduler.process import run
sys.exit(run(json.loads(sys.argv[1]), json.loads(sys.argv[2])))
"""


class Stage:
    """Arenas, a daemon's socket, and a scheduler process."""

    def __init__(self, folder: Path, **changes: object) -> None:
        path = embedded_model()
        with GgufFile.open(path) as file:
            plan = read_plan(file)
        classes = plan.all_slots()
        settings = EngineSettings(classes=classes, streams=1, context=64, max_batch_tokens=16)
        sizes = {
            "weights": arena_nbytes(classes),
            "dense": plan.dense_arena_nbytes,
            "streams": settings.stream_shape(plan).layout().nbytes,
        }
        self.arenas = {name: Arena.create(name, nbytes) for name, nbytes in sizes.items()}
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.control = self.context.socket(zmq.ROUTER)
        self.control.setsockopt(zmq.LINGER, 0)
        self.control.bind(f"ipc://{folder}/control")
        self.lane_url = f"ipc://{folder}/lane"
        spec = SchedulerSpec(
            generation=1, model_path=str(path), model_id=model_id(str(path)),
            control_url=f"ipc://{folder}/control", lane_url=self.lane_url, workers=1, slots=classes,
            limits=[count for count, _ in classes], cache_dir="", context=64, streams=1,
            max_batch_tokens=16, threads=1, storage=plan.storage, value_nbytes=2,
            precisions=list(plan.precisions), assignment=[], prefetch="off", step_timeout_s=60.0,
            start_timeout_s=2.0,
        )  # fmt: skip
        spec = msgspec.structs.replace(spec, **changes)
        fds = {name: arena.fd for name, arena in self.arenas.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(msgspec.to_builtins(spec)), json.dumps(fds)],
            pass_fds=list(fds.values()), env=environment(), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def hear(self, message_type: type[msgspec.Struct]) -> msgspec.Struct:
        """Return the next message of a type."""
        while True:
            assert self.control.poll(PATIENT_S * 1000), "the scheduler says nothing"
            message = wire.decode_for_daemon(self.control.recv_multipart()[1])
            if isinstance(message, message_type):
                return message

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        if self.process.stderr is not None:
            self.process.stderr.close()
        self.control.close()
        self.context.term()
        for arena in self.arenas.values():
            arena.close()


@pytest.fixture
def worker_socket() -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        yield socket


def test_it_ends_in_time_with_its_sockets_open_and_says_why(
    tmp_path: Path, worker_socket: zmq.Socket[bytes]
) -> None:
    """Garbage from a worker ends it inside its loop; it stood there for ever once, waiting for a socket."""
    stage = Stage(tmp_path)
    worker_socket.connect(stage.lane_url)
    worker_socket.send(encode(Hello(index=0, incarnation=1, pid=stage.process.pid)))
    assert worker_socket.poll(PATIENT_S * 1000)  # it is told the shapes
    worker_socket.send(b"no message")
    trouble = stage.hear(wire.Trouble)
    began_s = time.monotonic()
    assert isinstance(trouble, wire.Trouble)
    assert trouble.code == "protocol"
    assert stage.process.wait(10) == 70
    assert time.monotonic() - began_s < 3.0
    assert stage.process.stderr is not None
    assert "scheduler.failed code=protocol" in stage.process.stderr.read()
    stage.close()


def test_a_start_without_workers_ends_in_time(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    trouble = stage.hear(wire.Trouble)
    assert isinstance(trouble, wire.Trouble)
    assert trouble.text == "worker 0 not there after 2 s"
    assert stage.process.wait(10) == 70
    stage.close()


def test_a_whole_engine_in_one_process_needs_no_worker(tmp_path: Path) -> None:
    stage = Stage(tmp_path, lane="local", lane_url="", workers=2)
    assert isinstance(stage.hear(wire.Ready), wire.Ready)
    stage.control.send_multipart([b"s1", wire.encode(wire.Query(nonce=7))])
    stats = stage.hear(wire.Stats)
    assert isinstance(stats, wire.Stats)
    assert (stats.nonce, stats.workers, stats.resident_experts) == (7, [0, 1], 80)
    stage.close()
