"""The asyncio client: `AsyncClient`, what a user calls.

In here: one method for each call, as in `client.py`. Not in here: what is sent (`requests.py`), waiting and
turns (`channel.py`), answers in parts (`async_stream.py`).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from ..protocol.messages import Welcome
from ..protocol.sockets import check_url, default_socket_url
from . import requests
from .async_stream import AsyncStream
from .channel import Channel
from .embedding import Embedding
from .heartbeat import CONNECT_TIMEOUT_S, DEFAULT_TIMEOUT_S
from .options import GenerateOptions, shows_options
from .requests import Messages, Text
from .results import Result

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class AsyncClient:
    """Talks to a daemon from one event loop; calls may run side by side over its one connection.

    Settings and errors are those of `client.Client`. Connects when it is first used. Requests beyond what the
    daemon's queue holds wait here for their turn, in the order of the calls.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        checked = default_socket_url() if url is None else check_url(url)
        self._channel = Channel(checked, timeout_s, connect_timeout_s)

    @property
    def url(self) -> str:
        """Where the daemon listens."""
        return self._channel.url

    @property
    def timeout_s(self) -> float:
        """How long to wait for an answer, and between two of its tokens."""
        return self._channel.timeout_s

    @property
    def connect_timeout_s(self) -> float:
        """How long to wait for a daemon."""
        return self._channel.connect_timeout_s

    # ---- answers ----

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Awaitable[Result]: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream: ...

    @shows_options
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Awaitable[Result] | AsyncStream:
        """Return the answer (to be awaited), or with `stream` an asynchronous iterator of its parts.

        `options.GenerateOptions` explains each option; `help` shows it with its default.
        Raises BadRequest for a wrong value at once and TypeError for an unknown option. A cancelled task
        cancels its request on the daemon.
        """
        answer = AsyncStream(self._channel, requests.generate_message(prompt, token_ids, options))
        return answer if stream else answer.read()

    @overload
    async def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Result: ...

    @overload
    async def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream: ...

    @shows_options
    async def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Result | AsyncStream:
        """Return the answer to a conversation, or with `stream` an iterator of its parts, to be awaited.

        The template is applied as by `Client.chat`, then `generate`. Raises BadRequest for a wrong value
        before anything is sent and TypeError for an unknown option.
        """
        checked = requests.chat_options(options)
        prompt = await self.apply_template(messages, tools, **requests.template_options(template_options))
        answer = AsyncStream(self._channel, requests.generate_message(prompt, None, checked))
        return answer if stream else await answer.read()

    async def embed(
        self, texts: Text | Sequence[Text], *, pooling: str | None = None, normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        """Return the vectors of texts; see `Client.embed`. A cancelled task cancels its requests."""
        return await self._channel.run(Embedding(texts, pooling, normalize))

    # ---- text ----

    async def tokenize(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Return the token ids of a text; `special` reads control tokens out of it."""
        return (await self._channel.run(requests.tokenize(text, add_bos=add_bos, special=special))).token_ids

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return (await self._channel.run(requests.detokenize(token_ids))).text

    async def apply_template(
        self,
        messages: Messages,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        *,
        documents: Messages | None = None,
        template: str | None = None,
        **options: object,
    ) -> str:
        """Return a conversation as prompt text; see `Client.apply_template`."""
        call = requests.apply_template(messages, tools, documents, add_generation_prompt, template, options)
        return (await self._channel.run(call)).text

    # ---- the daemon ----

    async def cancel(self, request_id: str) -> None:
        """End a request of this client; raises NotFound if there is none of that id."""
        await self._channel.cancel(request_id)

    async def status(self) -> dict[str, Any]:
        """Return the daemon's report on itself."""
        return (await self._channel.run(requests.status())).body

    async def resize(self, memory: str) -> dict[str, Any]:
        """Have the daemon use `memory` ("2GiB", "auto") in all; return its slots and bytes then."""
        return (await self._channel.run(requests.resize(memory))).body

    async def drain(self) -> None:
        """Have the daemon finish what runs and stop; returns when nothing runs any more."""
        await self._channel.run(requests.drain())

    async def ping(self) -> float:
        """Return the seconds that a round trip to the daemon takes."""
        await self._channel.connect()
        start_s = time.monotonic()
        await self._channel.run(requests.ping())
        return time.monotonic() - start_s

    async def connect(self) -> Welcome:
        """Connect unless it is done and return the daemon's facts about its model and limits."""
        return await self._channel.connect()

    async def close(self) -> None:
        """Close the connection; what still runs fails with UsageError. May be called twice."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
