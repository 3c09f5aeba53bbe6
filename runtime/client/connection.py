"""One connection of a client to the daemon; every call returns at once.

In here: a DEALER with its monitor and its `Link`, and the frames that ZeroMQ does not take yet. Not in here:
waiting for it, which is a poll in `pool.py` and the event loop in `channel.py`.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import zmq

from ...shm.errors import OutOfResources
from ..protocol.messages import Message
from ..protocol.sockets import client_socket, probe
from .heartbeat import Link
from .replies import Event, went_away

_LOSS = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
# One frame after another, but a daemon in full flow must not keep the caller from its own work.
_MAX_FRAMES_AT_ONCE = 64
# ZeroMQ reports a lost connection a moment before it hands over the last frames of it.
_LAST_FRAMES_S = 0.02


class ClientConnection:
    """A connection that one thread uses at a time; the owner closes it.

    Making one raises DaemonUnreachable at once if nobody listens, NotPermitted and OutOfResources.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], url: str) -> None:
        probe(url)
        self.url = url
        self.link = Link(url, time.monotonic())
        self._lost_s = 0.0
        self._unsent: deque[bytes] = deque()
        try:
            self.socket: zmq.Socket[bytes] = client_socket(context)
            try:
                # Without a monitor a DEALER waits in silence for a daemon that was killed.
                self.monitor: zmq.Socket[Any] = self.socket.get_monitor_socket(_LOSS)
                self.socket.connect(url)
            except BaseException:
                self.socket.close(0)
                raise
        except zmq.ZMQError as e:
            raise OutOfResources(f"no socket for {url}: {e.strerror}") from None

    def send(self, message: Message) -> None:
        """Send a message as soon as ZeroMQ takes it, after those before it; raises TooLong and BadRequest."""
        self.send_frame(self.link.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send an encoded message as `send` does; what is not taken now is tried again by `receive`."""
        self._unsent.append(frame)
        self._flush()

    def receive(self) -> list[tuple[str, Event]]:
        """Return the events that are here, perhaps none; send what can be sent and keep the heartbeat.

        Raises DaemonUnreachable when the daemon is gone and what it sent is read; ProtocolError.
        """
        while self.monitor.poll(0):
            self.monitor.recv_multipart(zmq.NOBLOCK)
            self._lost_s = self._lost_s or time.monotonic()
            self.link.going_away = True
        events: list[tuple[str, Event]] = []
        for _ in range(_MAX_FRAMES_AT_ONCE):
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            events += self.link.on_frame(frame, time.monotonic())
        # After reading, in which ZeroMQ learns what the other end has taken.
        self._flush()
        if not events:
            self._keep_alive(time.monotonic())
        return events

    @property
    def poll_flags(self) -> int:
        """What `socket` is to be polled for."""
        return zmq.POLLIN | zmq.POLLOUT if self._unsent else zmq.POLLIN

    @property
    def is_ready(self) -> bool:
        """Whether `receive` has something to read or to send right now."""
        return bool(int(self.socket.getsockopt(zmq.EVENTS)) & self.poll_flags)

    @property
    def lost(self) -> bool:
        """Whether the connection broke; `receive` raises as soon as the last frames are read."""
        return self._lost_s > 0

    def wait_s(self) -> float:
        """Return how long `receive` need not be called unless a socket becomes readable."""
        return _LAST_FRAMES_S if self._lost_s else self.link.wait_s(time.monotonic())

    def is_reusable(self) -> bool:
        """Tell whether a new call can use this connection that lay idle; what came late is thrown away."""
        self.link.wake(time.monotonic())
        try:
            while self.receive():
                pass
        except Exception:
            return False
        return not self.link.going_away

    def close(self) -> None:
        """Close at once; what was not sent yet is dropped."""
        if not self.socket.closed:
            self.socket.disable_monitor()
            self.monitor.close(0)
            self.socket.close(0)

    def _flush(self) -> None:
        while self._unsent:
            try:
                self.socket.send(self._unsent[0], zmq.NOBLOCK)
            except zmq.Again:
                return  # it is full; a daemon that is gone shows in the monitor or the heartbeat
            self._unsent.popleft()

    def _keep_alive(self, now_s: float) -> None:
        if self._lost_s:
            if now_s - self._lost_s >= _LAST_FRAMES_S:
                raise went_away(self.url)
        elif (ping := self.link.beat(now_s)) is not None:
            self.send_frame(ping)
