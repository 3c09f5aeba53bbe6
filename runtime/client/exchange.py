"""Calls as both clients carry them out: what to send, which replies to wait for, what they are worth.

In here: `Exchange`, and the ones with a single reply. The blocking client runs an exchange over a connection
of its own (`pool.py`), the asyncio client over the one that all its calls share (`channel.py`). Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Generic, Protocol, TypeVar

from ...shm.errors import SternaError
from ..protocol.messages import Cancel, Failed, Message, Ping, Pong
from .replies import E, Event, pong_key, settle, silent

T = TypeVar("T", covariant=True)


class Exchange(Protocol[T]):
    """Requests and replies that make one call; it is driven until `done`, then asked for its `result`."""

    @property
    def done(self) -> bool:
        """Whether no more replies are needed."""

    @property
    def keys(self) -> Collection[str]:
        """The keys, as `replies.route` gives them, of the replies that are awaited now."""

    @property
    def in_flight(self) -> Collection[str]:
        """Ids of requests, oldest first, that are cancelled if the caller stops waiting."""

    def due(self) -> Iterable[Message]:
        """Yield what is to be sent now, each message once."""

    def feed(self, event: Event) -> None:
        """Take in a reply under one of `keys`; raises what ends the call at once."""

    def overdue(self, url: str, timeout_s: float) -> SternaError:
        """Return the error for a daemon that lives but sent no reply for `timeout_s`."""

    def result(self) -> T:
        """Return what the call is worth; raises the request's error."""


class _OneReply:
    """What exchanges share that send all at once and end with the first reply."""

    def __init__(self, messages: list[Message], keys: Collection[str]) -> None:
        self.keys = keys
        self.in_flight: Collection[str] = ()
        self.reply: Event | None = None
        self._messages = messages

    @property
    def done(self) -> bool:
        return self.reply is not None

    def due(self) -> Iterable[Message]:
        messages, self._messages = self._messages, []
        return messages

    def feed(self, event: Event) -> None:
        # Not settled here: a request that failed leaves the connection as good as before.
        self.reply = self.reply or event

    def overdue(self, url: str, timeout_s: float) -> SternaError:
        return silent(url, timeout_s)


class Call(_OneReply, Generic[E]):
    """One request and its one reply of class `expected`."""

    def __init__(self, request: Message, key: str, expected: type[E]) -> None:
        super().__init__([request], (key,))
        self._expected = expected

    def result(self) -> E:
        """Return the reply; raises the request's error, or ProtocolError."""
        if self.reply is None:
            raise RuntimeError("this call has no reply yet")
        return settle(self.reply, self._expected)


class CancelCall(_OneReply):
    """The end of a request that another connection may have sent.

    The pong tells that the daemon has read the cancel; a complaint comes before it.
    """

    def __init__(self, cancel: Cancel, ping: Ping) -> None:
        super().__init__([cancel, ping], (pong_key(ping.nonce), cancel.id))

    def result(self) -> None:
        """Raise NotFound if there was no such request."""
        if isinstance(self.reply, Failed):
            settle(self.reply, Pong)
