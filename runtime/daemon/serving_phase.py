"""The phase of a daemon in which clients are answered: its door, its requests, its memory, its report.

Not in here: what comes before and after (`daemon.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ... import __version__
from ...shm.errors import ShuttingDown, SternaError
from ..config import Config
from ..protocol import codec
from ..protocol.messages import Limits, Welcome
from .connections import Connections
from .endpoint import Controls, Endpoint
from .engine.link import EngineLink
from .engine.processes import EngineProcesses
from .memory_control import MemoryControl
from .model.model_memory import ModelMemory
from .model.served_model import ServedModel
from .service import Service
from .socket_files import bind_clients
from .status import report

# How long the last messages to clients that do not read them hold up the end.
LINGER_S = 0.5


class ServingPhase:
    """Everything between a started engine and its clients."""

    def __init__(
        self,
        config: Config,
        model: ServedModel,
        memory: ModelMemory,
        link: EngineLink,
        processes: EngineProcesses,
        group: asyncio.TaskGroup,
    ) -> None:
        """Bind the clients' socket; nobody is answered before `open_door`. Raises NotPermitted."""
        self._config = config
        self._model = model
        self._memory = memory
        self._link = link
        self._processes = processes
        self._group = group
        self._idle = asyncio.Event()
        self._connections = Connections(bind_clients(config.socket))
        budget = config.quality_fraction if config.routing == "budget" else 0.0
        self._service = Service(config, model, memory, link, self._connections.send, budget)
        self._service.on_idle = self._idle.set
        self._control = MemoryControl(model, memory, link)
        processes.has_work = lambda: self._service.num_running > 0

    def fail_all(self, error: SternaError) -> None:
        """End every request with `error`."""
        self._service.fail_all(error)

    @contextlib.contextmanager
    def open_door(
        self, own_pids: Mapping[str, int], started_s: float, on_drained: Callable[[], None]
    ) -> Iterator[None]:
        """Answer clients inside the `with`.

        own_pids: processes other than the engine's, for the report; started_s: when the daemon was started;
        on_drained is called when a client asked for the end, and nothing runs any more.
        """

        async def told() -> dict[str, Any]:
            return await self._report(endpoint, own_pids, started_s)

        async def drained() -> None:
            await self._drain()
            on_drained()

        controls = Controls(report=told, drain=drained, resize=self._control.resize)
        endpoint = Endpoint(
            self._connections, self._service, self._model.tokenizer, self._welcome(), controls, self._group
        )
        tasks = [self._group.create_task(self._connections.probe(endpoint.owners), name="connections.probe")]
        if self._config.memory_pressure == "auto":
            tasks.append(self._group.create_task(self._control.watch(), name="memory.watch"))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            endpoint.close()
            self._connections.close(LINGER_S)

    async def end(self, timeout_s: float, hurried: Callable[[], bool]) -> None:
        """Say goodbye and finish what runs, within `timeout_s` and until `hurried`; the rest then fails."""
        self._connections.say_goodbye()
        draining = asyncio.ensure_future(self._drain())
        deadline_s = time.monotonic() + timeout_s
        while not draining.done() and time.monotonic() < deadline_s and not hurried():
            await asyncio.wait([draining], timeout=0.05)
        draining.cancel()
        self.fail_all(ShuttingDown("the daemon stopped before the answer was complete"))

    async def _drain(self) -> None:
        """Take nothing new, and return when nothing runs."""
        self._service.draining = True
        while self._service.num_running or self._service.num_waiting:
            self._idle.clear()
            await self._idle.wait()

    def _welcome(self) -> Welcome:
        return Welcome(
            version=__version__,
            model=self._model.facts,
            limits=Limits(
                max_frame_bytes=codec.MAX_FRAME_BYTES,
                max_queue=self._config.max_queue,
                max_sequences=self._model.streams_shape.streams,
            ),
        )

    async def _report(
        self, endpoint: Endpoint, own_pids: Mapping[str, int], started_s: float
    ) -> dict[str, Any]:
        engine = await self._link.stats()
        status = report(
            service=self._service,
            model=self._model,
            memory=self._memory,
            presence=self._processes.presence(),
            door=endpoint.figures(),
            engine=engine,
            own_pids=own_pids,
            started_s=started_s,
            now_s=time.monotonic(),
        )
        return status.to_body()
