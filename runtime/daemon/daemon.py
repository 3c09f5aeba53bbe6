"""The daemon's life: load, start, announce, serve, drain, stop. It computes nothing itself.

    run -> open (file, lock) -> start (nursery, kernels, engine, door) -> serve -> stop

Exit codes are those of the errors (`shm.errors`); 0 after a requested stop, 128 + n after a second
signal n.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
import zmq

from ...scheduler.messages import Loading
from ...shm.errors import EngineLost, SternaError
from ..config import Config
from ..processes.nursery_wire import Warm
from ..processes.placement import NurseryPlacement
from ..processes.supervisor import Supervisor, WarmProgress
from ..protocol.sockets import ipc_path
from .announcement import Announcement, wished_context
from .engine.link import EngineLink
from .engine.processes import EngineProcesses
from .engine.recipes import EngineRecipes
from .model.model_memory import ModelMemory
from .model.served_model import ServedModel
from .notify import notify
from .serving_phase import LINGER_S, ServingPhase
from .socket_files import hold_lock, run_folder

log = logging.getLogger("sterna.daemon")

GRACE_S = 2.0


def serve(
    config: Config,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_ready: Callable[[Announcement], None] = Announcement.print_ready,
) -> int:
    """Run a daemon until it is told to stop; return its exit code.

    `on_progress(what, done, total)` is called while it starts, `on_ready` when it serves. Raises SternaError
    when it cannot start.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    faulthandler.register(signal.SIGUSR1)  # writes where every thread stands to stderr: docs/debugging.md
    return uvloop.run(Daemon(config, on_progress or _log_progress, on_ready).run())


class Daemon:
    """One daemon; `run` is its whole life."""

    def __init__(
        self,
        config: Config,
        on_progress: Callable[[str, int, int], None],
        on_ready: Callable[[Announcement], None],
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._signals: list[int] = []
        self._error: SternaError | None = None
        self._started_s = time.monotonic()
        self._serving: ServingPhase | None = None

    async def run(self) -> int:
        """Start, serve and stop; return the exit code. Raises what kept it from starting."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        with contextlib.ExitStack() as stack:
            model = ServedModel.load(self._config)
            stack.callback(model.close)
            lock_fd = stack.enter_context(hold_lock(ipc_path(self._config.socket)))
            memory = ModelMemory(model)
            stack.callback(memory.close)
            folder = stack.enter_context(run_folder(lock_fd))
            stack.callback(zmq.Context.instance().destroy, int(LINGER_S * 1000))
            try:
                async with asyncio.TaskGroup() as group:
                    await self._run_processes(model, memory, folder, group)
            except BaseExceptionGroup as errors:
                # What ended us comes first; the rest are tasks that ended with it.
                raise errors.exceptions[0] from None
        if self._error is not None:
            raise self._error
        return 128 + self._signals[1] if len(self._signals) > 1 else 0

    def _on_signal(self, number: int) -> None:
        log.info("daemon.signal signal=%s", signal.Signals(number).name)
        self._signals.append(number)
        self._stop.set()

    # ---- start and stop ----

    async def _run_processes(
        self, model: ServedModel, memory: ModelMemory, folder: Path, group: asyncio.TaskGroup
    ) -> None:
        """Start everything, serve until told to stop, and leave no process behind."""
        with contextlib.ExitStack() as stack:
            link = EngineLink(folder)
            stack.callback(link.close)
            supervisor = await Supervisor.start()
            try:
                processes = EngineProcesses(
                    # With the local lane the scheduler is its own workers.
                    0 if self._config.lane == "local" else model.wants.workers,
                    NurseryPlacement(supervisor),
                    EngineRecipes(self._config, model, memory, folder, link.url),
                    link,
                    group,
                    self._config.start_timeout_s,
                )
                stack.callback(processes.close)
                link.on_loading = self._on_loading
                processes.on_lost = partial(self._on_lost, supervisor)
                await self._unless_stopped(self._start_engine(model, supervisor, processes))
                if not self._stop.is_set():
                    serving = ServingPhase(self._config, model, memory, link, processes, group)
                    await self._serve(serving, model, supervisor, group)
            finally:
                stack.close()  # who is stopped must not be replaced
                await supervisor.stop_all(0.0 if len(self._signals) > 1 else GRACE_S)

    async def _start_engine(
        self, model: ServedModel, supervisor: Supervisor, processes: EngineProcesses
    ) -> None:
        def warmed(progress: WarmProgress) -> None:
            self._on_progress("kernels", progress.done, progress.total)

        notify("STATUS=compiling kernels")
        request = Warm(
            arguments={
                "matrix_types": sorted(model.plan.matrix_types),
                "conversion": bool(model.plan.assignment),
                "value_nbytes": model.streams_shape.value_nbytes,
            }
        )
        await supervisor.warm(warmed, self._config.start_timeout_s, request)
        notify("STATUS=loading the model")
        await processes.start()

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`, or give it up when a signal comes."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if task.done() and not task.cancelled():
            task.result()

    def _on_loading(self, loading: Loading) -> None:
        self._on_progress(loading.what, loading.done, loading.total)

    def _on_lost(self, supervisor: Supervisor, error: SternaError) -> None:
        """The engine is gone for good: say so to everybody and stop. The first cause is the exit code's."""
        if self._error is None:
            self._error = _nursery_error(supervisor) or error
            if self._serving is not None:
                self._serving.fail_all(EngineLost(str(self._error)))
        self._stop.set()

    async def _serve(
        self, serving: ServingPhase, model: ServedModel, supervisor: Supervisor, group: asyncio.TaskGroup
    ) -> None:
        self._serving = serving
        precision = "" if self._config.precision == "off" else self._config.precision
        own_pids = {"daemon": os.getpid(), "nursery": supervisor.nursery_pid}
        watch = group.create_task(self._watch_nursery(supervisor), name="nursery.watch")
        try:
            with serving.open_door(own_pids, self._started_s, self._stop.set):
                self._on_ready(
                    Announcement(
                        socket=self._config.socket,
                        name=model.facts.name,
                        context=model.context,
                        wished_context=wished_context(self._config, model.plan.hyper),
                        unused_precision="" if model.plan.assignment else precision,
                    )
                )
                notify(f"READY=1\nSTATUS=serving {model.facts.name}")
                log.info(
                    "daemon.ready model=%s workers=%d context=%d slots=%d experts=%d start_s=%.2f",
                    model.path, model.wants.workers, model.context, model.decision.num_slots,
                    model.plan.num_experts, time.monotonic() - self._started_s,
                )  # fmt: skip
                await self._stop.wait()
                notify("STOPPING=1\nSTATUS=draining")
                await serving.end(self._config.shutdown_timeout_s, lambda: len(self._signals) > 1)
        finally:
            watch.cancel()

    async def _watch_nursery(self, supervisor: Supervisor) -> None:
        await asyncio.wait([supervisor.lost])
        if (error := _nursery_error(supervisor)) is not None:
            self._on_lost(supervisor, error)


def _nursery_error(supervisor: Supervisor) -> EngineLost | None:
    """Return how the nursery was lost; its children's ends, which follow, are then no news."""
    if not supervisor.lost.done():
        return None
    status = supervisor.lost.result()
    return EngineLost(f"the fork server {status.describe()}, and all processes with it")


def _log_progress(what: str, done: int, total: int) -> None:
    log.info("daemon.loading what=%s done=%d total=%d", what, done, total)
