"""The daemon's life: load, start, announce, serve, drain, stop. It computes nothing itself.

    run -> open (file, lock) -> start (nursery, kernels, engine, door) -> serve -> stop

Exit codes are those of the errors (`shm.errors`); 0 after a requested stop, 128 + n after a second
signal n.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import uvloop
import zmq

import sterna

from ...scheduler.messages import Loading
from ...shm.errors import AlreadyRunning, EngineLost, NotPermitted, ShuttingDown, SternaError
from ..config import Config
from ..processes.nursery_wire import Warm
from ..processes.placement import NurseryPlacement
from ..processes.supervisor import Supervisor, WarmProgress
from ..protocol import codec
from ..protocol.messages import Limits, Welcome
from ..protocol.sockets import ipc_path, server_socket
from .announcement import Announcement, wished_context
from .endpoint import Endpoint
from .engine_link import EngineLink
from .engine_processes import EngineProcesses
from .engine_recipes import EngineRecipes
from .loaded_model import LoadedModel
from .memory_control import MemoryControl
from .notify import notify
from .service import Service
from .status import report

log = logging.getLogger("sterna.daemon")

GRACE_S = 2.0
# So long the last messages to clients that do not read them hold up the end.
LINGER_S = 0.5
RUN_FOLDER_PREFIX = "sterna-"


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
        self._idle = asyncio.Event()
        self._signals: list[int] = []
        self._error: SternaError | None = None
        self.started_s = time.monotonic()

    async def run(self) -> int:
        """Start, serve and stop; return the exit code. Raises what kept it from starting."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        with contextlib.ExitStack() as stack:
            self.model = LoadedModel(self._config)
            self.num_workers = self.model.wants.workers
            stack.callback(self.model.close)
            lock_fd = stack.enter_context(_lock(ipc_path(self._config.socket)))
            self.model.allocate()
            folder = stack.enter_context(_run_folder(lock_fd))
            stack.callback(zmq.Context.instance().destroy, int(LINGER_S * 1000))
            try:
                async with asyncio.TaskGroup() as group:
                    await self._run_processes(folder, group)
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

    async def _run_processes(self, folder: Path, group: asyncio.TaskGroup) -> None:
        """Start everything, serve until told to stop, and leave no process behind."""
        self.supervisor = await Supervisor.start()
        try:
            await self._unless_stopped(self._start_engine(folder, group))
            if not self._stop.is_set():
                await self._serve(group)
        finally:
            if hasattr(self, "processes"):
                self.processes.close()
                self.engine.close()
            await self.supervisor.stop_all(0.0 if len(self._signals) > 1 else GRACE_S)

    async def _start_engine(self, folder: Path, group: asyncio.TaskGroup) -> None:
        def warmed(progress: WarmProgress) -> None:
            self._on_progress("kernels", progress.done, progress.total)

        notify("STATUS=compiling kernels")
        plan = self.model.plan
        request = Warm(
            arguments={
                "kinds": sorted(plan.kinds),
                "conversion": bool(plan.assignment),
                "value_nbytes": self.model.streams_shape.value_nbytes,
            }
        )
        await self.supervisor.warm(warmed, self._config.start_timeout_s, request)
        self.engine = EngineLink(folder)
        self.engine.on_loading = self._on_loading
        self.processes = EngineProcesses(
            self.num_workers,
            NurseryPlacement(self.supervisor),
            EngineRecipes(self._config, self.model, folder, self.engine.url),
            self.engine,
            group,
            self._config.start_timeout_s,
        )
        self.processes.on_lost = self._on_lost
        notify("STATUS=loading the model")
        await self.processes.start()

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

    def _on_lost(self, error: SternaError) -> None:
        """The engine is gone for good: say so to everybody and stop. The first cause is the exit code's."""
        if self._error is None:
            self._error = self._nursery_error() or error
            if hasattr(self, "service"):
                self.service.fail_all(EngineLost(str(self._error)))
        self._stop.set()

    # ---- serving ----

    async def _serve(self, group: asyncio.TaskGroup) -> None:
        self.memory = MemoryControl(self.model, self.engine)
        self.endpoint = Endpoint(
            _bind(self._config.socket),
            self.model.tokenizer,
            self._welcome(),
            self._report,
            self._drain_and_stop,
            self.memory.resize,
            group,
        )
        budget = self._config.quality_fraction if self._config.routing == "budget" else 0.0
        self.service = Service(self._config, self.model, self.engine, self.endpoint.send, budget)
        self.service.on_idle = self._idle.set
        self.processes.has_work = lambda: self.service.num_running > 0
        self.endpoint.attach(self.service)
        probe = group.create_task(self.endpoint.probe(), name="endpoint.probe")
        watches = [group.create_task(self._watch_nursery(), name="nursery.watch")]
        if self._config.memory_pressure == "auto":
            watches.append(group.create_task(self.memory.watch(), name="memory.watch"))
        self._on_ready(
            Announcement(
                socket=self._config.socket,
                name=self.model.facts.name,
                context=self.model.context,
                wished_context=wished_context(self._config, self.model.plan.hyper),
            )
        )
        notify(f"READY=1\nSTATUS=serving {self.model.facts.name}")
        log.info(
            "daemon.ready model=%s workers=%d context=%d slots=%d experts=%d start_s=%.2f",
            self.model.path, self.num_workers, self.model.context, self.model.decision.num_slots,
            self.model.plan.num_experts, time.monotonic() - self.started_s,
        )  # fmt: skip
        try:
            await self._stop.wait()
            notify("STOPPING=1\nSTATUS=draining")
            self.endpoint.say_goodbye()
            await self._drain_within(self._config.shutdown_timeout_s)
        finally:
            probe.cancel()
            for watch in watches:
                watch.cancel()
            self.endpoint.close(LINGER_S)

    async def _watch_nursery(self) -> None:
        await asyncio.wait([self.supervisor.lost])
        if (error := self._nursery_error()) is not None:
            self._on_lost(error)

    def _nursery_error(self) -> EngineLost | None:
        """Return how the nursery was lost; its children's ends, which follow, are then no news."""
        if not self.supervisor.lost.done():
            return None
        status = self.supervisor.lost.result()
        return EngineLost(f"the fork server {status.describe()}, and all processes with it")

    async def _drain(self) -> None:
        """Take nothing new, and return when nothing runs."""
        self.service.draining = True
        while self.service.num_running or self.service.num_waiting:
            self._idle.clear()
            await self._idle.wait()

    async def _drain_and_stop(self) -> None:
        """Do what a client asked for with `drain`; the answer to it leaves before the daemon stops."""
        await self._drain()
        self._stop.set()

    async def _drain_within(self, timeout_s: float) -> None:
        """Drain, at most so long and only until a second signal; what is left then fails."""
        draining = asyncio.ensure_future(self._drain())
        deadline = time.monotonic() + timeout_s
        while not draining.done() and time.monotonic() < deadline and len(self._signals) < 2:
            await asyncio.wait([draining], timeout=0.05)
        draining.cancel()
        self.service.fail_all(ShuttingDown("the daemon stopped before the answer was complete"))

    def _welcome(self) -> Welcome:
        return Welcome(
            version=sterna.__version__,
            model=self.model.facts,
            limits=Limits(
                max_frame_bytes=codec.MAX_FRAME_BYTES,
                max_queue=self._config.max_queue,
                max_sequences=self.model.streams_shape.streams,
            ),
        )

    async def _report(self) -> dict[str, Any]:
        engine = await self.engine.stats()
        status = report(
            service=self.service,
            model=self.model,
            presence=self.processes.presence(),
            door=self.endpoint.figures(),
            engine=engine,
            own_pids={"daemon": os.getpid(), "nursery": self.supervisor.nursery_pid},
            started_s=self.started_s,
            now_s=time.monotonic(),
        )
        return status.to_body()


