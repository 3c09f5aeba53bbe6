"""An answer of the blocking client that comes in parts."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from ...shm.errors import SternaError
from ..protocol.messages import Cancel, Generate
from . import replies, requests
from .heartbeat import CANCEL_TIMEOUT_S
from .pool import ConnectionPool, wait_events
from .results import Chunk, Result
from .wire import Wire


class Stream(Iterator[Chunk]):
    """The parts of one answer as they come; `result` is the whole once they are exhausted.

    For one thread, except `cancel`. Closing it early, also by leaving a `with` block or by dropping the last
    reference, cancels the request on the daemon. Iterating raises the request's error.
    """

    def __init__(self, pool: ConnectionPool, request: Generate) -> None:
        self.id = request.id
        self.result: Result | None = None
        self._pool = pool
        self._answer = replies.ResultBuilder(request)
        self._chunks: deque[Chunk] = deque()
        self._wire: Wire | None = None
        self._wire = pool.take()
        try:
            self._wire.send(request)
        except BaseException:
            self._release(reusable=False)
            raise

    def __next__(self) -> Chunk:
        until_s = time.monotonic() + self._pool.timeout_s
        while not self._chunks:
            if self._wire is None:
                raise StopIteration
            if self._advance(self._wire, until_s):
                until_s = time.monotonic() + self._pool.timeout_s
            elif time.monotonic() >= until_s:
                self.close()
                raise replies.stalled(self.id, self._pool.timeout_s)
        return self._chunks.popleft()

    def read(self) -> Result:
        """Return the whole answer; what was iterated over before is part of it."""
        try:
            for _ in self:
                pass
        except BaseException:
            self.close()
            raise
        if self.result is None:
            raise replies.ended_early(self.id)
        return self.result

    def cancel(self) -> None:
        """End the answer, from any thread; the iteration goes on to its end, with reason `cancelled`."""
        if not self._answer.done:
            self._pool.run(requests.cancel(self.id))

    def close(self) -> None:
        """End the answer and the iteration; waits up to a second for the daemon to confirm."""
        wire = self._wire
        if wire is None:
            return
        until_s = time.monotonic() + CANCEL_TIMEOUT_S
        try:
            wire.send(Cancel(id=self.id))
            while self._wire is not None and time.monotonic() < until_s:
                self._advance(wire, until_s)
        except SternaError:
            pass  # the request has ended, one way or another
        finally:
            self._chunks.clear()
            self._release(reusable=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._wire is not None and not self._pool.forked:
            with contextlib.suppress(Exception):
                self.close()

    def _advance(self, wire: Wire, until_s: float) -> bool:
        """Take in what comes until then and tell whether any of it was for this answer.

        Raises whatever ends the answer, after the connection is released.
        """
        self._pool.check_process()
        mine = [event for key, event in self._await(wire, until_s) if key == self.id]
        try:
            for event in mine:
                self._chunks += self._answer.feed(event)
        except SternaError:
            self._release(reusable=self._answer.done)
            raise
        if self._answer.done:
            self.result = self._answer.result
            self._release(reusable=True)
        return bool(mine)

    def _await(self, wire: Wire, until_s: float) -> list[tuple[str, replies.Event]]:
        try:
            return wait_events(wire, until_s)
        except SternaError:
            self._release(reusable=False)
            raise

    def _release(self, *, reusable: bool) -> None:
        wire, self._wire = self._wire, None
        if wire is None:
            return
        if reusable:
            self._pool.give_back(wire)
        else:
            self._pool.discard(wire)
