"""The daemon's door: client connections on a ROUTER socket, their frames, their backlog.

A connection is known after its `hello`. ZeroMQ does not say when one goes: whatever is sent to it
then fails with EHOSTUNREACH, so connections with requests are probed with an unasked `pong` when
nothing else was sent to them for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import zmq

from ...shm.errors import Overloaded, ProtocolError, SternaError, TooLong
from ..protocol import codec
from ..protocol.messages import (
    ApplyTemplate,
    Cancel,
    Detokenize,
    Detokenized,
    Drain,
    Drained,
    Embed,
    Failed,
    Generate,
    GoingAway,
    Hello,
    Message,
    Ping,
    Pong,
    Report,
    Request,
    Resize,
    Status,
    Templated,
    Tokenize,
    Tokenized,
    Welcome,
    tag_of,
)
from ..text.tokenizer import Tokenizer
from .service import Service
from .socket_reader import SocketReader

log = logging.getLogger("sterna.endpoint")

PROBE_S = 0.2
IDLE_PROBES = 50  # connections without requests are probed that much more rarely
# A client that lets so much pile up is cut off; the others never notice.
MAX_BACKLOG_BYTES = 4 * 2**20
PROBE = Pong(nonce=0)
# Characters or token ids; ten thousand take some 5 ms.
MAX_CONVERTED_IN_LOOP = 10_000
MAX_CONVERTED = 2**20
MAX_CONVERSIONS = 16


@dataclass(slots=True)
class Connection:
    """One client socket; `client` is the session's key and shared by all sockets of one client."""

    client: str
    backlog: deque[bytes] = field(default_factory=deque)
    backlog_bytes: int = 0
    quiet: bool = True  # nothing was sent since the last probe


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorFigures:
    """What the endpoint counts."""

    connections: int
    """Connections that are open."""
    frames_refused: int
    """Frames that broke the protocol."""


