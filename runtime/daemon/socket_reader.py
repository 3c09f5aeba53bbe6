"""A ZeroMQ socket in an asyncio loop: every frame that comes in is handed to a callback.

ZeroMQ's descriptor is edge-triggered and stands for the whole socket: after each read *and* each
send the socket must be asked again what is pending. Reading happens in the callback of the loop,
never in a coroutine that could be cancelled between taking a message and using it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq

# The most messages taken in one turn of the event loop.
BURST = 64


class SocketReader:
    """Feeds `on_frames` with multipart messages; `send` never blocks."""

    def __init__(self, socket: zmq.Socket[bytes], on_frames: Callable[[list[bytes]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = socket
        self._on_frames = on_frames
        self._fd = int(socket.getsockopt(zmq.FD))
        self._closed = False
        self._again = False
        self._loop.add_reader(self._fd, self._read)
        self._later()

    def send(self, frames: Sequence[bytes]) -> None:
        """Send at once; raises zmq.Again when the peer is slow, ZMQError(EHOSTUNREACH) when it is gone."""
        try:
            self._socket.send_multipart(frames, flags=zmq.DONTWAIT)
        finally:
            self._later()

    def close(self, linger_s: float = 0.0) -> None:
        """Stop reading and close the socket; unsent messages may take `linger_s` when the context ends."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(int(linger_s * 1000))

    def _later(self) -> None:
        if not self._again and not self._closed:
            self._again = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._again = False
        for _ in range(BURST):
            if self._closed:
                return
            try:
                frames = self._socket.recv_multipart(flags=zmq.DONTWAIT)
            except zmq.Again:
                return
            self._on_frames(frames)
        self._later()
