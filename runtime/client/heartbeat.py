"""Whether the daemon at the other end of a connection lives, and how long clients wait for what.

In here: `Link`, which is handed frames and times. Not in here: sockets and clocks (`connection.py`).
"""

from __future__ import annotations

from ...shm.errors import DaemonUnreachable, TooLong
from ..protocol import codec
from ..protocol.messages import GoingAway, Message, Ping, Welcome
from .replies import Event, route

DEFAULT_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0
CANCEL_TIMEOUT_S = 1.0
PING_AFTER_S = 2.0
LOST_AFTER_PING_S = 4.0


class Link:
    """Liveness of one connection. Times are monotonic seconds.

    Silence of PING_AFTER_S makes a ping due; a ping unanswered for LOST_AFTER_PING_S means that the daemon is
    lost. Frames that wait are handed in before `beat` is asked: then a caller who was away loses nothing.
    """

    def __init__(self, url: str, now_s: float) -> None:
        self.url = url
        self.going_away = False
        self.max_frame_bytes = codec.MAX_FRAME_BYTES
        self._heard_s = now_s
        self._pinged_s: float | None = None
        self._nonce = 2**62  # apart from the nonces of users' pings

    def wake(self, now_s: float) -> None:
        """Start to count again: nobody listened before."""
        self._heard_s = now_s
        self._pinged_s = None

    def on_frame(self, frame: bytes, now_s: float) -> list[tuple[str, Event]]:
        """Return the events of a frame; raises ProtocolError for a bad one."""
        self.wake(now_s)
        events = route(codec.decode_reply(frame))
        for _, event in events:
            if isinstance(event, GoingAway):
                self.going_away = True
            elif isinstance(event, Welcome):
                self.max_frame_bytes = event.limits.max_frame_bytes
        return events

    def encode(self, message: Message) -> bytes:
        """Return the frame to send; raises TooLong when the daemon would not take it."""
        frame = codec.encode(message)
        if len(frame) > self.max_frame_bytes:
            raise TooLong(
                f"request of {len(frame)} bytes is over the daemon's limit of {self.max_frame_bytes}"
            )
        return frame

    def beat(self, now_s: float) -> bytes | None:
        """Return a ping to send if one is due; raises DaemonUnreachable when the last one was in vain."""
        if self._pinged_s is not None:
            if now_s - self._pinged_s >= LOST_AFTER_PING_S:
                silent_s = now_s - self._heard_s
                raise DaemonUnreachable(f"the daemon at {self.url} has not answered for {silent_s:.0f} s")
            return None
        if now_s - self._heard_s < PING_AFTER_S:
            return None
        self._pinged_s = now_s
        self._nonce += 1
        return codec.encode(Ping(nonce=self._nonce))

    def wait_s(self, now_s: float) -> float:
        """Return how long nothing has to be done without a frame."""
        if self._pinged_s is not None:
            return max(0.0, self._pinged_s + LOST_AFTER_PING_S - now_s)
        return max(0.0, self._heard_s + PING_AFTER_S - now_s)
