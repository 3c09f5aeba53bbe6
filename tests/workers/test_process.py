"""A worker process behind its socket: experts come while it computes, and what fails is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from sterna.runtime.config import embedded_model
from sterna.scheduler.spec import model_id
from sterna.workers.framing import join
from sterna.workers.messages import (
    Compute,
    Outputs,
    Paged,
    PageIn,
    ToScheduler,
    ToWorker,
    Trouble,
    decode_for_scheduler,
    encode,
)
from sterna.workers.spec import WorkerSpec

from .expert_bench import Bench, environment
from .kernels.packed import Tokens

PATIENT_S = 90  # a cold cache compiles
PROGRAM = """
import json, sys
from sterna.workers.process import run
run(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
"""


class Stage:
    """A worker process and the socket that it talks to."""

    def __init__(self, folder: Path) -> None:
        path = folder / "model.gguf"
        if not path.exists():
            shutil.copyfile(embedded_model(), path)
        self.bench = Bench(path)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        url = f"ipc://{folder}/lane"
        self.socket.bind(url)
        spec = WorkerSpec(
            index=0,
            incarnation=1,
            lane_url=url,
            slots=[(self.bench.plan.num_experts, self.bench.slots.nbytes(0))],
            model_path=str(path),
            model_id=model_id(str(path)),
            cache_dir=str(folder / "cache"),
        )
        fds = {"weights": self.bench.arena.fd, "model.0": self.bench.file.fd}
        arguments = [json.dumps(msgspec.to_builtins(spec)), json.dumps(fds)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], pass_fds=list(fds.values()), env=environment()
        )
        self.hear()
        self.say(self.bench.shapes)

    def say(self, message: ToWorker, *frames: bytes) -> None:
        self.socket.send_multipart([b"w0.1", encode(message), *frames])

    def hear(self) -> ToScheduler:
        assert self.socket.poll(PATIENT_S * 1000), "the worker says nothing"
        message: ToScheduler = decode_for_scheduler(self.socket.recv_multipart()[1])
        return message

    def ask(self, layer: int, expert: int, *, urgent: bool = True) -> None:
        page = self.bench.page(layer, expert)
        self.say(PageIn(seq=page.slot, page=page, urgent=urgent))

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(10) == -15  # by SIGTERM's default action, whatever is being read
        self.socket.close()
        self.context.term()
        self.bench.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.close()


def computation(stage: Stage, seq: int) -> tuple[Compute, bytes]:
    """Return a request to expert 3 of layer 2, and its arrays."""
    x = np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)
    tokens = Tokens.quantized(x, 256)
    frame = join((tokens.q, tokens.scales, tokens.sums, np.zeros(1, np.int32)))
    slot = stage.bench.plan.key_of(2, 3)
    message = Compute(
        seq=seq, layer=2, precision=0, activation_kind=256, tokens=1, experts=[3], slots=[slot], starts=[0, 1]
    )
    return message, frame


def test_it_computes_and_answers_while_experts_come(stage: Stage) -> None:
    stage.ask(2, 3)
    assert isinstance(stage.hear(), Paged)
    hyper = stage.bench.plan.hyper
    wanted = {
        stage.bench.plan.key_of(layer, expert): (layer, expert)
        for layer in hyper.moe_layers
        for expert in range(hyper.experts)
        if (layer, expert) != (2, 3)
    }
    for number, (layer, expert) in enumerate(wanted.values()):
        stage.ask(layer, expert, urgent=number % 2 == 0)
        if number % 10 == 0:
            stage.say(computation(stage, 10_000 + number)[0], computation(stage, 0)[1])
    computed = len(range(0, len(wanted), 10))
    heard = [stage.hear() for _ in range(len(wanted) + computed)]
    paged = [each.seq for each in heard if isinstance(each, Paged)]
    assert sorted(paged) == sorted(wanted)
    outputs = [each.seq for each in heard if isinstance(each, Outputs)]
    assert outputs == [10_000 + number for number in range(0, len(wanted), 10)]
    assert max(i for i, each in enumerate(heard) if isinstance(each, Outputs)) < len(heard) - 1
    for key, (layer, expert) in list(wanted.items())[::16]:
        assert stage.bench.slots.holds(key, layer, expert)
        assert (stage.bench.contents(key) == stage.bench.packed(stage.bench.page(layer, expert))).all()


def test_what_fails_is_answered_and_the_worker_goes_on(stage: Stage) -> None:
    page = stage.bench.page(2, 3)
    os.truncate(stage.bench.file.path, page.slabs[0].offset + 10)
    message, frame = computation(stage, 7)
    stage.say(message, frame)
    refused = stage.hear()
    assert isinstance(refused, Trouble)
    assert (refused.seq, refused.code) == (7, "internal")
    stage.ask(2, 3)
    trouble = stage.hear()
    assert isinstance(trouble, Trouble)
    assert (trouble.seq, trouble.code) == (page.slot, "model_read")
    stage.ask(1, 0)
    assert isinstance(stage.hear(), Paged)


def test_checksums_outlive_the_process(tmp_path: Path) -> None:
    first = Stage(tmp_path)
    page = first.bench.page(2, 3)
    first.ask(2, 3)
    assert isinstance(first.hear(), Paged)
    first.close()
    assert list((tmp_path / "cache" / "checksums").iterdir())
    model = tmp_path / "model.gguf"
    times = model.stat()
    with model.open("r+b") as file:
        file.seek(page.slabs[0].offset)
        file.write(bytes(16))
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))  # a fault of the disk, not an edit
    second = Stage(tmp_path)
    second.ask(2, 3)
    trouble = second.hear()
    assert isinstance(trouble, Trouble)
    assert "the file's bytes changed since they were first read" in trouble.text
    second.close()
