"""The asyncio client: `AsyncClient` and the `AsyncStream` it returns.

In here: one connection for all calls, driven by the event loop's readiness callbacks. No task reads the
socket, so no cancelled `recv` can lose a message. Not in here: the calls that turn text into something else
(`client_text.py`), what the messages mean (`replies.py`), sockets (`wire.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import zmq

from ... import __version__
from ...shm.errors import SternaError, UsageError
from ..client_text import AsyncTextCalls
from ..protocol.messages import (
    Cancel,
    Drain,
    Drained,
    Failed,
    Generate,
    Hello,
    Message,
    Ping,
    Pong,
    Report,
    Resize,
    Status,
    Welcome,
)
from ..protocol.sockets import check_url, default_socket_url
from . import replies as core
from .embedding import embed_texts_async
from .results import Chunk, Result
from .wire import Wire

_Mailbox = asyncio.Queue[core.Event | SternaError]


class AsyncClient(AsyncTextCalls):
    """Talks to a daemon from one event loop; calls may run side by side over its one connection.

    Settings and errors are those of `client.Client`. Connects when it is first used.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout_s: float = core.DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = core.CONNECT_TIMEOUT_S,
    ) -> None:
        self.url = default_socket_url() if url is None else check_url(url)
        self.timeout_s = timeout_s
        self.connect_timeout_s = connect_timeout_s
        self._id = core.new_id()
        self._pid = os.getpid()
        self._nonces = itertools.count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting = asyncio.Lock()
        self._wire: Wire | None = None
        self._welcome: Welcome | None = None
        self._mailboxes: dict[str, _Mailbox] = {}
        self._tick: asyncio.TimerHandle | None = None
        self._has_unconfirmed_cancels = False
        self._closed = False

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[core.GenerateOptions],
    ) -> Awaitable[Result]: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: Literal[True],
        **options: Unpack[core.GenerateOptions],
    ) -> AsyncStream: ...

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: bool = False,
        **options: Unpack[core.GenerateOptions],
    ) -> Awaitable[Result] | AsyncStream:
        """Return the answer (to be awaited), or with `stream` an asynchronous iterator of its parts.

        Options are those of `client_core.GenerateOptions`. Raises BadRequest for a wrong value at once and
        TypeError for an unknown option. A cancelled task cancels its request on the daemon.
        """
        answer = AsyncStream(self, core.generate_message(prompt, token_ids, dict(options)))
        return answer if stream else answer.read()

    embed = embed_texts_async

    async def cancel(self, request_id: str) -> None:
        """End a request of this client; raises NotFound if there is none of that id."""
        ping = Ping(nonce=next(self._nonces))
        wire = await self._connected()
        if request_id in self._mailboxes:  # on this connection: its stream gets the end, or the complaint
            self._send(wire, Cancel(id=request_id))
            return
        with self._mailbox(core.pong_key(ping.nonce)) as box:
            self._mailboxes[request_id] = box
            try:
                self._send(wire, Cancel(id=request_id))
                self._send(wire, ping)
                event = await self._next(box, request_id)
            finally:
                del self._mailboxes[request_id]
        if isinstance(event, Failed):
            core.settle(event, Pong)

    async def status(self) -> dict[str, Any]:
        """Return the daemon's report on itself."""
        request = Status(id=core.new_id())
        return (await self._call(request, request.id, Report)).body

    async def resize(self, memory: str) -> dict[str, Any]:
        """Have the daemon use `memory` ("2GiB", "auto") in all; return its slots and bytes then."""
        request = Resize(id=core.new_id(), memory=memory)
        return (await self._call(request, request.id, Report)).body

    async def drain(self) -> None:
        """Have the daemon finish what runs and stop; returns when nothing runs any more."""
        request = Drain(id=core.new_id())
        await self._call(request, request.id, Drained)

    async def ping(self) -> float:
        """Return the seconds that a round trip to the daemon takes."""
        request = Ping(nonce=next(self._nonces))
        await self._connected()
        start_s = time.monotonic()
        await self._call(request, core.pong_key(request.nonce), Pong)
        return time.monotonic() - start_s

    async def connect(self) -> Welcome:
        """Connect unless it is done and return the daemon's facts about its model and limits."""
        await self._connected()
        if self._welcome is None:
            raise core.silent(self.url, self.connect_timeout_s)
        return self._welcome

    async def close(self) -> None:
        """Close the connection; what still runs fails with UsageError. May be called twice."""
        if self._closed or os.getpid() != self._pid:
            return
        if self._wire is not None and self._has_unconfirmed_cancels:
            # A closed socket drops what it has not sent; the pong tells that the cancels were read.
            with contextlib.suppress(SternaError, TimeoutError):
                async with asyncio.timeout(core.CANCEL_TIMEOUT_S):
                    await self.ping()
        self._closed = True
        self._drop(UsageError("this client is closed"))
        if self._context is not None:
            self._context.term()
            self._context = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, request: Message, key: str, expected: type[core.E]) -> core.E:
        wire = await self._connected()
        with self._mailbox(key) as box:
            self._send(wire, request)
            return core.settle(await self._next(box, key), expected)

    async def _connected(self) -> Wire:
        loop = asyncio.get_running_loop()
        core.check_process(self._pid, os.getpid(), self._closed)
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise UsageError("this client belongs to another event loop: make one for each")
        async with self._connecting:
            if self._wire is not None and self._wire.link.going_away and not self._mailboxes:
                self._drop(None)
            if self._wire is None:
                self._wire, self._welcome = await self._open(loop)
            elif not self._mailboxes:
                self._wire.link.wake(time.monotonic())
            return self._wire

    async def _open(self, loop: asyncio.AbstractEventLoop) -> tuple[Wire, Welcome]:
        if self._context is None:
            self._context = zmq.Context()
        wire = self._wire = Wire(self._context, self.url)
        loop.add_reader(wire.socket.FD, self._on_ready)
        loop.add_reader(wire.monitor.FD, self._on_ready)
        try:
            with self._mailbox(core.CONNECTION) as box:
                self._send(wire, Hello(client=self._id, version=__version__))
                async with asyncio.timeout(self.connect_timeout_s):
                    return wire, core.settle(await _taken(box), Welcome)
        except TimeoutError:
            self._drop(None)
            raise core.silent(self.url, self.connect_timeout_s) from None
        except BaseException:
            self._drop(None)
            raise

    async def _next(self, box: _Mailbox, request_id: str) -> core.Event:
        """Return a mailbox's next event; raises what ended the connection, EngineLost after `timeout_s`."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return await _taken(box)
        except TimeoutError:
            raise core.stalled(request_id, self.timeout_s) from None

    def _send(self, wire: Wire, message: Message) -> None:
        if wire is not self._wire or self._loop is None:
            raise core.went_away(self.url)
        wire.send(message)
        # Sending may swallow the edge by which the descriptor reports what came in.
        self._loop.call_soon(self._on_ready)

    def _on_ready(self) -> None:
        """Deliver what came in and see to the heartbeat; called by the loop."""
        wire = self._wire
        if wire is None:
            return
        try:
            while events := wire.receive():
                for key, event in events:
                    self._deliver(key, event)
        except SternaError as e:
            self._drop(e)
            return
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        if self._loop is not None and (self._mailboxes or wire.lost):
            self._tick = self._loop.call_later(wire.wait_s(), self._on_ready)

    def _deliver(self, key: str, event: core.Event) -> None:
        if key == core.CONNECTION and isinstance(event, Failed) and key not in self._mailboxes:
            core.settle(event, Pong)  # the daemon refuses the connection as a whole
        if key in self._mailboxes:
            self._mailboxes[key].put_nowait(event)

    def _drop(self, error: SternaError | None) -> None:
        """Close the connection and fail what runs on it."""
        wire, self._wire = self._wire, None
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        self._has_unconfirmed_cancels = False
        if wire is not None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(wire.socket.FD)
                self._loop.remove_reader(wire.monitor.FD)
            wire.close()
        if error is not None:
            for box in self._mailboxes.values():
                box.put_nowait(error)

    @contextlib.contextmanager
    def _mailbox(self, key: str) -> Iterator[_Mailbox]:
        box = self._mailboxes[key] = asyncio.Queue()
        try:
            yield box
        finally:
            self._mailboxes.pop(key, None)

    def _abandon(self, request_id: str) -> None:
        """Cancel a request that nobody waits for any more, without waiting."""
        self._mailboxes.pop(request_id, None)
        if self._wire is not None:
            self._has_unconfirmed_cancels = True
            with contextlib.suppress(SternaError):
                self._send(self._wire, Cancel(id=request_id))


class AsyncStream(AsyncIterator[Chunk]):
    """The parts of one answer as they come; `result` is the whole once they are exhausted.

    The request is sent by `async with` or by the first step of the iteration. Closing it early, also by
    dropping the last reference, cancels the request on the daemon. Iterating raises the request's error.
    """

    def __init__(self, client: AsyncClient, request: Generate) -> None:
        self.id = request.id
        self.result: Result | None = None
        self._client = client
        self._request = request
        self._answer = core.Answer(request)
        self._chunks: deque[Chunk] = deque()
        self._box: _Mailbox | None = None
        self._ended = False

    async def start(self) -> None:
        """Send the request unless it was sent."""
        if self._box is not None or self._ended:
            return
        wire = await self._client._connected()
        self._box = self._client._mailboxes[self.id] = asyncio.Queue()
        try:
            self._client._send(wire, self._request)
        except BaseException:
            self._end()
            raise

    async def __anext__(self) -> Chunk:
        await self.start()
        while not self._chunks:
            if self._ended or self._box is None:
                raise StopAsyncIteration
            try:
                self._chunks += self._answer.feed(await self._client._next(self._box, self.id))
            except SternaError:
                await self.aclose()
                raise
            if self._answer.done:
                self.result = self._answer.result
                self._end()
        return self._chunks.popleft()

    async def read(self) -> Result:
        """Return the whole answer; what was iterated over before is part of it."""
        async with self:
            async for _ in self:
                pass
        if self.result is None:
            raise core.ended_early(self.id)
        return self.result

    async def cancel(self) -> None:
        """End the answer; the iteration goes on to its end, with reason `cancelled`."""
        if self._box is not None and not self._ended:
            await self._client.cancel(self.id)

    async def aclose(self) -> None:
        """End the answer and the iteration at once; the daemon is told without waiting for it."""
        if self._box is not None and not self._ended and not self._answer.done:
            self._client._abandon(self.id)
        self._chunks.clear()
        self._end()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        loop = getattr(self, "_client", None) and self._client._loop
        if loop and self._box is not None and not self._ended and not loop.is_closed():
            # The collector may run in any thread.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._client._abandon, self.id)

    def _end(self) -> None:
        self._ended = True
        self._client._mailboxes.pop(self.id, None)


async def _taken(box: _Mailbox) -> core.Event:
    event = await box.get()
    if isinstance(event, SternaError):
        # A copy: one object raised in several tasks would gather all their tracebacks.
        raise type(event)(*event.args)
    return event