def _log_progress(what: str, done: int, total: int) -> None:
    log.info("daemon.loading what=%s done=%d total=%d", what, done, total)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int]:
    """Hold the lock beside the socket and yield it; a second bind of an ipc path would silently steal it.

    Raises AlreadyRunning, or NotPermitted when the folder cannot be written. The socket goes at the
    end, the lock file stays: removing it would let two daemons hold two locks.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotPermitted(f"cannot make the socket's lock {path}.lock: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"another daemon serves ipc://{path}") from None
        try:
            yield fd
        finally:
            with contextlib.suppress(OSError):  # there may be something else in its place
                path.unlink()
    finally:
        os.close(fd)


@contextlib.contextmanager
def _run_folder(lock_fd: int) -> Iterator[Path]:
    """Yield a fresh folder for the inner sockets and remove it at the end.

    Its name stands in the lock file: one that a killed daemon left is removed by the next on that socket.
    """
    left = Path(os.fsdecode(os.pread(lock_fd, 4096, 0)))
    if left.name.startswith(RUN_FOLDER_PREFIX) and left.is_dir() and left.stat().st_uid == os.getuid():
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=RUN_FOLDER_PREFIX))
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, os.fsencode(folder), 0)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.ftruncate(lock_fd, 0)


def _bind(url: str) -> zmq.Socket[bytes]:
    """Return the clients' ROUTER socket; its file has the mode that the umask gives, at most 0660."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = server_socket(context)
    before = os.umask(os.umask(0o077) | 0o007)
    try:
        socket.bind(url)
    except zmq.ZMQError as error:
        socket.close()
        raise NotPermitted(f"cannot listen on {url}: {error.strerror}") from error
    finally:
        os.umask(before)
    return socket
