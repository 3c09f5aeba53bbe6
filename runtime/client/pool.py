"""Connections of the blocking client, and waiting for what they bring.

In here: a pool so that threads can share a client, each call with a connection of its own, and the driver of
an `exchange.Exchange`. Not in here: answers that come in parts (`stream.py`), sockets (`connection.py`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import zmq

from ... import __version__
from ..protocol.messages import Failed, Hello, Pong, Welcome
from . import replies
from .connection import ClientConnection
from .exchange import Exchange, T
from .requests import check_process, new_id

MAX_IDLE_CONNECTIONS = 8


class ConnectionPool:
    """The connections of one client to the daemon at `url`. For any thread.

    `timeout_s` bounds the wait for a reply, `connect_timeout_s` the wait for a daemon. Methods that send
    raise DaemonUnreachable when there is no daemon or it goes away, and UsageError after `close` or a fork.
    """

    def __init__(self, url: str, timeout_s: float, connect_timeout_s: float) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.connect_timeout_s = connect_timeout_s
        self._client_id = new_id()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._idle: list[ClientConnection] = []
        self._num_in_use = 0
        self._closed = False

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a child of the process that made the pool."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Refuse to wait in a fork for what the parent asked; raises UsageError."""
        check_process(self._pid, os.getpid(), closed=False)

    def run(self, exchange: Exchange[T]) -> T:
        """Carry out a call over a connection of its own and return its result."""
        with self._borrowed() as connection:
            self._carry_out(exchange, connection)
        return exchange.result()

    def run_timed(self, exchange: Exchange[object]) -> float:
        """Carry out a call and return the seconds from its request to its reply, without connecting."""
        with self._borrowed() as connection:
            start_s = time.monotonic()
            self._carry_out(exchange, connection)
            elapsed_s = time.monotonic() - start_s
        exchange.result()  # raises what the daemon has against it
        return elapsed_s

    def connect(self) -> Welcome:
        """Make a fresh connection and return what the daemon says of itself."""
        connection, welcome = self._open()
        self.give_back(connection)
        return welcome

    def take(self) -> ClientConnection:
        """Return a connection for the caller alone, to be given back or discarded."""
        check_process(self._pid, os.getpid(), self._closed)
        while True:
            with self._lock:
                if not self._idle:
                    break
                connection = self._idle.pop()
                self._num_in_use += 1
            if connection.is_reusable():
                return connection
            self.discard(connection)
        return self._open()[0]

    def give_back(self, connection: ClientConnection) -> None:
        """Return a connection on which nothing is under way; another call may take it."""
        with self._lock:
            if not self._closed and len(self._idle) < MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
                self._num_in_use -= 1
                return
        self.discard(connection)

    def discard(self, connection: ClientConnection | None) -> None:
        """Close a connection that was taken; the daemon cancels what is under way on it."""
        if connection is not None:
            connection.close()
        with self._lock:
            self._num_in_use -= 1
            self._term_if_unused()

    def close(self) -> None:
        """Close what is idle; who has a connection still gives it back. May be called twice."""
        if self.forked:
            return
        with self._lock:
            self._closed = True
            for connection in self._idle:
                connection.close()
            self._idle.clear()
            self._term_if_unused()

    def _carry_out(self, exchange: Exchange[object], connection: ClientConnection) -> None:
        until_s = time.monotonic() + self.timeout_s
        while not exchange.done:
            for message in exchange.due():
                connection.send(message)
            events = wait_events(connection, until_s)
            if not events:
                raise exchange.overdue(self.url, self.timeout_s)
            for key, event in events:
                if key in exchange.keys:
                    exchange.feed(event)
                    until_s = time.monotonic() + self.timeout_s

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[ClientConnection]:
        connection = self.take()
        try:
            yield connection
        except BaseException:
            self.discard(connection)
            raise
        self.give_back(connection)

    def _open(self) -> tuple[ClientConnection, Welcome]:
        check_process(self._pid, os.getpid(), self._closed)
        with self._lock:
            if self._context is None:
                self._context = zmq.Context()
            context = self._context
            self._num_in_use += 1
        connection: ClientConnection | None = None
        try:
            connection = ClientConnection(context, self.url)
            connection.send(Hello(client=self._client_id, version=__version__))
            until_s = time.monotonic() + self.connect_timeout_s
            while events := wait_events(connection, until_s):
                for key, event in events:
                    if key == replies.CONNECTION:
                        return connection, replies.settle(event, Welcome)
            raise replies.silent(self.url, self.connect_timeout_s)
        except BaseException:
            self.discard(connection)
            raise

    def _term_if_unused(self) -> None:
        # A context waits for its sockets: only the last user may end it.
        if self._closed and self._num_in_use == 0 and self._context is not None:
            self._context.term()
            self._context = None


def wait_events(connection: ClientConnection, until_s: float) -> list[tuple[str, replies.Event]]:
    """Block until events are here or the monotonic time `until_s` is reached; then there are none.

    Raises DaemonUnreachable when the daemon goes away, ProtocolError, and what the daemon has against the
    connection as a whole.
    """
    while True:
        events = connection.receive()
        for key, event in events:
            if key == replies.CONNECTION and isinstance(event, Failed):
                replies.settle(event, Pong)
        if events:
            return events
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return []
        sockets = [(connection.socket, connection.poll_flags), (connection.monitor, zmq.POLLIN)]
        zmq.zmq_poll(sockets, int(min(left_s, connection.wait_s()) * 1000) + 1)
