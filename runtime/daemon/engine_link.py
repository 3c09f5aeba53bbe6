"""The daemon's link to its scheduler and workers: starting, feeding, replacing them.

A worker that dies is replaced and finds its experts in the arena; the scheduler repeats the step. A
scheduler that dies is replaced together with the workers, in a new lane, and is told of all running
streams again: their tokens and KV lie in memory that belongs to this process.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ...scheduler import messages as wire
from ...scheduler.spec import SchedulerSpec
from ...shm.errors import EngineLost, OutOfResources, StartFailed, SternaError, error_of
from ...workers.spec import WorkerSpec
from ...workers.user_cache import user_cache
from ..config import Config
from ..processes.child import Child
from ..processes.supervisor import Supervisor
from .loaded_model import LoadedModel
from .presence import EnginePresence
from .socket_reader import SocketReader

log = logging.getLogger("sterna.engine")

SPAWN_TIMEOUT_S = 20.0
QUERY_TIMEOUT_S = 1.0
# A step ends and reads that are under way come to their end before slots change.
RESIZE_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 2.0
MAX_DEATHS = 3
BACKOFF_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
# A process that lived so long did not die of its start.
STABLE_S = 10.0
LAST_WORDS_S = 0.2


class EngineLink:
    """One scheduler with `workers` workers, kept alive.

    on_step and on_failed are called in the loop with what the scheduler says; on_restart when a new
    scheduler is ready and wants the running streams submitted again; on_lost when the engine cannot
    be kept alive.
    """

    def __init__(
        self,
        config: Config,
        model: LoadedModel,
        supervisor: Supervisor,
        folder: Path,
        workers: int,
        group: asyncio.TaskGroup,
    ) -> None:
        self._config = config
        self._model = model
        self._supervisor = supervisor
        self._folder = folder
        self._num_workers = workers
        self._group = group
        self._loop = asyncio.get_running_loop()
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._control_url = f"ipc://{folder}/control.sock"
        socket.bind(self._control_url)
        self._control = SocketReader(socket, self._on_frames)
        self._generation = 0
        self._ready: asyncio.Future[None] | None = None
        self._serving = False  # a scheduler is there and knows of the running streams
        self._stats: asyncio.Future[wire.Stats] | None = None
        self._resizing: asyncio.Future[wire.Resized] | None = None
        self._cancelled: dict[int, Callable[[], None]] = {}  # by the nonce of the query behind the cancel
        self._tasks: set[asyncio.Task[None]] = set()
        self._nonce = 0
        self._stopping = False
        self._deaths = 0
        self._worker_deaths: dict[int, int] = {}
        self._missing_since_s = self._loop.time()
        self.restarts = {"scheduler": 0, "worker": 0}
        self.children: dict[str, Child] = {}
        self.on_step: Callable[[wire.Step], None] = lambda step: None
        self.on_failed: Callable[[wire.StreamsFailed], None] = lambda failed: None
        self.on_restart: Callable[[], None] = lambda: None
        self.on_lost: Callable[[SternaError], None] = lambda error: None
        self.on_loading: Callable[[wire.Loading], None] = lambda loading: None

    # ---- life ----

    async def start(self) -> None:
        """Start scheduler and workers and wait until the engine is ready.

        Raises StartFailed, or the error that the scheduler met while loading.
        """
        self._generation += 1
        self._ready = self._loop.create_future()
        lane = self._lane_url(self._generation)
        spec = SchedulerSpec(
            generation=self._generation,
            model_path=str(self._model.path),
            model_id=self._model.id,
            control_url=self._control_url,
            lane_url=lane,
            workers=self._num_workers,
            slots=self._model.slots,
            cache_dir=str(user_cache()),
            context=self._model.context,
            limits=self._model.limits,
            streams=self._model.streams_shape.streams,
            value_nbytes=self._model.streams_shape.value_nbytes,
            max_batch_tokens=self._model.wants.max_batch_tokens,
            threads=self._config.threads,
            storage=self._model.plan.storage,
            precisions=list(self._model.plan.precisions),
            assignment=list(self._model.plan.assignment),
            prefetch=self._config.prefetch,
            step_timeout_s=self._config.step_timeout_s,
            start_timeout_s=self._config.start_timeout_s,
            trace=str(self._config.trace.absolute()) if self._config.trace else "",
        )
        await self._spawn("scheduler", "sterna.scheduler.process:run", spec, self._model.scheduler_fds)
        for index in range(self._num_workers):
            await self._start_worker(index)
        done, _ = await asyncio.wait([self._ready], timeout=self._config.start_timeout_s)
        if not done:
            raise StartFailed(f"the engine was not ready after {self._config.start_timeout_s:.0f} s")
        self._ready.result()
        self._serving = True

    def close(self) -> None:
        """Replace nobody any more; close the control socket."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        self._control.close()

    def _start_task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def presence(self) -> EnginePresence:
        """Return which processes of the engine are there."""
        missing = [i for i in range(self._num_workers) if f"worker {i}" not in self.children]
        return EnginePresence(
            scheduler=self._serving,
            num_workers=self._num_workers,
            workers_missing=missing,
            workers_missing_since_s=self._missing_since_s if missing else None,
            scheduler_restarts=self.restarts["scheduler"],
            worker_restarts=self.restarts["worker"],
            pids={name: child.pid for name, child in self.children.items()},
        )

    def _lane_url(self, generation: int) -> str:
        return f"ipc://{self._folder}/lane-{generation}.sock"

    async def _start_worker(self, index: int) -> None:
        spec = WorkerSpec(
            index=index,
            generation=self._next_number(),
            lane_url=self._lane_url(self._generation),
            slots=self._model.slots,
            model_path=self._model.paths[0],  # whichever part was named
            model_id=self._model.id,
            cache_dir=str(user_cache()),
        )
        await self._spawn(f"worker {index}", "sterna.workers.process:run", spec, self._model.worker_fds)

    def _next_number(self) -> int:
        self._nonce += 1
        return self._nonce

    async def _spawn(self, name: str, entry: str, spec: msgspec.Struct, fds: dict[str, int]) -> None:
        generation = self._generation
        child = await self._supervisor.spawn(name, entry, msgspec.to_builtins(spec), fds, SPAWN_TIMEOUT_S)
        if generation != self._generation:  # its lane was given up meanwhile
            child.signal(signal.SIGKILL)
            return
        self.children[name] = child
        began = self._loop.time()
        child.exit.add_done_callback(lambda _: self._child_ended(name, child, began))

    def _child_ended(self, name: str, child: Child, began: float) -> None:
        if self._stopping or self.children.get(name) is not child:
            return
        if len(self.children) > self._num_workers:
            self._missing_since_s = self._loop.time()
        del self.children[name]
        log.warning("process.lost name=%r pid=%d status=%r", name, child.pid, child.describe())
        stable = self._loop.time() - began > STABLE_S
        if name == "scheduler":
            self._scheduler_ended(child)
        else:
            index = int(name.split()[1])
            deaths = 0 if stable else self._worker_deaths.get(index, -1) + 1
            self._worker_deaths[index] = deaths
            self._start_task(self._replace_worker(index, deaths), f"replace worker {index}")

    async def _replace_worker(self, index: int, deaths: int) -> None:
        generation = self._generation
        await asyncio.sleep(BACKOFF_S[min(deaths, len(BACKOFF_S) - 1)])
        if self._stopping or generation != self._generation:
            return
        self.restarts["worker"] += 1
        try:
            await self._start_worker(index)
        except StartFailed as error:
            self._lost(error)

    def _scheduler_ended(self, child: Child) -> None:
        error = f"the {child.describe()}"
        if self._ready is not None and not self._ready.done():
            # Its last message may still be on the way, and says more than its exit code.
            self._loop.call_later(LAST_WORDS_S, self._not_ready, self._ready, StartFailed(error))
            return
        self._serving = False
        if self._resizing is not None and not self._resizing.done():
            self._resizing.set_exception(EngineLost(error))
        self._start_task(self._replace_scheduler(error), "replace scheduler")

    def _not_ready(self, ready: asyncio.Future[None], error: SternaError) -> None:
        if not ready.done():
            ready.set_exception(error)
            ready.exception()  # seen, though nobody may wait any more

    async def _replace_scheduler(self, death: str) -> None:
        """Start everything anew over the same memory, again if the new one dies while it starts."""
        while True:
            self._deaths += 1
            if self._deaths >= MAX_DEATHS:
                self._lost(EngineLost(f"{death}, {self._deaths} times in a row"))
                return
            self.restarts["scheduler"] += 1
            self._generation += 1  # whoever is starting a worker for the old lane gives up
            await self._end_children()
            self._release_cancelled()
            try:
                await self.start()
                break
            except StartFailed as error:
                death = str(error)
            except SternaError as error:
                self._lost(error)
                return
        self.on_restart()

    async def _end_children(self) -> None:
        """Kill what the old lane left: it must not write to the memory that the next one uses."""
        old = list(self.children.values())
        self.children.clear()
        for child in old:
            child.signal(signal.SIGKILL)
        if old:
            await asyncio.wait([child.exit for child in old], timeout=KILL_TIMEOUT_S)

    def _release_cancelled(self) -> None:
        cancelled, self._cancelled = self._cancelled, {}
        for then in cancelled.values():
            then()

    def _lost(self, error: SternaError) -> None:
        if not self._stopping:
            log.error("engine.lost error=%r", str(error))
            self.on_lost(error)

    # ---- messages ----

    def submit(self, request: wire.Submit) -> None:
        """Hand a stream over; while the engine is replaced `on_restart` does it, and only that."""
        if self._serving:
            self._send(request)

    def cancel(self, stream: int, serial: int, then: Callable[[], None]) -> None:
        """Have a stream forgotten; `then` is called, never from here, when no step touches it any more."""
        if not self._serving:
            self._loop.call_soon(then)
            return
        # The scheduler takes messages between two steps only: its answer comes after the last one.
        nonce = self._next_number()
        self._cancelled[nonce] = then
        self._send(wire.Cancel(stream=stream, serial=serial))
        self._send(wire.Query(nonce=nonce))

    async def stats(self) -> wire.Stats | None:
        """Return the scheduler's figures, or None if it does not answer within a second."""
        answer = self._stats
        if answer is None or answer.done():  # whoever asks meanwhile shares the answer
            answer = self._stats = self._loop.create_future()
            self._send(wire.Query(nonce=self._next_number()))
        done, _ = await asyncio.wait([answer], timeout=QUERY_TIMEOUT_S)
        if not done and self._stats is answer:
            self._stats = None
        return answer.result() if done else None

    async def resize(self, limits: list[int]) -> wire.Resized:
        """Have only so many slots of each class used, and return what that freed.

        One at a time. Raises OutOfResources when there is no memory to grow into, EngineLost when the
        scheduler goes or does not answer: its successor starts with `LoadedModel.limits`.
        """
        if not self._serving:
            raise EngineLost("the scheduler is being replaced")
        answer = self._resizing = self._loop.create_future()
        self._send(wire.Resize(nonce=self._next_number(), limits=limits))
        done, _ = await asyncio.wait([answer], timeout=RESIZE_TIMEOUT_S)
        self._resizing = None
        if not done:
            raise EngineLost(f"the scheduler changed no slots within {RESIZE_TIMEOUT_S:.0f} s")
        resized: wire.Resized = answer.result()
        if resized.error is not None:
            raise OutOfResources(resized.error)
        return resized

    def _send(self, message: wire.ToScheduler) -> None:
        try:
            self._control.send([f"s{self._generation}".encode(), wire.encode(message)])
        except zmq.ZMQError as error:
            # Its death is noticed through its pidfd, and everything is submitted to its successor.
            log.info("engine.unreachable error=%r", error.strerror)

    def _on_frames(self, frames: list[bytes]) -> None:
        if frames[0] != f"s{self._generation}".encode():
            return  # of a predecessor: its streams were submitted again
        message = wire.decode_for_daemon(frames[1])
        match message:
            case wire.Step():
                self._deaths = 0
                self.on_step(message)
            case wire.StreamsFailed():
                self.on_failed(message)
            case wire.Stats():
                self._on_stats(message)
            case wire.Resized():
                if self._resizing is not None and not self._resizing.done():
                    self._resizing.set_result(message)
            case wire.Loading():
                self.on_loading(message)
            case wire.Ready():
                log.info(
                    "engine.ready load_s=%.2f threads=%d streaming_threads=%d",
                    message.seconds, message.threads, message.streaming_threads,
                )  # fmt: skip
                self._set_ready(None)
            case wire.Trouble():
                self._set_ready(message)

    def _on_stats(self, stats: wire.Stats) -> None:
        if (then := self._cancelled.pop(stats.nonce, None)) is not None:
            then()
        elif self._stats is not None and not self._stats.done():
            self._stats.set_result(stats)

    def _set_ready(self, trouble: wire.Trouble | None) -> None:
        if self._ready is None or self._ready.done():
            return
        if trouble is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error_of(trouble.code, trouble.text))
