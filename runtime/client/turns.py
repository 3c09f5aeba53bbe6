"""Whose turn it is to send: requests over one connection wait here for those before them. Pure.

A daemon refuses a request when its queue is full. A client that has more to ask than the queue holds keeps
the rest here, in the order of arrival, and sends one whenever another ends.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..protocol.messages import Embedded, Failed, Finished, Limits
from .replies import Event


class Turns:
    """The requests of one connection: those that were sent and have no end yet, and those that wait.

    Times are monotonic seconds.
    """

    def __init__(self) -> None:
        self._max_in_flight = 1
        self._sent_s: dict[str, float] = {}
        self._waiting: dict[str, bytes] = {}
        self._heard_s = 0.0

    def restart(self, limits: Limits, now_s: float) -> None:
        """Begin again: there is a new connection, to a daemon with these limits."""
        # What the daemon's queue holds. It computes sequences besides, but those do not count: one that was
        # cancelled has ended for us before its place is free for a request that waits there.
        self._max_in_flight = max(limits.max_queue, limits.max_sequences, 1)
        self._heard_s = now_s
        self.clear()

    def clear(self) -> None:
        """Forget all requests: the connection is gone."""
        self._sent_s.clear()
        self._waiting.clear()

    @property
    def num_open(self) -> int:
        """Requests that wait, or whose end has not come."""
        return len(self._sent_s) + len(self._waiting)

    def add(self, request_id: str, frame: bytes) -> None:
        """Let a request wait at the end of the line; `frame` is what is sent when its turn comes."""
        self._waiting[request_id] = frame

    def due(self, now_s: float) -> Iterator[bytes]:
        """Yield the frames whose turn has come, each once; they are in flight then."""
        while self._waiting and len(self._sent_s) < self._max_in_flight:
            request_id = next(iter(self._waiting))
            self._sent_s[request_id] = now_s
            yield self._waiting.pop(request_id)

    def withdraw(self, request_id: str) -> bool:
        """Take a request out of the line; False if it does not wait: it was sent, or there is none."""
        return self._waiting.pop(request_id, None) is not None

    def feed(self, key: str, event: Event, now_s: float) -> None:
        """Note a reply: the end of a request in flight is the turn of another."""
        if key in self._sent_s:
            self._heard_s = now_s
            if isinstance(event, (Finished, Embedded, Failed)):
                del self._sent_s[key]

    def quiet_since_s(self, request_id: str) -> float:
        """Return when the wait for a reply began: when it was sent, or the last reply to those before it."""
        return self._heard_s if request_id in self._waiting else self._sent_s.get(request_id, 0.0)
