"""An answer of the asyncio client that comes in parts."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from ...shm.errors import SternaError
from ..protocol.messages import Generate
from . import replies
from .channel import Channel, Mailbox
from .results import Chunk, Result


class AsyncStream(AsyncIterator[Chunk]):
    """The parts of one answer as they come; `result` is the whole once they are exhausted.

    The request is sent by `async with` or by the first step of the iteration. Closing it early, also by
    dropping the last reference, cancels the request on the daemon. Iterating raises the request's error.
    """

    def __init__(self, channel: Channel, request: Generate) -> None:
        self.id = request.id
        self.result: Result | None = None
        self._channel = channel
        self._request = request
        self._answer = replies.ResultBuilder(request)
        self._chunks: deque[Chunk] = deque()
        self._box: Mailbox | None = None
        self._ended = False

    async def start(self) -> None:
        """Send the request unless it was sent; it may have to wait for its turn, which this does not."""
        if self._box is not None or self._ended:
            return
        self._box = await self._channel.open(self._request)

    async def __anext__(self) -> Chunk:
        await self.start()
        while not self._chunks:
            if self._ended or self._box is None:
                raise StopAsyncIteration
            try:
                self._chunks += self._answer.feed(await self._next_event(self._box))
            except SternaError:
                await self.aclose()
                raise
            if self._answer.done:
                self.result = self._answer.result
                self._end()
        return self._chunks.popleft()

    async def read(self) -> Result:
        """Return the whole answer; what was iterated over before is part of it."""
        async with self:
            async for _ in self:
                pass
        if self.result is None:
            raise replies.ended_early(self.id)
        return self.result

    async def cancel(self) -> None:
        """End the answer; the iteration goes on to its end, with reason `cancelled`."""
        if self._box is not None and not self._ended:
            await self._channel.cancel(self.id)

    async def aclose(self) -> None:
        """End the answer and the iteration at once; the daemon is told without waiting for it."""
        if self._box is not None and not self._ended and not self._answer.done:
            self._channel.abandon(self.id)
        self._chunks.clear()
        self._end()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._box is not None and not self._ended:
            self._channel.abandon_soon(self.id)  # the collector may run in any thread

    async def _next_event(self, box: Mailbox) -> replies.Event:
        event = await self._channel.next_event(box, self.id)
        if event is None:
            raise replies.stalled(self.id, self._channel.timeout_s)
        return event

    def _end(self) -> None:
        self._ended = True
        self._channel.end(self.id)
