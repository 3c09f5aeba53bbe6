"""What both clients decide alike, without a socket or a clock: time is an argument, frames are bytes.

In here: building requests, liveness of a connection (`Link`), sorting replies by request (`route`), putting
answers together (`Answer`). Not in here: sending, receiving (`wire.py`), waiting (`client.py`,
`async_client.py`).
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar
from uuid import uuid4

from ...shm.errors import (
    Cancelled,
    DaemonUnreachable,
    EngineLost,
    ProtocolError,
    ShuttingDown,
    TooLong,
    UsageError,
    request_error,
)
from ..protocol import codec
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
    Ping,
    Pong,
    Refused,
    Reply,
    Report,
    Templated,
    TokenItem,
    Tokenized,
    TokenLogprob,
    Tokens,
    Welcome,
)
from ..protocol.sockets import unreachable
from .results import Chunk, Result

DEFAULT_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0
PING_AFTER_S = 2.0
LOST_AFTER_PING_S = 4.0
CANCEL_TIMEOUT_S = 1.0

# Key of what concerns the connection and no request; ids are never empty.
CONNECTION = ""

Event = (
    Accepted | TokenItem | Finished | Embedded | Failed | Report | Tokenized | Detokenized | Templated
    | Drained | Pong | Welcome | Refused | GoingAway
)  # fmt: skip


E = TypeVar("E", bound=Message)


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`; defaults and ranges are those of `messages.Generate`."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop: Sequence[str]
    logprobs: int | None
    prompt_logprobs: bool
    ignore_eos: bool
    add_bos: bool | None
    special: bool
    quality_budget: float | None
    lost_mass: float | None
    stepped: bool


def new_id() -> str:
    """Return a fresh id for a request or a client."""
    return uuid4().hex


def pong_key(nonce: int) -> str:
    """Return the key under which `route` files the answer to a ping."""
    return f"pong {nonce}"


def generate_message(
    prompt: str | None, token_ids: Sequence[int] | None, options: dict[str, Any]
) -> Generate:
    """Return the checked request; raises BadRequest for a wrong value, TypeError for an unknown option."""
    for name in options:
        if name not in GenerateOptions.__annotations__:
            near = difflib.get_close_matches(name, GenerateOptions.__annotations__, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}{hint}")
    fields: dict[str, Any] = {"id": new_id(), "prompt": prompt, **options}
    if token_ids is not None:
        fields["token_ids"] = plain_ids(token_ids)
    return codec.build(Generate, fields)


def plain_ids(token_ids: Sequence[int]) -> list[int]:
    """Return ids as plain integers, so that an array of NumPy is as good as a list; raises TypeError."""
    return [operator.index(t) for t in token_ids]


def check_process(made_in_pid: int, pid: int, closed: bool) -> None:
    """Refuse a client that was closed or carried over a fork; raises UsageError."""
    if pid != made_in_pid:
        raise UsageError(
            f"this client was made in process {made_in_pid} and is used in its fork {pid}: make one there"
        )
    if closed:
        raise UsageError("this client is closed")


def route(reply: Reply) -> list[tuple[str, Event]]:
    """Return the events in a reply, each with the id of its request, or CONNECTION."""
    match reply:
        case Tokens(items=items):
            return [(item.id, item) for item in items]
        case Pong(nonce=nonce):
            return [(pong_key(nonce), reply)]
        case Welcome() | Refused() | GoingAway():
            return [(CONNECTION, reply)]
        case Failed(id=None):
            return [(CONNECTION, reply)]
        case _:
            return [(str(reply.id), reply)]


def settle(event: Event, expected: type[E]) -> E:
    """Return the event if it is what the request asked for; raises the request's error, or ProtocolError."""
    if isinstance(event, (Failed, Refused)):
        raise request_error(event.code, event.text)
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


def went_away(url: str) -> DaemonUnreachable:
    """Return the error for a daemon that was there."""
    return DaemonUnreachable(f"the daemon at {url} went away")


def silent(url: str, timeout_s: float) -> DaemonUnreachable:
    """Return the error for a daemon that takes the connection and says nothing."""
    return unreachable(url, f"something holds the socket but gave no answer within {timeout_s:g} s")


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
        """Start to count anew: nobody listened before."""
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


class Answer:
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
                raise request_error(event.code, event.text)
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
