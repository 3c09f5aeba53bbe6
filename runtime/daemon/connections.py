"""Client connections on the ROUTER socket: who is there, their backlog, and finding out who has gone.

ZeroMQ does not say when a connection goes: what is sent to it then fails with EHOSTUNREACH, so connections
with requests are probed with an unasked `pong` when nothing else was sent to them for a while. Not in here:
what clients ask for (`endpoint.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import zmq

from ...shm.errors import SternaError
from ..protocol import codec
from ..protocol.messages import Failed, GoingAway, Message, Pong
from .socket_reader import SocketReader

log = logging.getLogger("sterna.endpoint")

PROBE_S = 0.2
IDLE_PROBES = 50  # connections without requests are probed that much more rarely
# A client that lets more than this pile up is cut off; the others never notice.
MAX_BACKLOG_BYTES = 4 * 2**20
PROBE = Pong(nonce=0)


@dataclass(slots=True)
class Connection:
    """One client socket; `client` is the session's key and shared by all sockets of one client."""

    client: str
    backlog: deque[bytes] = field(default_factory=deque)
    backlog_bytes: int = 0
    quiet: bool = True  # nothing was sent since the last probe


class Connections:
    """All client sockets by their identity; owns the ROUTER socket.

    on_frames is called in the loop with what arrives, the identity first; on_gone with the identity of a
    connection that was lost, and returns how many of its requests that ended.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._connections: dict[bytes, Connection] = {}
        self.on_frames: Callable[[list[bytes]], None] = lambda frames: None
        self.on_gone: Callable[[bytes], int] = lambda identity: 0
        self._reader = SocketReader(socket, lambda frames: self.on_frames(frames))

    def __len__(self) -> int:
        """Return how many said hello and were not seen to go."""
        return len(self._connections)

    def enter(self, identity: bytes, client: str) -> None:
        """Note who said hello."""
        self._connections[identity] = Connection(client=client)

    def client_of(self, identity: bytes) -> str | None:
        """Return the client behind a connection, None if it did not say hello, or is gone."""
        connection = self._connections.get(identity)
        return None if connection is None else connection.client

    def close(self, linger_s: float) -> None:
        """Close the socket; its last messages have `linger_s` to leave."""
        self._reader.close(linger_s)

    def say_goodbye(self) -> None:
        """Tell all connections that the daemon stops."""
        for identity in list(self._connections):
            self.send(identity, GoingAway(text="the daemon is stopping"))

    def send(self, identity: bytes, message: Message) -> None:
        """Deliver a message, now or from the backlog; a connection that is gone is forgotten."""
        connection = self._connections.get(identity)
        if connection is None:
            return
        connection.quiet = False
        connection.backlog.append(codec.encode(message))
        connection.backlog_bytes += len(connection.backlog[-1])
        self._flush(identity, connection)

    def refuse(self, identity: bytes, request_id: str | None, error: SternaError) -> None:
        """Send an error, also to who has not said hello."""
        failed = Failed.of(request_id, error)
        if identity in self._connections:
            self.send(identity, failed)
            return
        try:
            self._reader.send([identity, codec.encode(failed)])
        except zmq.ZMQError:
            log.debug("client.unreachable")

    def _flush(self, identity: bytes, connection: Connection) -> None:
        try:
            while connection.backlog:
                self._reader.send([identity, connection.backlog[0]])
                connection.backlog_bytes -= len(connection.backlog.popleft())
        except zmq.Again:
            if connection.backlog_bytes > MAX_BACKLOG_BYTES:
                self._forget(identity, "too slow")
        except zmq.ZMQError as error:
            self._forget(identity, error.strerror)

    def _forget(self, identity: bytes, why: str) -> None:
        connection = self._connections.pop(identity, None)
        if connection is not None and (cancelled := self.on_gone(identity)):
            log.info("client.gone client=%s why=%r cancelled=%d", connection.client[:8], why, cancelled)

    async def probe(self, owners: Callable[[], Iterable[bytes]]) -> None:
        """Find connections that are gone, for ever: those with requests (`owners`) several times a second."""
        turn = 0
        while True:
            await asyncio.sleep(PROBE_S)
            turn += 1
            busy = set(owners())
            for identity, connection in list(self._connections.items()):
                if connection.backlog:
                    self._flush(identity, connection)
                elif identity in busy or turn % IDLE_PROBES == 0:
                    if connection.quiet:
                        self.send(identity, PROBE)
                    connection.quiet = True
