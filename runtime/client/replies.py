"""What comes back to a client, and what it means. No socket, no clock.

In here: sorting replies by request (`route`), the error or the value in one (`settle`), putting the parts of
an answer together (`ResultBuilder`), and the errors that clients find themselves. Not in here: what is sent
(`requests.py`), receiving (`connection.py`), waiting (`pool.py`, `channel.py`).
"""

from __future__ import annotations

from typing import TypeVar

from ...shm.errors import (
    Cancelled,
    DaemonUnreachable,
    EngineLost,
    ProtocolError,
    ShuttingDown,
    request_error,
)
from ..protocol.messages import (
    Accepted,
    Detokenized,
    Drained,
    Embedded,
    Failed,
    Finished,
    Generate,
    GoingAway,
    Message,
    Pong,
    Reply,
    Report,
    Templated,
    Timings,
    TokenItem,
    Tokenized,
    TokenLogprob,
    Tokens,
    Usage,
    Welcome,
)
from ..protocol.sockets import unreachable
from .results import Chunk, Result

CONNECTION = ""
"""Key of what concerns the connection and no request; ids are never empty."""

Event = (
    Accepted | TokenItem | Finished | Embedded | Failed | Report | Tokenized | Detokenized | Templated
    | Drained | Pong | Welcome | GoingAway
)  # fmt: skip


E = TypeVar("E", bound=Message)


def pong_key(nonce: int) -> str:
    """Return the key under which `route` files the answer to a ping."""
    return f"pong {nonce}"


def route(reply: Reply) -> list[tuple[str, Event]]:
    """Return the events in a reply, each with the id of its request, or CONNECTION."""
    match reply:
        case Tokens(items=items):
            return [(item.id, item) for item in items]
        case Pong(nonce=nonce):
            return [(pong_key(nonce), reply)]
        case Welcome() | GoingAway():
            return [(CONNECTION, reply)]
        case Failed(id=None):
            return [(CONNECTION, reply)]
        case _:
            return [(str(reply.id), reply)]


def settle(event: Event, expected: type[E]) -> E:
    """Return the event if it is what the request asked for; raises the request's error, or ProtocolError."""
    if isinstance(event, Failed):
        raise request_error(event.code, event.text, event.retry_after_s)
    if isinstance(event, GoingAway):
        raise ShuttingDown(event.text)
    if not isinstance(event, expected):
        raise ProtocolError(f"expected {expected.__name__}, found {type(event).__name__}")
    return event


def stalled(request_id: str, timeout_s: float) -> EngineLost:
    """Return the error for an answer that does not go on though the daemon lives."""
    return EngineLost(f"request {request_id}: nothing came for {timeout_s:g} s (timeout_s); it was cancelled")


def ended_early(request_id: str) -> Cancelled:
    """Return the error for who asks for the whole of an answer that was closed."""
    return Cancelled(f"request {request_id}: closed by this client before its end")


def never_sent(request_id: str) -> Finished:
    """Return the end of a request that was cancelled before it was sent: nothing read, nothing written."""
    return Finished(
        id=request_id,
        reason="cancelled",
        text="",
        usage=Usage(prompt_tokens=0, completion_tokens=0),
        timings=Timings(queue_s=0.0, prefill_s=0.0, decode_s=0.0),
        seed=0,
    )


def went_away(url: str) -> DaemonUnreachable:
    """Return the error for a daemon that was there."""
    return DaemonUnreachable(f"the daemon at {url} went away")


def silent(url: str, timeout_s: float) -> DaemonUnreachable:
    """Return the error for a daemon that takes the connection and says nothing."""
    return unreachable(url, f"something holds the socket but gave no answer within {timeout_s:g} s")


class ResultBuilder:
    """One answer while it comes in; `result` is set by its end, `done` also by its failure."""

    def __init__(self, request: Generate) -> None:
        self.id = request.id
        self.done = False
        self.result: Result | None = None
        self._prompt_token_ids: tuple[int, ...] = ()
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if request.logprobs is None else []

    def feed(self, event: Event) -> list[Chunk]:
        """Take an event of this request and return what is new for the user.

        Raises the request's error, or ProtocolError if tokens are missing.
        """
        match event:
            case Accepted():
                self._prompt_token_ids = tuple(event.prompt_token_ids)
                return []
            case TokenItem():
                return [self._take(event)]
            case Finished():
                return self._finish(event)
            case Failed():
                self.done = True
                raise request_error(event.code, event.text, event.retry_after_s)
            case _:
                raise ProtocolError(f"request {self.id}: a {type(event).__name__} is no part of an answer")

    def _take(self, item: TokenItem) -> Chunk:
        if item.index != len(self._token_ids):
            raise ProtocolError(
                f"request {self.id}: expected token {len(self._token_ids)}, found {item.index}"
            )
        self._texts.append(item.text)
        self._token_ids += item.token_ids
        if self._logprobs is not None:
            self._logprobs += item.logprobs or []
        logprobs = None if item.logprobs is None else tuple(item.logprobs)
        return Chunk(text=item.text, token_ids=tuple(item.token_ids), logprobs=logprobs)

    def _finish(self, end: Finished) -> list[Chunk]:
        self._texts.append(end.text)
        self.done = True
        self.result = Result(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=None if end.prompt_logprobs is None else tuple(end.prompt_logprobs),
            finish_reason=end.reason,
            usage=end.usage,
            timings=end.timings,
            seed=end.seed,
            routing=end.routing,
        )
        return [Chunk(text=end.text, token_ids=(), logprobs=None)] if end.text else []
