"""The blocking client: `Client`, what a user calls.

In here: one method for each call. Not in here: what is sent (`requests.py`), waiting (`pool.py`), answers in
parts (`stream.py`), asyncio (`async_client.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from ..protocol.messages import Welcome
from ..protocol.sockets import check_url, default_socket_url
from . import requests
from .embedding import Embedding
from .heartbeat import CONNECT_TIMEOUT_S, DEFAULT_TIMEOUT_S
from .options import GenerateOptions, shows_options
from .pool import ConnectionPool
from .requests import Messages, Text
from .results import Result
from .stream import Stream

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Client:
    """Talks to a daemon; threads may share it, each call in flight has a connection of its own.

    `timeout_s` bounds the wait for an answer and between two of its tokens, `connect_timeout_s` the wait for
    a daemon. Connects when it is first used. Not to be carried over a fork. Methods raise DaemonUnreachable
    when there is no daemon or it goes away, the request's error (`shm.errors.RequestError`) when it fails,
    and UsageError after `close` or a fork.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        checked = default_socket_url() if url is None else check_url(url)
        self._pool = ConnectionPool(checked, timeout_s, connect_timeout_s)

    @property
    def url(self) -> str:
        """Where the daemon listens."""
        return self._pool.url

    @property
    def timeout_s(self) -> float:
        """How long to wait for an answer, and between two of its tokens."""
        return self._pool.timeout_s

    @property
    def connect_timeout_s(self) -> float:
        """How long to wait for a daemon."""
        return self._pool.connect_timeout_s

    # ---- answers ----

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Stream: ...

    @shows_options
    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Result | Stream:
        """Return the answer to a prompt or to token ids, or with `stream` an iterator of its parts.

        `options.GenerateOptions` explains each option; `help` shows it with its default.
        Raises BadRequest for a wrong value before anything is sent and TypeError for an unknown option.
        """
        answer = Stream(self._pool, requests.generate_message(prompt, token_ids, options))
        return answer if stream else answer.read()

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Stream: ...

    @shows_options
    def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Result | Stream:
        """Return the answer to a conversation, or with `stream` an iterator of its parts.

        `apply_template` with `template_options`, then `generate`. What a model thinks before it answers is
        part of the text. Raises BadRequest for a wrong value before anything is sent and TypeError for an
        unknown option.
        """
        checked = requests.chat_options(options)
        prompt = self.apply_template(messages, tools, **requests.template_options(template_options))
        answer = Stream(self._pool, requests.generate_message(prompt, None, checked))
        return answer if stream else answer.read()

    def embed(
        self, texts: Text | Sequence[Text], *, pooling: str | None = None, normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        """Return the vectors of texts, float32 (len(texts), d_model), or (d_model,) of a single text.

        A text may be given as its token ids. `pooling`: "mean" of the hidden states after the final norm, the
        first ("cls") or the "last"; None: as the model's file says, else the last. `normalize`: to length 1.
        Raises BadRequest for a wrong value before anything is sent, TooLong for a text longer than the
        context.
        """
        return self._pool.run(Embedding(texts, pooling, normalize))

    # ---- text ----

    def tokenize(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Return the token ids of a text; `special` reads control tokens out of it."""
        return self._pool.run(requests.tokenize(text, add_bos=add_bos, special=special)).token_ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._pool.run(requests.detokenize(token_ids)).text

    def apply_template(
        self,
        messages: Messages,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        *,
        documents: Messages | None = None,
        template: str | None = None,
        **options: object,
    ) -> str:
        """Return a conversation as the prompt text that the model's own chat template makes of it.

        Messages are as `protocol.chat.ChatMessage` describes them, `options` further variables of the
        template, such as `enable_thinking`. To generate from the text, give `special=True`. Raises BadRequest
        for a model without a template, a wrong message, and what the template refuses.
        """
        call = requests.apply_template(messages, tools, documents, add_generation_prompt, template, options)
        return self._pool.run(call).text

    # ---- the daemon ----

    def cancel(self, request_id: str) -> None:
        """End a request of this client, from any thread; raises NotFound if there is none of that id."""
        self._pool.run(requests.cancel(request_id))

    def status(self) -> dict[str, Any]:
        """Return the daemon's report on itself."""
        return self._pool.run(requests.status()).body

    def resize(self, memory: str) -> dict[str, Any]:
        """Have the daemon use `memory` ("2GiB", "auto") in all; return its slots and bytes then."""
        return self._pool.run(requests.resize(memory)).body

    def drain(self) -> None:
        """Have the daemon finish what runs and stop; returns when nothing runs any more."""
        self._pool.run(requests.drain())

    def ping(self) -> float:
        """Return the seconds that a round trip to the daemon takes; connecting does not count."""
        return self._pool.run_timed(requests.ping())

    def connect(self) -> Welcome:
        """Make a fresh connection and return the daemon's facts about its model and limits."""
        return self._pool.connect()

    def close(self) -> None:
        """Close all connections; streams that still run are closed by their owner. May be called twice."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
