"""The blocking client: `Client` and the `Stream` it returns.

In here: waiting, and a pool of connections so that threads can share a client. Not in here: the calls that
turn text into something else (`client_text.py`), what the messages mean (`replies.py`), sockets
(`wire.py`), asyncio (`async_client.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import zmq

from ... import __version__
from ...shm.errors import SternaError
from ..client_text import TextCalls
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
from .embedding import embed_texts
from .results import Chunk, Result
from .wire import Wire

_MAX_IDLE_WIRES = 8


class Client(TextCalls):
    """Talks to a daemon; threads may share it, each call in flight has a connection of its own.

    `timeout_s` bounds the wait for an answer and between two of its tokens, `connect_timeout_s` the wait for
    a daemon. Connects when it is first used. Not to be carried over a fork. Methods raise DaemonUnreachable
    when there is no daemon or it goes away, the request's error (`shm.errors.RequestError`) when it fails,
    and UsageError after `close` or a fork.
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
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._idle: list[Wire] = []
        self._in_use = 0
        self._closed = False

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[core.GenerateOptions],
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: Literal[True],
        **options: Unpack[core.GenerateOptions],
    ) -> Stream: ...

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: bool = False,
        **options: Unpack[core.GenerateOptions],
    ) -> Result | Stream:
        """Return the answer to a prompt or to token ids, or with `stream` an iterator of its parts.

        Options are those of `client_core.GenerateOptions`. Raises BadRequest for a wrong value before
        anything is sent and TypeError for an unknown option.
        """
        answer = Stream(self, core.generate_message(prompt, token_ids, dict(options)))
        return answer if stream else answer.read()

    embed = embed_texts

    def cancel(self, request_id: str) -> None:
        """End a request of this client, from any thread; raises NotFound if there is none of that id."""
        ping = Ping(nonce=next(self._nonces))
        with self._borrowed() as wire:
            wire.send(Cancel(id=request_id))
            # The pong tells that the daemon has read the cancel; a complaint comes before it.
            wire.send(ping)
            event = self._wait_for(wire, {core.pong_key(ping.nonce), request_id})
        if isinstance(event, Failed):
            core.settle(event, Pong)

    def status(self) -> dict[str, Any]:
        """Return the daemon's report on itself."""
        request = Status(id=core.new_id())
        return self._call(request, request.id, Report).body

    def resize(self, memory: str) -> dict[str, Any]:
        """Have the daemon use `memory` ("2GiB", "auto") in all; return its slots and bytes then."""
        request = Resize(id=core.new_id(), memory=memory)
        return self._call(request, request.id, Report).body

    def drain(self) -> None:
        """Have the daemon finish what runs and stop; returns when nothing runs any more."""
        request = Drain(id=core.new_id())
        self._call(request, request.id, Drained)

    def ping(self) -> float:
        """Return the seconds that a round trip to the daemon takes."""
        start_s = time.monotonic()
        request = Ping(nonce=next(self._nonces))
        self._call(request, core.pong_key(request.nonce), Pong)
        return time.monotonic() - start_s

    def connect(self) -> Welcome:
        """Make a fresh connection and return the daemon's facts about its model and limits."""
        wire, welcome = self._open()
        self._give_back(wire)
        return welcome

    def close(self) -> None:
        """Close all connections; streams that still run are closed by their owner. May be called twice."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            for wire in self._idle:
                wire.close()
            self._idle.clear()
            self._term_if_unused()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, request: Message, key: str, expected: type[core.E]) -> core.E:
        with self._borrowed() as wire:
            wire.send(request)
            event = self._wait_for(wire, {key})
        return core.settle(event, expected)

    def _wait_for(self, wire: Wire, keys: set[str]) -> core.Event:
        until_s = time.monotonic() + self.timeout_s
        while events := wait_events(wire, until_s):
            for key, event in events:
                if key in keys:
                    return event
        raise core.silent(self.url, self.timeout_s)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[Wire]:
        wire = self._take()
        try:
            yield wire
        except BaseException:
            self._discard(wire)
            raise
        self._give_back(wire)

    def _take(self) -> Wire:
        """Return a connection for the caller alone, to be given back or discarded."""
        core.check_process(self._pid, os.getpid(), self._closed)
        while True:
            with self._lock:
                if not self._idle:
                    break
                wire = self._idle.pop()
                self._in_use += 1
            if wire.is_reusable():
                return wire
            self._discard(wire)
        return self._open()[0]

    def _open(self) -> tuple[Wire, Welcome]:
        core.check_process(self._pid, os.getpid(), self._closed)
        with self._lock:
            if self._context is None:
                self._context = zmq.Context()
            context = self._context
            self._in_use += 1
        wire: Wire | None = None
        try:
            wire = Wire(context, self.url)
            wire.send(Hello(client=self._id, version=__version__))
            until_s = time.monotonic() + self.connect_timeout_s
            while events := wait_events(wire, until_s):
                for key, event in events:
                    if key == core.CONNECTION:
                        return wire, core.settle(event, Welcome)
            raise core.silent(self.url, self.connect_timeout_s)
        except BaseException:
            self._discard(wire)
            raise

    def _give_back(self, wire: Wire) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _MAX_IDLE_WIRES:
                self._idle.append(wire)
                self._in_use -= 1
                return
        self._discard(wire)

    def _discard(self, wire: Wire | None) -> None:
        if wire is not None:
            wire.close()
        with self._lock:
            self._in_use -= 1
            self._term_if_unused()

    def _term_if_unused(self) -> None:
        # A context waits for its sockets: only the last user may end it.
        if self._closed and self._in_use == 0 and self._context is not None:
            self._context.term()
            self._context = None


class Stream(Iterator[Chunk]):
    """The parts of one answer as they come; `result` is the whole once they are exhausted.

    For one thread, except `cancel`. Closing it early, also by leaving a `with` block or by dropping the last
    reference, cancels the request on the daemon. Iterating raises the request's error.
    """

    def __init__(self, client: Client, request: Generate) -> None:
        self.id = request.id
        self.result: Result | None = None
        self._client = client
        self._answer = core.Answer(request)
        self._chunks: deque[Chunk] = deque()
        self._wire: Wire | None = client._take()
        try:
            self._wire.send(request)
        except BaseException:
            self._release(reusable=False)
            raise

    def __next__(self) -> Chunk:
        until_s = time.monotonic() + self._client.timeout_s
        while not self._chunks:
            if self._wire is None:
                raise StopIteration
            if self._advance(self._wire, until_s):
                until_s = time.monotonic() + self._client.timeout_s
            elif time.monotonic() >= until_s:
                self.close()
                raise core.stalled(self.id, self._client.timeout_s)
        return self._chunks.popleft()

    def read(self) -> Result:
        """Return the whole answer; what was iterated over before is part of it."""
        try:
            for _ in self:
                pass
        except BaseException:
            self.close()
            raise
        if self.result is None:
            raise core.ended_early(self.id)
        return self.result

    def cancel(self) -> None:
        """End the answer, from any thread; the iteration goes on to its end, with reason `cancelled`."""
        if not self._answer.done:
            self._client.cancel(self.id)

    def close(self) -> None:
        """End the answer and the iteration; waits up to a second for the daemon to confirm."""
        wire = self._wire
        if wire is None:
            return
        until_s = time.monotonic() + core.CANCEL_TIMEOUT_S
        try:
            wire.send(Cancel(id=self.id))
            while self._wire is not None and time.monotonic() < until_s:
                self._advance(wire, until_s)
        except SternaError:
            pass  # the request has ended, one way or another
        finally:
            self._chunks.clear()
            self._release(reusable=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_wire", None) is not None and os.getpid() == self._client._pid:
            with contextlib.suppress(Exception):
                self.close()

    def _advance(self, wire: Wire, until_s: float) -> bool:
        """Take in what comes until then and tell whether any of it was for this answer.

        Raises whatever ends the answer, after the connection is released.
        """
        core.check_process(self._client._pid, os.getpid(), closed=False)
        mine = [event for key, event in self._await(wire, until_s) if key == self.id]
        try:
            for event in mine:
                self._chunks += self._answer.feed(event)
        except SternaError:
            self._release(reusable=self._answer.done)
            raise
        if self._answer.done:
            self.result = self._answer.result
            self._release(reusable=True)
        return bool(mine)

    def _await(self, wire: Wire, until_s: float) -> list[tuple[str, core.Event]]:
        try:
            return wait_events(wire, until_s)
        except SternaError:
            self._release(reusable=False)
            raise

    def _release(self, *, reusable: bool) -> None:
        wire, self._wire = self._wire, None
        if wire is None:
            return
        if reusable:
            self._client._give_back(wire)
        else:
            self._client._discard(wire)


def wait_events(wire: Wire, until_s: float) -> list[tuple[str, core.Event]]:
    """Block until events are here or the monotonic time `until_s` is reached; then there are none.

    Raises DaemonUnreachable when the daemon goes away, ProtocolError, and what the daemon has against the
    connection as a whole.
    """
    while True:
        events = wire.receive()
        for key, event in events:
            if key == core.CONNECTION and isinstance(event, Failed):
                core.settle(event, Pong)
        if events:
            return events
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return []
        sockets = [(wire.socket, zmq.POLLIN), (wire.monitor, zmq.POLLIN)]
        zmq.zmq_poll(sockets, int(min(left_s, wire.wait_s()) * 1000) + 1)
