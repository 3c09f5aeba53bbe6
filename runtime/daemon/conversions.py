"""Text to tokens, tokens to text, conversations to prompts: short ones at once, long ones in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

from ...shm.errors import Overloaded, SternaError, TooLong
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
MAX_CONVERSIONS = 16

Conversion = Tokenize | Detokenize | ApplyTemplate


class Conversions:
    """Answers the requests that need the tokenizer or the chat template and no engine."""

    def __init__(self, tokenizer: Tokenizer, service: Service, tasks: TaskSet) -> None:
        self._tokenizer = tokenizer
        self._service = service
        self._tasks = tasks
        self._converting = asyncio.Lock()  # one at a time: the other cores compute
        self._rendering = asyncio.Lock()  # has a process of its own, which may take seconds
        self._num_converting = 0

    def answer(
        self,
        message: Conversion,
        send: Callable[[Message], None],
        refuse: Callable[[SternaError], None],
    ) -> None:
        """Call `send` with the answer, now or when a thread has it; `refuse` with an error of that thread.

        Raises TooLong, Overloaded when too many wait for a thread, and what a short conversion raises.
        """
        if not isinstance(message, ApplyTemplate):
            size = len(message.text if isinstance(message, Tokenize) else message.token_ids)
            if size <= MAX_CONVERTED_IN_LOOP:
                send(self._converted(message))
                return
            if size > MAX_CONVERTED:
                raise TooLong(
                    f"{tag_of(type(message))}: expected at most {MAX_CONVERTED} items, found {size}"
                )
        self.check_room()
        self._tasks.start(self._answer_from_thread(message, send, refuse), "convert")

    def check_room(self) -> None:
        """Raise Overloaded when no further long text can be taken."""
        if self._num_converting >= MAX_CONVERSIONS:
            raise Overloaded(f"{self._num_converting} long texts are being converted already")

    async def prompt_ids(self, message: Generate | Embed) -> list[int]:
        """Return the tokens of a long prompt, made in a thread; raises what `Service.prompt_ids` does."""
        self._num_converting += 1
        try:
            async with self._converting:
                return await asyncio.to_thread(self._service.prompt_ids, message)
        finally:
            self._num_converting -= 1

    def _converted(self, message: Conversion) -> Message:
        if isinstance(message, ApplyTemplate):
            # The time of day where the daemon is: what templates print as "today".
            text = self._service.apply_template(message, datetime.now())
            return Templated(id=message.id, text=text)
        if isinstance(message, Detokenize):
            return Detokenized(id=message.id, text=self._tokenizer.decode(message.token_ids))
        ids = self._tokenizer.encode(message.text, add_bos=message.add_bos, special=message.special)
        return Tokenized(id=message.id, token_ids=ids)

    async def _answer_from_thread(
        self,
        message: Conversion,
        send: Callable[[Message], None],
        refuse: Callable[[SternaError], None],
    ) -> None:
        self._num_converting += 1
        try:
            async with self._rendering if isinstance(message, ApplyTemplate) else self._converting:
                send(await asyncio.to_thread(self._converted, message))
        except SternaError as error:
            refuse(error)
        finally:
            self._num_converting -= 1
