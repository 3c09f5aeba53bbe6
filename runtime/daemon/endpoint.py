"""The daemon's door: what clients send becomes calls, and what those return or raise becomes answers.

A connection is known after its `hello`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ...shm.errors import BadRequest, ProtocolError, SternaError
from ..protocol import codec
from ..protocol.messages import (
    ApplyTemplate,
    Cancel,
    Detokenize,
    Drain,
    Drained,
    Embed,
    Generate,
    Hello,
    Ping,
    Pong,
    Report,
    Request,
    Resize,
    Status,
    Tokenize,
    Welcome,
)
from ..text.tokenizer import Tokenizer
from .connections import Connections
from .conversions import MAX_CONVERTED_IN_LOOP, Asker, Conversions
from .service import Service
from .tasks import TaskSet


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorFigures:
    """What the endpoint counts."""

    connections: int
    """Connections that are open."""
    frames_refused: int
    """Frames that broke the protocol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """What clients may ask of the daemon as a whole."""

    report: Callable[[], Awaitable[dict[str, Any]]]
    """Return the body of its status."""
    drain: Callable[[], Awaitable[None]]
    """Finish what runs, take nothing new; return when nothing runs."""
    resize: Callable[[str], Awaitable[dict[str, Any]]]
    """Use as much memory as a size says; return what is held then."""


class Endpoint:
    """Decodes what clients send, hands it to the service, and sends what comes of it."""

    def __init__(
        self,
        connections: Connections,
        service: Service,
        tokenizer: Tokenizer,
        welcome: Welcome,
        controls: Controls,
        group: asyncio.TaskGroup,
    ) -> None:
        """Take what arrives on `connections` from now on; `group`: parent of the tasks that take longer."""
        self._connections = connections
        self._service = service
        self._welcome = welcome
        self._controls = controls
        self._tasks = TaskSet(group)
        self._conversions = Conversions(tokenizer, service, self._tasks, welcome.limits.max_queue)
        self._admitting: dict[tuple[str, str], bool] = {}  # (client, id) of long prompts: still wanted
        self._refused_frames = 0
        connections.on_frames = self._on_frames
        connections.on_gone = self._on_gone

    def figures(self) -> DoorFigures:
        """Return how many connections there are, and how many frames were refused."""
        return DoorFigures(connections=len(self._connections), frames_refused=self._refused_frames)

    def close(self) -> None:
        """Give up what is still being answered."""
        self._conversions.close()
        self._tasks.cancel()

    def owners(self) -> set[bytes]:
        """Return the connections that wait for an answer."""
        return {*self._service.owners(), *self._conversions.owners()}

    def _on_gone(self, identity: bytes) -> int:
        return self._conversions.forget_owner(identity) + self._service.forget_owner(identity)

    def _on_frames(self, frames: list[bytes]) -> None:
        identity = frames[0]
        frame = frames[1] if len(frames) == 2 else b""
        try:
            if len(frames) != 2:
                raise ProtocolError(f"expected one frame, found {len(frames) - 1}")
            self._handle(identity, codec.decode_request(frame), len(frame))
        except SternaError as error:
            self._refused_frames += isinstance(error, ProtocolError)
            self._connections.refuse(identity, codec.peek_id(frame), error)

    def _handle(self, identity: bytes, message: Request, frame_bytes: int) -> None:
        connections = self._connections
        if isinstance(message, Hello):
            connections.enter(identity, message.client)
            connections.send(identity, self._welcome)
            return
        client = connections.client_of(identity)
        if client is None:
            raise ProtocolError("the first message of a connection must be hello")
        match message:
            case Generate() | Embed():
                self._admit(identity, client, message, frame_bytes)
            case Cancel() if (client, message.id) in self._admitting:
                self._admitting[client, message.id] = False
            case Cancel():
                self._service.cancel(client, message.id)
            case Ping():
                connections.send(identity, Pong(nonce=message.nonce))
            case Tokenize() | Detokenize() | ApplyTemplate():
                self._conversions.answer(
                    message,
                    self._asker(identity, message.id, frame_bytes),
                    lambda answer: connections.send(identity, answer),
                )
            case Status():
                self._tasks.start(self._send_report(identity, message.id), "status")
            case Drain():
                self._tasks.start(self._send_drained(identity, message.id), "drain")
            case Resize():
                self._tasks.start(self._send_resized(identity, message), "resize")

    def _asker(self, identity: bytes, request_id: str, frame_bytes: int) -> Asker:
        return Asker(
            owner=identity,
            frame_bytes=frame_bytes,
            refuse=lambda error: self._connections.refuse(identity, request_id, error),
        )

    def _admit(self, identity: bytes, client: str, message: Generate | Embed, frame_bytes: int) -> None:
        """Hand a request to the service; a long prompt becomes tokens in a thread first."""
        if message.prompt is None or len(message.prompt) <= MAX_CONVERTED_IN_LOOP:
            self._hand_over(identity, client, message, None)
            return
        key = (client, message.id)
        if key in self._admitting:
            raise BadRequest(f"id: a request {message.id!r} is running already")

        def admit(ids: list[int]) -> None:
            if self._connections.client_of(identity) is not None:  # who has gone wants no answer
                self._hand_over(identity, client, message, ids)
                if not self._admitting[key]:
                    self._service.cancel(client, message.id)

        task = self._conversions.convert_prompt(
            message, self._asker(identity, message.id, frame_bytes), admit
        )
        self._admitting[key] = True
        task.add_done_callback(lambda _: self._admitting.pop(key, None))

    def _hand_over(
        self, identity: bytes, client: str, message: Generate | Embed, ids: list[int] | None
    ) -> None:
        if isinstance(message, Generate):
            self._service.generate(client, identity, message, ids)
        else:
            self._service.embed(client, identity, message, ids)

    async def _send_report(self, identity: bytes, request_id: str) -> None:
        self._connections.send(identity, Report(id=request_id, body=await self._controls.report()))

    async def _send_resized(self, identity: bytes, message: Resize) -> None:
        try:
            held = await self._controls.resize(message.memory)
            self._connections.send(identity, Report(id=message.id, body=held))
        except SternaError as error:
            self._connections.refuse(identity, message.id, error)

    async def _send_drained(self, identity: bytes, request_id: str) -> None:
        await self._controls.drain()
        self._connections.send(identity, Drained(id=request_id))
