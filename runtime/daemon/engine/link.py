"""The daemon's messages to and from its scheduler. Who that is, and whether it lives, others say.

Between two schedulers nothing is sent: their successor is told of all running streams by `on_restart`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import zmq

from ....scheduler import messages as wire
from ....shm.errors import EngineLost, OutOfResources, SternaError, error_of
from ..socket_reader import SocketReader

log = logging.getLogger("sterna.engine")

QUERY_TIMEOUT_S = 1.0
# A step ends and reads that are under way come to their end before slots change.
RESIZE_TIMEOUT_S = 30.0
# A generation that no scheduler has.
NOBODY = 0

Answer = TypeVar("Answer", wire.Stats, wire.Resized)


def _nothing(*_: object) -> None:
    """Stand where nobody listens yet."""


class _Question(Generic[Answer]):
    """A question to the scheduler. Only the answer with its nonce counts: an earlier one may come late."""

    def __init__(self, nonce: int, answer: asyncio.Future[Answer]) -> None:
        self.nonce = nonce
        self.answer: asyncio.Future[Answer] = answer

    def take(self, answer: Answer) -> None:
        """Note the answer if it is one to this question and the first."""
        if answer.nonce == self.nonce and not self.answer.done():
            self.answer.set_result(answer)


class EngineLink:
    """The control socket of one engine, in `folder`.

    Callbacks, all called in the loop. For the requests: on_step and on_failed with what the scheduler says,
    on_restart when a new scheduler wants the running streams submitted again. For the keeper of the
    processes: on_ready, on_worker_ready(index), on_step_done, on_trouble(error). on_loading: the progress of
    a start.
    """

    def __init__(self, folder: Path) -> None:
        """Bind the socket."""
        self._loop = asyncio.get_running_loop()
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.url = f"ipc://{folder}/control.sock"
        socket.bind(self.url)
        self._socket = SocketReader(socket, self._on_frames)
        self._generation = NOBODY
        self._serving = False  # a scheduler is there and knows of the running streams
        self._quiet = True  # nothing of an earlier generation lives
        self._nonce = 0
        self._stats: _Question[wire.Stats] | None = None
        self._resizing: _Question[wire.Resized] | None = None
        self._cancelled: dict[int, Callable[[], None]] = {}  # by the nonce of the query behind the cancel
        self.on_step: Callable[[wire.Step], None] = _nothing
        self.on_failed: Callable[[wire.StreamsFailed], None] = _nothing
        self.on_restart: Callable[[], None] = _nothing
        self.on_loading: Callable[[wire.Loading], None] = _nothing
        self.on_ready: Callable[[], None] = _nothing
        self.on_worker_ready: Callable[[int], None] = _nothing
        self.on_step_done: Callable[[], None] = _nothing
        self.on_trouble: Callable[[SternaError], None] = _nothing

    # ---- what the keeper of the processes says ----

    def begin(self, generation: int) -> None:
        """Listen to the scheduler of this generation; nothing of an earlier one lives."""
        self._generation = generation
        self._quiet = True
        cancelled, self._cancelled = self._cancelled, {}
        for then in cancelled.values():
            then()

    def serve(self) -> None:
        """The scheduler is ready."""
        self._serving = True

    def serve_again(self) -> None:
        """A scheduler is ready that knows of no streams."""
        self._serving = True
        self.on_restart()

    def lost(self, why: str) -> None:
        """The scheduler is gone, or is being ended; what it has begun may go on until `begin`."""
        self._serving = self._quiet = False
        self._generation = NOBODY
        if self._resizing is not None and not self._resizing.answer.done():
            self._resizing.answer.set_exception(EngineLost(why))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    # ---- messages ----

    def submit(self, request: wire.Submit) -> None:
        """Hand a stream over; while the engine is replaced `on_restart` does it, and only that."""
        if self._serving:
            self._send(request)

    def cancel(self, stream: int, serial: int, then: Callable[[], None]) -> None:
        """Have a stream forgotten; `then` is called, never from here, when no step touches it any more."""
        if not self._serving and self._quiet:
            self._loop.call_soon(then)
            return
        self._nonce += 1
        self._cancelled[self._nonce] = then
        if self._serving:
            # The scheduler takes messages between two steps only: its answer comes after the last one.
            self._send(wire.Cancel(stream=stream, serial=serial))
            self._send(wire.Query(nonce=self._nonce))

    async def stats(self) -> wire.Stats | None:
        """Return the scheduler's figures, or None if it does not answer within a second."""
        query = self._stats
        if query is None or query.answer.done():  # whoever asks meanwhile shares the answer
            query = self._stats = _Question(self._next_nonce(), self._loop.create_future())
            self._send(wire.Query(nonce=query.nonce))
        done, _ = await asyncio.wait([query.answer], timeout=QUERY_TIMEOUT_S)
        if not done and self._stats is query:
            self._stats = None
        return query.answer.result() if done else None

    async def resize(self, limits: list[int]) -> wire.Resized:
        """Limit the slots in use to `limits`, one number for each class, and return what that freed.

        One at a time. Raises OutOfResources when there is no memory to grow into, EngineLost when the
        scheduler goes or does not answer: its successor starts with the limits that count by then.
        """
        if not self._serving:
            raise EngineLost("the scheduler is being replaced")
        resize = self._resizing = _Question(self._next_nonce(), self._loop.create_future())
        self._send(wire.Resize(nonce=resize.nonce, limits=limits))
        done, _ = await asyncio.wait([resize.answer], timeout=RESIZE_TIMEOUT_S)
        self._resizing = None
        if not done:
            raise EngineLost(f"the scheduler changed no slots within {RESIZE_TIMEOUT_S:.0f} s")
        resized: wire.Resized = resize.answer.result()
        if resized.error is not None:
            raise OutOfResources(resized.error)
        return resized

    def _next_nonce(self) -> int:
        self._nonce += 1
        return self._nonce

    def _send(self, message: wire.ToScheduler) -> None:
        try:
            self._socket.send([f"s{self._generation}".encode(), wire.encode(message)])
        except zmq.ZMQError as error:
            # Its death is noticed through its pidfd, and everything is submitted to its successor.
            log.info("engine.unreachable error=%r", error.strerror)

    def _on_frames(self, frames: list[bytes]) -> None:
        if frames[0] != f"s{self._generation}".encode():
            return  # of a predecessor: its streams were submitted again
        message = wire.decode_for_daemon(frames[1])
        match message:
            case wire.Step():
                self.on_step_done()
                self.on_step(message)
            case wire.StreamsFailed():
                self.on_failed(message)
            case wire.Stats():
                self._on_stats(message)
            case wire.Resized():
                if self._resizing is not None:
                    self._resizing.take(message)
            case wire.Loading():
                self.on_loading(message)
            case wire.Ready():
                log.info(
                    "engine.ready load_s=%.2f threads=%d streaming_threads=%d",
                    message.seconds, message.threads, message.streaming_threads,
                )  # fmt: skip
                self.on_ready()
            case wire.WorkerReady(index=index):
                self.on_worker_ready(index)
            case wire.Trouble(code=code, text=text):
                self.on_trouble(error_of(code, text))

    def _on_stats(self, stats: wire.Stats) -> None:
        if (then := self._cancelled.pop(stats.nonce, None)) is not None:
            then()
        elif self._stats is not None:
            self._stats.take(stats)
