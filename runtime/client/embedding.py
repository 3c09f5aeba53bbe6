"""The clients' `embed`: many texts as vectors, some of them in flight at a time.

In here: the requests of one call and their order (`Embedding`), and `embed` of both clients. Not in here:
what a vector is (`scheduler/pooling.py`), connections (`client.py`, `async_client.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...shm.errors import BadRequest, Overloaded
from ..protocol import codec
from ..protocol.messages import Embed, Embedded, Failed
from . import replies as core

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .async_client import AsyncClient
    from .client import Client

Text = str | Sequence[int]
"""Text, or the token ids of one."""

WINDOW = 16  # requests in flight: as many as a daemon computes at a time unless it was told otherwise


def embed_texts(
    client: Client, texts: Text | Sequence[Text], *, pooling: str | None = None, normalize: bool = True
) -> npt.NDArray[np.float32]:
    """Return the vectors of texts, float32 (len(texts), d_model), or (d_model,) of a single text.

    A text may be given as its token ids. `pooling`: "mean" of the hidden states after the final norm, the
    first ("cls") or the "last"; None: as the model's file says, else the last. `normalize`: to length 1.
    Raises BadRequest for a wrong value before anything is sent, TooLong for a text longer than the context.
    """
    from .client import wait_events

    run = Embedding(texts, pooling, normalize)
    with client._borrowed() as wire:
        while not run.done:
            for request in run.due():
                wire.send(request)
            events = wait_events(wire, time.monotonic() + client.timeout_s)
            if not events:
                raise core.stalled(run.first_in_flight, client.timeout_s)
            for key, event in events:
                if key in run.in_flight:
                    run.feed(event)
    return run.result()


async def embed_texts_async(
    client: AsyncClient, texts: Text | Sequence[Text], *, pooling: str | None = None, normalize: bool = True
) -> npt.NDArray[np.float32]:
    """Return the vectors of texts; see `embed_texts`. A cancelled task cancels its requests on the daemon."""
    run = Embedding(texts, pooling, normalize)
    wire = await client._connected()
    box: asyncio.Queue[Any] = asyncio.Queue()
    try:
        while not run.done:
            for request in run.due():
                client._mailboxes[request.id] = box
                client._send(wire, request)
            run.feed(await client._next(box, run.first_in_flight))
    finally:
        for request_id in run.ids:
            client._mailboxes.pop(request_id, None)
        for request_id in run.in_flight:
            client._abandon(request_id)
    return run.result()


class Embedding:
    """The requests of one call: which are due or in flight, and their vectors. No socket, no clock."""

    def __init__(self, texts: Text | Sequence[Text], pooling: str | None, normalize: bool) -> None:
        # A row of token ids, also an array of NumPy: its items are whole numbers, and those have no length.
        self._single = isinstance(texts, str) or (len(texts) > 0 and not hasattr(texts[0], "__len__"))
        each: Sequence[Any] = [texts] if self._single else texts
        if not len(each):
            raise BadRequest("texts: expected at least one, found none")
        self._requests = [_request(text, pooling, normalize) for text in each]
        self._vectors: list[bytes] = [b""] * len(each)
        self._waiting = deque(range(len(each)))
        self._window = WINDOW
        self.in_flight: dict[str, int] = {}

    @property
    def done(self) -> bool:
        """Whether all vectors are here."""
        return not self._waiting and not self.in_flight

    @property
    def ids(self) -> list[str]:
        """The ids of all requests."""
        return [request.id for request in self._requests]

    @property
    def first_in_flight(self) -> str:
        """The id of the request that has waited longest, for messages."""
        return next(iter(self.in_flight), "")

    def due(self) -> Iterator[Embed]:
        """Yield the requests to be sent now; they are in flight then."""
        while self._waiting and len(self.in_flight) < self._window:
            number = self._waiting.popleft()
            request = self._requests[number]
            self.in_flight[request.id] = number
            yield request

    def feed(self, event: core.Event) -> None:
        """Take in the answer to a request in flight; raises the request's error, or ProtocolError.

        A full queue is an error only when none of ours is in it: else fewer are sent from then on.
        """
        if not isinstance(event, (Embedded, Failed)):
            core.settle(event, Embedded)
            return
        number = self.in_flight.pop(event.id or "")
        if isinstance(event, Failed) and event.code == Overloaded.code and self.in_flight:
            self._window = len(self.in_flight)
            self._waiting.appendleft(number)
            return
        self._vectors[number] = core.settle(event, Embedded).vector

    def result(self) -> npt.NDArray[np.float32]:
        """Return all vectors in the order of the texts, when all are here."""
        import numpy as np

        rows = [np.frombuffer(vector, "<f4") for vector in self._vectors]
        return rows[0].astype(np.float32) if self._single else np.stack(rows).astype(np.float32)


def _request(text: Text, pooling: str | None, normalize: bool) -> Embed:
    fields: dict[str, Any] = {"id": core.new_id(), "pooling": pooling, "normalize": normalize}
    if isinstance(text, str):
        return codec.build(Embed, {**fields, "prompt": text})
    return codec.build(Embed, {**fields, "token_ids": core.plain_ids(text)})
