"""Text to tokens, tokens to text, conversations to prompts: short ones at once, long ones in a thread.

Long ones wait for their turn. They count from the moment they arrive, by number and by bytes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from ...shm.errors import Overloaded, ShuttingDown, SternaError, TooLong
from ..protocol.messages import (
    ApplyTemplate,
    Detokenize,
    Detokenized,
    Embed,
    Generate,
    Message,
    Templated,
    Tokenize,
    Tokenized,
    tag_of,
)
from ..text.tokenizer import Tokenizer
from .service import Service
from .tasks import TaskSet

# Characters or token ids; ten thousand take some 5 ms.
MAX_CONVERTED_IN_LOOP = 10_000
MAX_CONVERTED = 2**20
# Of all long texts that wait or are being converted; a single one may be larger.
MAX_HELD_BYTES = 64 * 2**20
# A token id in a list: the object and the pointer to it.
TOKEN_ID_BYTES = 36

Conversion = Tokenize | Detokenize | ApplyTemplate
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who asks for a conversion."""

    owner: bytes
    """The connection."""
    frame_bytes: int
    """Size of what it sent."""
    refuse: Callable[[SternaError], None]
    """Takes the error that comes instead of an answer."""


@dataclass(slots=True, eq=False)
class _LongText:
    """A conversion that waits for its turn, or is being carried out in a thread."""

    asker: Asker
    held_bytes: int
    task: asyncio.Task[None] | None = None


class Conversions:
    """Answers the requests that need the tokenizer or the chat template and no engine."""

    def __init__(self, tokenizer: Tokenizer, service: Service, tasks: TaskSet, max_waiting: int) -> None:
        """Prepare; `max_waiting`: long texts that may wait for a thread at a time."""
        self._tokenizer = tokenizer
        self._service = service
        self._tasks = tasks
        self._max_waiting = max_waiting
        self._converting = asyncio.Lock()  # one at a time: the other cores compute
        self._rendering = asyncio.Lock()  # has a process of its own, which may take seconds
        self._held: set[_LongText] = set()
        self._begun: set[_LongText] = set()  # of the held ones
        self._held_bytes = 0

    def answer(self, message: Conversion, asker: Asker, send: Callable[[Message], None]) -> None:
        """Call `send` with the answer, now or when a thread has it.

        `asker.refuse` gets an error of that thread. Raises TooLong, Overloaded when too many wait for a
        thread, and what a short conversion raises.
        """
        if isinstance(message, ApplyTemplate):
            self._take(asker, asker.frame_bytes, self._rendering, lambda: self._converted(message), send)
            return
        size = len(message.text if isinstance(message, Tokenize) else message.token_ids)
        if size <= MAX_CONVERTED_IN_LOOP:
            send(self._converted(message))
            return
        if size > MAX_CONVERTED:
            raise TooLong(f"{tag_of(type(message))}: expected at most {MAX_CONVERTED} items, found {size}")
        held = sys.getsizeof(message.text) if isinstance(message, Tokenize) else size * TOKEN_ID_BYTES
        self._take(asker, held, self._converting, lambda: self._converted(message), send)

    def convert_prompt(
        self, message: Generate | Embed, asker: Asker, then: Callable[[list[int]], None]
    ) -> asyncio.Task[None]:
        """Call `then` with the tokens of a long prompt when a thread has made them; return the task of it.

        `asker.refuse` gets what `Service.prompt_ids` or `then` raises. Raises Overloaded.
        """
        held = sys.getsizeof(message.prompt)
        return self._take(asker, held, self._converting, lambda: self._service.prompt_ids(message), then)

    def owners(self) -> set[bytes]:
        """Return the connections that wait for a conversion."""
        return {text.asker.owner for text in self._held}

    def forget_owner(self, owner: bytes) -> int:
        """Drop what a connection that is gone waits for; return how many conversions that ended."""
        dropped = [text for text in self._held if text.asker.owner == owner and text not in self._begun]
        for text in dropped:
            self._release(text)
            if text.task is not None:
                text.task.cancel()
        return len(dropped)

    def close(self) -> None:
        """Refuse all that wait or are being converted: the daemon stops."""
        for text in list(self._held):
            self._release(text)
            if text.task is not None:
                text.task.cancel()
            text.asker.refuse(ShuttingDown("the daemon stopped before the text was converted"))

    def _take(
        self,
        asker: Asker,
        held_bytes: int,
        turn: asyncio.Lock,
        convert: Callable[[], T],
        then: Callable[[T], None],
    ) -> asyncio.Task[None]:
        """Hold a long text until its turn has come and gone. Raises Overloaded when there is no room."""
        waiting = len(self._held) - len(self._begun)
        if waiting >= self._max_waiting:
            raise Overloaded(f"the queue is full: {waiting} long texts wait to be converted (max_queue)")
        if self._held and self._held_bytes + held_bytes > MAX_HELD_BYTES:
            raise Overloaded(
                f"{len(self._held)} long texts wait to be converted; with this one they would take "
                f"{self._held_bytes + held_bytes} bytes, at most {MAX_HELD_BYTES} are held"
            )
        text = _LongText(asker, held_bytes)
        self._held.add(text)
        self._held_bytes += held_bytes
        text.task = self._tasks.start(self._convert_in_turn(text, turn, convert, then), "convert")
        # Also of a task that is cancelled before it begins.
        text.task.add_done_callback(lambda _: self._release(text))
        return text.task

    async def _convert_in_turn(
        self, text: _LongText, turn: asyncio.Lock, convert: Callable[[], T], then: Callable[[T], None]
    ) -> None:
        try:
            try:
                async with turn:
                    self._begun.add(text)
                    converted = await asyncio.to_thread(convert)
            finally:
                self._release(text)
            then(converted)
        except SternaError as error:
            text.asker.refuse(error)

    def _release(self, text: _LongText) -> None:
        if text in self._held:
            self._held.remove(text)
            self._begun.discard(text)
            self._held_bytes -= text.held_bytes

    def _converted(self, message: Conversion) -> Message:
        if isinstance(message, ApplyTemplate):
            # The time of day where the daemon is: what templates print as "today".
            text = self._service.apply_template(message, datetime.now())
            return Templated(id=message.id, text=text)
        if isinstance(message, Detokenize):
            return Detokenized(id=message.id, text=self._tokenizer.decode(message.token_ids))
        ids = self._tokenizer.encode(message.text, add_bos=message.add_bos, special=message.special)
        return Tokenized(id=message.id, token_ids=ids)