class Endpoint:
    """Decodes what clients send, hands it to the service, and delivers what the service says."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        tokenizer: Tokenizer,
        welcome: Welcome,
        report: Callable[[], Awaitable[dict[str, Any]]],
        drain: Callable[[], Awaitable[None]],
        resize: Callable[[str], Awaitable[dict[str, Any]]],
        group: asyncio.TaskGroup,
    ) -> None:
        self._tokenizer = tokenizer
        self._welcome = welcome
        self._report = report
        self._drain = drain
        self._resize = resize
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()
        self._converting = asyncio.Lock()  # one at a time: the other cores compute
        self._rendering = asyncio.Lock()  # has a process of its own, which may take seconds
        self._num_converting = 0
        self._admitting: dict[tuple[str, str], bool] = {}  # (client, id) of long prompts: still wanted
        self._connections: dict[bytes, Connection] = {}
        self._service: Service | None = None
        self.refused_frames = 0
        self._reader = SocketReader(socket, self._on_frames)

    def attach(self, service: Service) -> None:
        """Say who answers requests; before that none are taken."""
        self._service = service

    def figures(self) -> DoorFigures:
        """Return how many connections said hello and were not seen to go, and what was refused."""
        return DoorFigures(connections=len(self._connections), frames_refused=self.refused_frames)

    def close(self, linger_s: float) -> None:
        """Close the socket, leaving its last messages so long, and give up what is still being answered."""
        for task in self._tasks:
            task.cancel()
        self._reader.close(linger_s)

    def say_goodbye(self) -> None:
        """Tell all connections that the daemon stops."""
        for identity in list(self._connections):
            self.send(identity, GoingAway(text="the daemon is stopping"))

    # ---- sending ----

    def send(self, identity: bytes, message: Message) -> None:
        """Deliver a message, now or from the backlog; a connection that is gone is forgotten."""
        connection = self._connections.get(identity)
        if connection is None:
            return
        connection.quiet = False
        connection.backlog.append(codec.encode(message))
        connection.backlog_bytes += len(connection.backlog[-1])
        self._flush(identity, connection)

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
        if connection is None or self._service is None:
            return
        cancelled = self._service.forget_owner(identity)
        if cancelled:
            log.info("client.gone client=%s why=%r cancelled=%d", connection.client[:8], why, cancelled)

    async def probe(self) -> None:
        """Find connections that are gone, for ever: twice a second those with requests."""
        turn = 0
        while True:
            await asyncio.sleep(PROBE_S)
            turn += 1
            busy = set(self._service.owners()) if self._service else set()
            for identity, connection in list(self._connections.items()):
                if connection.backlog:
                    self._flush(identity, connection)
                elif identity in busy or turn % IDLE_PROBES == 0:
                    if connection.quiet:
                        self.send(identity, PROBE)
                    connection.quiet = True

    # ---- receiving ----

    def _on_frames(self, frames: list[bytes]) -> None:
        identity = frames[0]
        frame = frames[1] if len(frames) == 2 else b""
        try:
            if len(frames) != 2:
                raise ProtocolError(f"expected one frame, found {len(frames) - 1}")
            self._handle(identity, codec.decode_request(frame))
        except SternaError as error:
            self.refused_frames += isinstance(error, ProtocolError)
            self._refuse(identity, codec.peek_id(frame), error)

    def _refuse(self, identity: bytes, request_id: str | None, error: SternaError) -> None:
        failed = Failed(id=request_id, code=error.code, text=str(error), retryable=error.retryable)
        if identity in self._connections:
            self.send(identity, failed)
            return
        try:
            self._reader.send([identity, codec.encode(failed)])
        except zmq.ZMQError:
            log.debug("client.unreachable")

    def _handle(self, identity: bytes, message: Request) -> None:
        if isinstance(message, Hello):
            self._connections[identity] = Connection(client=message.client)
            self.send(identity, self._welcome)
            return
        connection = self._connections.get(identity)
        if connection is None:
            raise ProtocolError("the first message of a connection must be hello")
        if self._service is None:
            raise ProtocolError("the daemon is still starting")
        match message:
            case Generate() | Embed():
                self._admit(identity, connection.client, message)
            case Cancel() if (connection.client, message.id) in self._admitting:
                self._admitting[connection.client, message.id] = False
            case Cancel():
                self._service.cancel(connection.client, message.id)
            case Ping():
                self.send(identity, Pong(nonce=message.nonce))
            case Tokenize(text=text):
                self._convert(identity, message, len(text))
            case Detokenize(token_ids=token_ids):
                self._convert(identity, message, len(token_ids))
            case ApplyTemplate():
                self._convert_in_thread(identity, message)
            case Status():
                self._start(self._send_report(identity, message.id), "status")
            case Drain():
                self._start(self._send_drained(identity, message.id), "drain")
            case Resize():
                self._start(self._send_resized(identity, message), "resize")

    def _start(self, answer: Coroutine[Any, Any, None], name: str) -> None:
        task = self._group.create_task(answer, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _admit(self, identity: bytes, client: str, message: Generate | Embed) -> None:
        """Hand a request to the service; a long prompt becomes tokens in a thread first."""
        if message.prompt is None or len(message.prompt) <= MAX_CONVERTED_IN_LOOP:
            self._hand_over(identity, client, message, None)
        elif self._num_converting >= MAX_CONVERSIONS:
            raise Overloaded(f"{self._num_converting} long texts are being converted already")
        else:
            self._start(self._admit_long(identity, client, message), "admit")

    def _hand_over(
        self, identity: bytes, client: str, message: Generate | Embed, ids: list[int] | None
    ) -> None:
        if self._service is None:
            raise ProtocolError("the daemon is still starting")
        if isinstance(message, Generate):
            self._service.generate(client, identity, message, ids)
        else:
            self._service.embed(client, identity, message, ids)

    async def _admit_long(self, identity: bytes, client: str, message: Generate | Embed) -> None:
        key = (client, message.id)
        self._admitting[key] = True
        self._num_converting += 1
        try:
            if self._service is None:
                raise ProtocolError("the daemon is still starting")
            async with self._converting:
                ids = await asyncio.to_thread(self._service.prompt_ids, message)
            if identity in self._connections:  # who has gone wants no answer
                self._hand_over(identity, client, message, ids)
                if not self._admitting[key]:
                    self._service.cancel(client, message.id)
        except SternaError as error:
            self._refuse(identity, message.id, error)
        finally:
            self._num_converting -= 1
            self._admitting.pop(key, None)

    def _convert(self, identity: bytes, message: Tokenize | Detokenize, size: int) -> None:
        """Answer now what is short, and in a thread what would hold up everybody else."""
        if size <= MAX_CONVERTED_IN_LOOP:
            self.send(identity, self._converted(message))
        elif size > MAX_CONVERTED:
            raise TooLong(f"{tag_of(type(message))}: expected at most {MAX_CONVERTED} items, found {size}")
        else:
            self._convert_in_thread(identity, message)

    def _convert_in_thread(self, identity: bytes, message: Tokenize | Detokenize | ApplyTemplate) -> None:
        if self._num_converting >= MAX_CONVERSIONS:
            raise Overloaded(f"{self._num_converting} long texts are being converted already")
        self._start(self._send_converted(identity, message), "convert")

    def _converted(self, message: Tokenize | Detokenize | ApplyTemplate) -> Message:
        if isinstance(message, ApplyTemplate):
            return Templated(id=message.id, text=self._rendered(message))
        if isinstance(message, Detokenize):
            return Detokenized(id=message.id, text=self._tokenizer.decode(message.token_ids))
        ids = self._tokenizer.encode(message.text, add_bos=message.add_bos, special=message.special)
        return Tokenized(id=message.id, token_ids=ids)

    def _rendered(self, message: ApplyTemplate) -> str:
        if self._service is None:
            raise ProtocolError("the daemon is still starting")
        # The time of day where the daemon is: what templates print as "today".
        return self._service.apply_template(message, datetime.now())

    async def _send_converted(self, identity: bytes, message: Tokenize | Detokenize | ApplyTemplate) -> None:
        self._num_converting += 1
        try:
            async with self._rendering if isinstance(message, ApplyTemplate) else self._converting:
                self.send(identity, await asyncio.to_thread(self._converted, message))
        except SternaError as error:
            self._refuse(identity, message.id, error)
        finally:
            self._num_converting -= 1

    async def _send_report(self, identity: bytes, request_id: str) -> None:
        self.send(identity, Report(id=request_id, body=await self._report()))

    async def _send_resized(self, identity: bytes, message: Resize) -> None:
        try:
            self.send(identity, Report(id=message.id, body=await self._resize(message.memory)))
        except SternaError as error:
            self._refuse(identity, message.id, error)

    async def _send_drained(self, identity: bytes, request_id: str) -> None:
        await self._drain()
        self.send(identity, Drained(id=request_id))
