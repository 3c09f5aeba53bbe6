"""The one connection of the asyncio client, and waiting for what it brings.

In here: a connection that is driven by the event loop's readiness callbacks, a mailbox for each call, and the
driver of an `exchange.Exchange`. No task reads the socket, so no cancelled `recv` can lose a message. Not in
here: answers that come in parts (`async_stream.py`), whose turn it is (`turns.py`), sockets
(`connection.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import zmq

from ... import __version__
from ...shm.errors import SternaError, UsageError
from ..protocol.messages import Cancel, Embed, Failed, Generate, Hello, Message, Pong, Welcome
from . import replies, requests
from .connection import ClientConnection
from .exchange import Exchange, T
from .heartbeat import CANCEL_TIMEOUT_S
from .turns import Turns

Mailbox = asyncio.Queue[replies.Event | SternaError]
"""The replies to one call, in order; an error ends the connection."""


class Channel:
    """The connection of one client to the daemon at `url`. For one event loop.

    `timeout_s` bounds the wait for a reply, `connect_timeout_s` the wait for a daemon. Methods that send
    raise DaemonUnreachable when there is no daemon or it goes away, and UsageError after `close`, after a
    fork and in another loop.
    """

    def __init__(self, url: str, timeout_s: float, connect_timeout_s: float) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.connect_timeout_s = connect_timeout_s
        self._client_id = requests.new_id()
        self._pid = os.getpid()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting = asyncio.Lock()
        self._connection: ClientConnection | None = None
        self._welcome: Welcome | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        self._turns = Turns()
        self._tick: asyncio.TimerHandle | None = None
        self._ready_soon = False
        self._has_unconfirmed_cancels = False
        self._closed = False

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for a reply and the daemon has no request of ours."""
        return not self._mailboxes and not self._turns.num_open

    # ---- calls ----

    async def run(self, exchange: Exchange[T]) -> T:
        """Carry out a call and return its result; a cancelled task cancels its requests on the daemon."""
        connection = await self._connected()
        box: Mailbox = asyncio.Queue()
        opened: set[str] = set()
        try:
            while not exchange.done:
                for message in exchange.due():
                    self._submit(connection, message)
                opened.update(exchange.keys)
                self._mailboxes.update(dict.fromkeys(exchange.keys, box))
                event = await self.next_event(box, next(iter(exchange.in_flight), ""))
                if event is None:
                    raise exchange.overdue(self.url, self.timeout_s)
                exchange.feed(event)
        finally:
            for key in opened:
                self._mailboxes.pop(key, None)
            for request_id in exchange.in_flight:
                self.abandon(request_id)
        return exchange.result()

    async def open(self, request: Generate) -> Mailbox:
        """Send a request as soon as it is its turn and return where its replies arrive.

        The caller ends it with `end` or `abandon`.
        """
        connection = await self._connected()
        box = self._mailboxes[request.id] = asyncio.Queue()
        try:
            self._submit(connection, request)
        except BaseException:
            self.end(request.id)
            raise
        return box

    async def next_event(self, box: Mailbox, request_id: str) -> replies.Event | None:
        """Return a mailbox's next reply, None after `timeout_s` without; raises what ended the connection.

        While the request waits for its turn, the replies to those before it count.
        """
        until_s = time.monotonic() + self.timeout_s
        while True:
            try:
                async with asyncio.timeout(until_s - time.monotonic()):
                    return await _taken(box)
            except TimeoutError:
                later_s = self._turns.quiet_since_s(request_id) + self.timeout_s
                if later_s <= until_s:
                    return None
                until_s = later_s

    def end(self, request_id: str) -> None:
        """Forget a request that was answered."""
        self._mailboxes.pop(request_id, None)

    def abandon(self, request_id: str) -> None:
        """Cancel a request that nobody waits for any more, without waiting."""
        self._mailboxes.pop(request_id, None)
        if self._turns.withdraw(request_id) or self._connection is None:
            return
        self._has_unconfirmed_cancels = True
        with contextlib.suppress(SternaError):
            self._send(self._connection, Cancel(id=request_id))

    def abandon_soon(self, request_id: str) -> None:
        """Do as `abandon` does, from any thread."""
        if self._pid == os.getpid() and self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it was closed just now
                self._loop.call_soon_threadsafe(self.abandon, request_id)

    async def cancel(self, request_id: str) -> None:
        """End a request; on this channel its mailbox gets the end. Raises NotFound if there is none."""
        connection = await self._connected()
        if self._turns.withdraw(request_id):
            self._deliver(request_id, replies.never_sent(request_id))
        elif request_id in self._mailboxes:
            self._send(connection, Cancel(id=request_id))
        else:
            await self.run(requests.cancel(request_id))

    # ---- the connection ----

    async def connect(self) -> Welcome:
        """Connect unless it is done and return what the daemon says of itself."""
        await self._connected()
        if self._welcome is None:
            raise replies.silent(self.url, self.connect_timeout_s)
        return self._welcome

    async def close(self) -> None:
        """Close the connection; what still runs fails with UsageError. May be called twice."""
        if self._closed or os.getpid() != self._pid:
            return
        if self._connection is not None and self._has_unconfirmed_cancels:
            # A closed socket drops what it has not sent; the pong tells that the cancels were read.
            with contextlib.suppress(SternaError, TimeoutError):
                async with asyncio.timeout(CANCEL_TIMEOUT_S):
                    await self.run(requests.ping())
        self._closed = True
        self._drop(UsageError("this client is closed"))
        if self._context is not None:
            self._context.term()
            self._context = None

    async def _connected(self) -> ClientConnection:
        loop = asyncio.get_running_loop()
        requests.check_process(self._pid, os.getpid(), self._closed)
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise UsageError("this client belongs to another event loop: make one for each")
        async with self._connecting:
            if self._connection is not None and self._connection.link.going_away and not self._mailboxes:
                self._drop(None)
            if self._connection is None:
                return await self._open_connection(loop)
            if not self._mailboxes:
                self._connection.link.wake(time.monotonic())
            return self._connection

    async def _open_connection(self, loop: asyncio.AbstractEventLoop) -> ClientConnection:
        if self._context is None:
            self._context = zmq.Context()
        connection = self._connection = ClientConnection(self._context, self.url)
        loop.add_reader(connection.socket.FD, self._on_ready)
        loop.add_reader(connection.monitor.FD, self._on_ready)
        box = self._mailboxes[replies.CONNECTION] = asyncio.Queue()
        try:
            self._send(connection, Hello(client=self._client_id, version=__version__))
            async with asyncio.timeout(self.connect_timeout_s):
                welcome = replies.settle(await _taken(box), Welcome)
            if connection is not self._connection:  # it broke after the welcome
                raise replies.went_away(self.url)
        except TimeoutError:
            self._drop(None)
            raise replies.silent(self.url, self.connect_timeout_s) from None
        except BaseException:
            self._drop(None)
            raise
        finally:
            self._mailboxes.pop(replies.CONNECTION, None)
        self._welcome = welcome
        self._turns.restart(welcome.limits, time.monotonic())
        return connection

    def _submit(self, connection: ClientConnection, message: Message) -> None:
        """Send a message; one that the daemon puts into its queue waits here for its turn."""
        if isinstance(message, (Generate, Embed)) and connection is self._connection:
            self._turns.add(message.id, connection.link.encode(message))
            self._send_due(connection)
            self._look_soon()
        else:
            self._send(connection, message)

    def _send(self, connection: ClientConnection, message: Message) -> None:
        if connection is not self._connection:
            raise replies.went_away(self.url)
        connection.send(message)
        self._look_soon()

    def _send_due(self, connection: ClientConnection) -> None:
        for frame in self._turns.due(time.monotonic()):
            connection.send_frame(frame)

    def _look_soon(self) -> None:
        # Sending may swallow the edge by which the descriptor reports what came in.
        if self._loop is not None and not self._ready_soon:
            self._ready_soon = True
            self._loop.call_soon(self._on_ready)

    def _on_ready(self) -> None:
        """Deliver what came in, send what waits, keep the heartbeat; called by the loop."""
        self._ready_soon = False
        connection = self._connection
        if connection is None:
            return
        try:
            while True:
                for key, event in connection.receive():
                    self._deliver(key, event)
                self._send_due(connection)
                if not connection.is_ready:
                    break
        except SternaError as e:
            self._drop(e)
            return
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        if self._loop is not None and (self._mailboxes or connection.lost):
            self._tick = self._loop.call_later(connection.wait_s(), self._on_ready)

    def _deliver(self, key: str, event: replies.Event) -> None:
        self._turns.feed(key, event, time.monotonic())
        if key in self._mailboxes:
            self._mailboxes[key].put_nowait(event)
        elif key == replies.CONNECTION and isinstance(event, Failed):
            replies.settle(event, Pong)  # the daemon refuses the connection as a whole

    def _drop(self, error: SternaError | None) -> None:
        """Close the connection and fail what runs on it."""
        connection, self._connection = self._connection, None
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        self._has_unconfirmed_cancels = False
        self._turns.clear()
        if connection is not None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(connection.socket.FD)
                self._loop.remove_reader(connection.monitor.FD)
            connection.close()
        if error is not None:
            for box in self._mailboxes.values():
                box.put_nowait(error)


async def _taken(box: Mailbox) -> replies.Event:
    event = await box.get()
    if isinstance(event, SternaError):
        # A copy: one object raised in several tasks would gather all their tracebacks.
        raise type(event)(*event.args)
    return event
