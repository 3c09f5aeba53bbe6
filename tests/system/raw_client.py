"""A client that sends whatever bytes it is given, for tests of the daemon's door."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgpack
import zmq

PROTOCOL = 1
TIMEOUT_MS = 10_000


def frame(tag: str, **body: object) -> bytes:
    """Return a frame of the protocol, without any check of its fields."""
    return bytes(msgpack.packb([PROTOCOL, tag, body]))


class RawClient:
    """One DEALER socket; made by `raw_client`."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    def send(self, *frames: bytes) -> None:
        """Send frames as one multipart message."""
        self._socket.send_multipart(frames)

    def hello(self, client: str = "raw") -> dict[str, Any]:
        """Introduce this connection; return the body of the welcome."""
        self.send(frame("hello", client=client, version="0"))
        tag, body = self.receive()
        assert tag == "welcome"
        return body

    def receive(self) -> tuple[str, dict[str, Any]]:
        """Return tag and body of the next message, but no unasked pong."""
        while True:
            assert self._socket.poll(TIMEOUT_MS), "no answer"
            protocol, tag, body = msgpack.unpackb(self._socket.recv())
            assert protocol == PROTOCOL
            if (tag, body) != ("pong", {"nonce": 0}):
                return tag, body

    def failure(self, *frames: bytes) -> tuple[str | None, str, str]:
        """Send what must fail; return (id, code, text) of the one failure."""
        self.send(*frames)
        tag, body = self.receive()
        assert tag == "failed", (tag, body)
        assert "\n" not in body["text"]
        return body["id"], body["code"], body["text"]

    def drain(self) -> int:
        """Throw away all that has come; return how many messages."""
        count = 0
        while self._socket.poll(0):
            self._socket.recv()
            count += 1
        return count


@contextlib.contextmanager
def raw_client(url: str, identity: bytes = b"") -> Iterator[RawClient]:
    """Yield a connected client that has said nothing yet."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, TIMEOUT_MS)
        if identity:
            socket.setsockopt(zmq.ROUTING_ID, identity)
        socket.connect(url)
        yield RawClient(socket)
