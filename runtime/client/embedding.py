"""Many texts as vectors, some of them in flight at a time: the exchange behind both clients' `embed`.

In here: the requests of one call, their order and their vectors. Not in here: what a vector is
(`scheduler/pooling.py`), sending and waiting (`pool.py`, `channel.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...shm.errors import BadRequest, EngineLost, Overloaded
from ..protocol.messages import Embed, Embedded, Failed
from . import replies
from .requests import Text, embed_message

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WINDOW = 16
"""Requests in flight: as many as a daemon computes at a time unless it was told otherwise."""


class Embedding:
    """An `exchange.Exchange` of one request for each text.

    Its result is float32 (len(texts), d_model), or (d_model,) of a single text.

    Making one raises BadRequest for a wrong value.
    """

    def __init__(self, texts: Text | Sequence[Text], pooling: str | None, normalize: bool) -> None:
        try:
            # A row of token ids, also an array of NumPy: its items are whole numbers, which have no length.
            self._single = isinstance(texts, str) or (len(texts) > 0 and not hasattr(texts[0], "__len__"))
        except (TypeError, KeyError):
            found = type(texts).__name__
            raise BadRequest(f"texts: expected text, token ids or a list of them, found {found}") from None
        each: Sequence[Any] = [texts] if self._single else texts
        if not len(each):
            raise BadRequest("texts: expected at least one, found none")
        self._requests = [
            embed_message(text, pooling, normalize, "token_ids" if self._single else f"texts[{i}]")
            for i, text in enumerate(each)
        ]
        self._vectors: list[bytes] = [b""] * len(each)
        self._waiting = deque(range(len(each)))
        self._window = WINDOW
        self.in_flight: dict[str, int] = {}
        """The requests that were sent and not answered yet: id to index of the text, oldest first."""

    @property
    def done(self) -> bool:
        """Whether all vectors are here."""
        return not self._waiting and not self.in_flight

    @property
    def keys(self) -> dict[str, int]:
        """The ids of the requests in flight, oldest first."""
        return self.in_flight

    def due(self) -> Iterator[Embed]:
        """Yield the requests to be sent now; they are in flight then."""
        while self._waiting and len(self.in_flight) < self._window:
            number = self._waiting.popleft()
            request = self._requests[number]
            self.in_flight[request.id] = number
            yield request

    def feed(self, event: replies.Event) -> None:
        """Take in the answer to a request in flight; raises the request's error, or ProtocolError.

        A full queue is an error only when none of ours is in it: else fewer are sent from then on.
        """
        if not isinstance(event, (Embedded, Failed)):
            replies.settle(event, Embedded)
            return
        number = self.in_flight.pop(event.id or "")
        if isinstance(event, Failed) and event.code == Overloaded.code and self.in_flight:
            self._window = len(self.in_flight)
            self._waiting.appendleft(number)
            return
        self._vectors[number] = replies.settle(event, Embedded).vector

    def overdue(self, url: str, timeout_s: float) -> EngineLost:
        """Return the error for a daemon that lives but sent no vector for `timeout_s`."""
        return replies.stalled(next(iter(self.in_flight), ""), timeout_s)

    def result(self) -> npt.NDArray[np.float32]:
        """Return all vectors in the order of the texts, when all are here."""
        import numpy as np

        rows = [np.frombuffer(vector, "<f4") for vector in self._vectors]
        return rows[0].astype(np.float32) if self._single else np.stack(rows).astype(np.float32)
