"""The worker process: one DEALER socket to the scheduler, one `ExpertWorker` behind it.

It ends by SIGTERM's default action: nothing it holds is lost with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec
import zmq

from ..shm.arena import Arena
from ..shm.errors import InternalError, SternaError
from ..shm.slots import SlotTable
from .framing import split
from .messages import Compute, Configure, Hello, PageIn, ToScheduler, Trouble, decode_for_worker, encode
from .serve import ExpertWorker
from .spec import WorkerSpec

SLICE_MS = 1000


def run(spec: Mapping[str, object], fds: Mapping[str, int]) -> int:
    """Serve one scheduler until killed; `fds`: "weights" (the arena) and "model" (the file).

    Called by the nursery in the forked child; returns only if the socket fails.
    """
    worker = msgspec.convert(dict(spec), WorkerSpec)
    arena = Arena.attach("weights", fds["weights"])
    slots = SlotTable(arena.bytes, worker.slots)
    serve = ExpertWorker(slots, fds["model"])
    with zmq.Context() as context, context.socket(zmq.DEALER) as lane:
        lane.setsockopt(zmq.LINGER, 0)
        lane.setsockopt(zmq.ROUTING_ID, f"w{worker.index}.{worker.generation}".encode())
        lane.connect(worker.lane_url)
        lane.send(encode(Hello(index=worker.index, generation=worker.generation, pid=os.getpid())))
        while True:
            if lane.poll(SLICE_MS):
                _answer(lane, serve, lane.recv_multipart())


def _answer(lane: zmq.Socket[bytes], serve: ExpertWorker, frames: list[bytes]) -> None:
    """Carry out one message; a SternaError becomes `trouble`, anything else ends the process."""
    message = decode_for_worker(frames[0])
    try:
        match message:
            case Configure():
                serve.configure(message)
            case Compute():
                outputs, rows = serve.compute(message, split(bytearray(frames[1])))
                lane.send_multipart([encode(outputs), rows.data])
            case PageIn():
                lane.send(encode(serve.page_in(message)))
    except SternaError as error:
        lane.send(encode(_trouble(message, error)))


def _trouble(message: Configure | Compute | PageIn, error: SternaError) -> ToScheduler:
    if isinstance(message, Configure):
        raise InternalError("a worker cannot take its configuration") from error
    return Trouble(seq=message.seq, code=error.code, text=str(error))
