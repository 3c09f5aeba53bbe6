"""The worker process: one DEALER socket to the scheduler, an `ExpertWorker` and a `Pager` behind it.

The main thread takes messages, computes and answers; the pager's threads read experts meanwhile.

It ends by SIGTERM's default action: nothing it holds is lost with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial

import msgspec
import zmq

from ..shm.arena import Arena
from ..shm.errors import SternaError
from ..shm.logs import log_to_stderr
from ..shm.slots import SlotTable
from .framing import split
from .messages import Compute, Configure, Hello, PageIn, Trouble, decode_for_worker, encode
from .paging.checksums import Checksums
from .paging.pager import Pager
from .paging.threads import calibrated_threads
from .serve import ExpertWorker
from .spec import WorkerSpec

log = logging.getLogger("sterna.worker")

SLICE_MS = 1000


def run(spec: Mapping[str, object], fds: Mapping[str, int]) -> int:
    """Serve one scheduler until killed; `fds`: "weights" (the arena), "model.0", "model.1"... (its files).

    Called by the nursery in the forked child; returns only if the socket fails.
    """
    worker = msgspec.convert(dict(spec), WorkerSpec)
    log_to_stderr(worker.log_level)
    arena = Arena.attach("weights", fds["weights"])
    slots = SlotTable(arena.bytes, worker.slots)
    checksums = Checksums(worker.cache_dir, worker.model_id, worker.model_path)
    files = [fds[f"model.{i}"] for i in range(sum(name.startswith("model.") for name in fds))]
    serve = ExpertWorker(slots, files, checksums)
    calibrate = partial(calibrated_threads, serve.loader.file, worker.cache_dir)
    pager = Pager(serve.loader, worker.io_threads, calibrate)
    with zmq.Context() as context, context.socket(zmq.DEALER) as lane:
        lane.setsockopt(zmq.LINGER, 0)
        lane.setsockopt(zmq.ROUTING_ID, f"w{worker.index}.{worker.incarnation}".encode())
        lane.connect(worker.lane_url)
        lane.send(encode(Hello(index=worker.index, incarnation=worker.incarnation, pid=os.getpid())))
        log.info("worker.started index=%d pid=%d reading=%s", worker.index, os.getpid(), pager.mode)
        both = zmq.Poller()
        both.register(lane, zmq.POLLIN)
        both.register(pager.fd, zmq.POLLIN)
        while True:
            # Looking at the socket alone costs half as much, and is what happens when all is in memory.
            if pager.outstanding:
                both.poll(SLICE_MS)
                for answer in pager.finished():
                    if isinstance(answer, Trouble):
                        log.debug("read.refused request=%d error=%r", answer.seq, answer.text)
                    lane.send(encode(answer))
            if lane.poll(0 if pager.outstanding else SLICE_MS):
                _answer(lane, serve, pager, lane.recv_multipart())


def _answer(lane: zmq.Socket[bytes], serve: ExpertWorker, pager: Pager, frames: list[bytes]) -> None:
    """Carry out one message; a SternaError becomes `trouble`, anything else ends the process."""
    message = decode_for_worker(frames[0])
    match message:
        case Configure():
            serve.configure(message)
        case PageIn():
            pager.submit(message)
        case Compute():
            try:
                outputs, rows = serve.compute(message, split(bytearray(frames[1])))
                lane.send_multipart([encode(outputs), rows.data])
            except SternaError as error:
                log.warning("batch.failed layer=%d error=%r", message.layer, str(error))
                lane.send(encode(Trouble(seq=message.seq, code=error.code, text=str(error))))
