"""The scheduler process: its socket to the daemon, its life from the fork to the end, and its one loop.

One thread. Messages are taken between steps; a step blocks in the lane, whose waits are bounded. It ends by
SIGTERM's default action: what must survive lies in shared memory. What it does with what comes is `serving`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from ..shm.arena import Arena
from ..shm.errors import ModelFileError, SternaError
from ..shm.logs import log_to_stderr
from ..workers.checkpoint.file.gguf import GgufFile
from ..workers.kernels.measure import bandwidth
from ..workers.pinned import cpus_by_core
from . import messages as wire
from .assembly import EngineArenas, EngineSettings, assemble
from .decoder.crew import Crew, usable_cores
from .experts.routing_log import RoutingLog
from .lane.interface import ServedLane
from .lane.opening import open_lane
from .model.plan import ModelPlan
from .model.planner import read_plan
from .residency.saved_counts import SavedCounts
from .serving import PROGRESS_S, Serving, ServingLimits
from .spec import SchedulerSpec, model_id

log = logging.getLogger("sterna.scheduler")

IDLE_MS = 1000
PROBE_S = 0.2
LAST_WORDS_MS = 1000  # what the daemon still has to be told at the end


def run(spec: Mapping[str, object], fds: Mapping[str, int]) -> int:
    """Serve one daemon until killed; `fds`: "weights", "dense", "streams".

    Called by the nursery in the forked child. Returns an exit code when the engine cannot go on, after
    telling the daemon why; however it ends, it is gone a few LAST_WORDS_MS later.
    """
    settings = msgspec.convert(dict(spec), SchedulerSpec)
    log_to_stderr(settings.log_level)
    log.info(
        "scheduler.started generation=%d pid=%d lane=%s workers=%d",
        settings.generation, os.getpid(), settings.lane, settings.workers,
    )  # fmt: skip
    control = Control(settings)
    try:
        lane, serving = _load(settings, fds, control)
        _serve(control, lane, serving)
    except SternaError as error:
        log.error("scheduler.failed code=%s error=%r", error.code, str(error))
        control.send_last(wire.Trouble(code=error.code, text=str(error)))
        return error.exit_code
    finally:
        # Also the sockets that nobody closed: a context waits for them for ever otherwise.
        zmq.Context.instance().destroy(linger=LAST_WORDS_MS)


class Control:
    """The socket to the daemon."""

    def __init__(self, spec: SchedulerSpec) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, f"s{spec.generation}".encode())
        self._socket.setsockopt(zmq.SNDTIMEO, int(spec.step_timeout_s * 1000))
        self._socket.setsockopt(zmq.LINGER, LAST_WORDS_MS)
        self._socket.connect(spec.control_url)
        self._reported_s = 0.0

    def send(self, message: wire.ToDaemon) -> None:
        """Send to the daemon; a daemon that takes nothing for a whole step time-out ends this process."""
        self._socket.send(wire.encode(message))

    def send_last(self, message: wire.ToDaemon) -> None:
        """Send before the end; a daemon that takes nothing then finds out by the exit code."""
        self._socket.setsockopt(zmq.SNDTIMEO, LAST_WORDS_MS)
        with contextlib.suppress(zmq.Again):
            self.send(message)

    def report(self, what: str, done: int, total: int) -> None:
        """Say how much is loaded, not too often."""
        now_s = time.monotonic()
        if done == total or now_s - self._reported_s > PROGRESS_S:
            self._reported_s = now_s
            self.send(wire.Loading(what=what, done=done, total=total))

    def wait(self, sources: Sequence[Any], timeout_ms: int) -> None:
        """Return when there is something here or at one of `sources`, or when the time is up."""
        poller = zmq.Poller()
        for source in (self._socket, *sources):
            poller.register(source, zmq.POLLIN)
        poller.poll(timeout_ms)

    def arrived(self) -> Iterator[wire.ToScheduler]:
        """Yield the messages that are there."""
        while self._socket.poll(0, zmq.POLLIN):
            yield wire.decode_for_scheduler(self._socket.recv())


def _serve(control: Control, lane: ServedLane, serving: Serving) -> NoReturn:
    """Take events and run steps, for ever."""
    while True:
        # What was met inside a step is handled before anything is waited for: nothing wakes us for it.
        serving.settle()
        serving.keep()
        if not serving.has_step:
            control.wait(lane.sources(), IDLE_MS)
        for message in control.arrived():
            serving.take(message)
        lane.receive()
        serving.settle()
        serving.step()


# ---- loading ----


def _load(spec: SchedulerSpec, fds: Mapping[str, int], control: Control) -> tuple[ServedLane, Serving]:
    """Return lane and engine over the arenas, with dense weights; experts come as workers do.

    Raises ModelFileError or ModelReadError.
    """
    began_ns = time.monotonic_ns()
    file = GgufFile.open(spec.model_path)
    if model_id(spec.model_path) != spec.model_id:
        raise ModelFileError(f"{spec.model_path}: the file was changed while it was loaded")
    plan = read_plan(file, spec.storage, tuple(spec.precisions)).assigned(spec.assignment)
    weights = Arena.attach("weights", fds["weights"])
    arenas = EngineArenas(
        weights=weights.bytes,
        dense=Arena.attach("dense", fds["dense"]).bytes,
        streams=Arena.attach("streams", fds["streams"]).bytes,
        resizable=weights,
    )
    lane = open_lane(spec, plan, file, arenas.weights)
    counts = SavedCounts(spec.cache_dir, spec.model_id)
    routing_log = _open_routing_log(spec, plan)
    made = assemble(
        plan,
        file,
        arenas,
        lane,
        _engine_settings(spec),
        make_crew=lambda dense: _crew(dense, spec.threads or usable_cores()),
        counts=counts,
        log=routing_log,
        progress=control.report,
    )
    limits = ServingLimits(
        workers=spec.workers,
        max_batch_tokens=spec.max_batch_tokens,
        step_timeout_s=spec.step_timeout_s,
        start_timeout_s=spec.start_timeout_s,
        strict=spec.generation == 1,
    )
    serving = Serving(
        made,
        lane,
        limits,
        send=control.send,
        clock_ns=time.monotonic_ns,
        began_ns=began_ns,
        counts=counts,
        routing_log=routing_log,
    )
    return lane, serving


def _engine_settings(spec: SchedulerSpec) -> EngineSettings:
    return EngineSettings(
        classes=spec.slots,
        limits=spec.limits,
        workers=spec.workers,
        streams=spec.streams,
        context=spec.context,
        max_batch_tokens=spec.max_batch_tokens,
        value_nbytes=spec.value_nbytes,
        prefetch=spec.prefetch,
    )


def _open_routing_log(spec: SchedulerSpec, plan: ModelPlan) -> RoutingLog | None:
    """Return the trace that was asked for; a successor's has its number behind the name."""
    if not spec.trace:
        return None
    path = Path(spec.trace if spec.generation == 1 else f"{spec.trace}.{spec.generation}")
    return RoutingLog(path, plan, Path(spec.model_path).stem)


def _crew(dense: npt.NDArray[np.uint8], threads: int) -> Crew:
    """Return `threads` threads and with how many of them to read weights for one token: on some boards two.

    Measured over the dense weights themselves, unless a cache holds them and nothing streams.
    """
    cache = bandwidth.cache_nbytes(cpus_by_core())
    if threads < 2 or dense.size <= cache:
        return Crew(threads, threads)
    probed = dense[: bandwidth.buffer_nbytes(cache)]
    measured = bandwidth.measure(time.perf_counter, seconds=PROBE_S, max_threads=threads, buffer=probed)
    return Crew(threads, measured.streaming_threads())
