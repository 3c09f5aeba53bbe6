"""The clients' calls that turn text into something else: into tokens and back, conversations into answers.

In here: one base class for each client. Not in here: connections and answers (`client/client.py`,
`client/async_client.py`), what the messages mean (`client/replies.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

from ..shm.errors import BadRequest
from .client import replies as core
from .protocol import codec
from .protocol.chat import without_unused
from .protocol.messages import ApplyTemplate, Detokenize, Detokenized, Templated, Tokenize, Tokenized

if TYPE_CHECKING:
    from .client.async_client import AsyncClient, AsyncStream
    from .client.client import Client, Stream
    from .client.results import Result

Messages = Sequence[Mapping[str, Any]]


class TextCalls:
    """What `Client` can do with text besides `generate`; no class of its own."""

    def tokenize(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Return the token ids of a text; `special` reads control tokens out of it."""
        request = Tokenize(id=core.new_id(), text=text, add_bos=add_bos, special=special)
        return cast("Client", self)._call(request, request.id, Tokenized).token_ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        request = Detokenize(id=core.new_id(), token_ids=core.plain_ids(token_ids))
        return cast("Client", self)._call(request, request.id, Detokenized).text

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

        Messages are as `chat_messages.ChatMessage` describes them, `options` further variables of the
        template, such as `enable_thinking`. To generate from the text, give `special=True`. Raises BadRequest
        for a model without a template, a wrong message, and what the template refuses.
        """
        request = template_message(messages, tools, documents, add_generation_prompt, template, options)
        return cast("Client", self)._call(request, request.id, Templated).text

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[core.GenerateOptions],
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: Literal[True],
        **options: Unpack[core.GenerateOptions],
    ) -> Stream: ...

    def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: bool = False,
        **options: Unpack[core.GenerateOptions],
    ) -> Result | Stream:
        """Return the answer to a conversation, or with `stream` an iterator of its parts.

        `apply_template` with `template_options`, then `generate`. What a model thinks before it answers is
        part of the text.
        """
        client = cast("Client", self)
        prompt = self.apply_template(messages, tools, **_options(template_options))
        options["special"] = True
        if stream:
            return client.generate(prompt, stream=True, **options)
        return client.generate(prompt, **options)


class AsyncTextCalls:
    """What `AsyncClient` can do with text besides `generate`; arguments are those of `TextCalls`."""

    async def tokenize(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Return the token ids of a text; `special` reads control tokens out of it."""
        request = Tokenize(id=core.new_id(), text=text, add_bos=add_bos, special=special)
        return (await cast("AsyncClient", self)._call(request, request.id, Tokenized)).token_ids

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        request = Detokenize(id=core.new_id(), token_ids=core.plain_ids(token_ids))
        return (await cast("AsyncClient", self)._call(request, request.id, Detokenized)).text

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
        """Return a conversation as prompt text; see `TextCalls.apply_template`."""
        request = template_message(messages, tools, documents, add_generation_prompt, template, options)
        return (await cast("AsyncClient", self)._call(request, request.id, Templated)).text

    @overload
    async def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[core.GenerateOptions],
    ) -> Result: ...

    @overload
    async def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: Literal[True],
        **options: Unpack[core.GenerateOptions],
    ) -> AsyncStream: ...

    async def chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        template_options: Mapping[str, Any] | None = None,
        stream: bool = False,
        **options: Unpack[core.GenerateOptions],
    ) -> Result | AsyncStream:
        """Return the answer to a conversation, or with `stream` an iterator of its parts, to be awaited."""
        client = cast("AsyncClient", self)
        prompt = await self.apply_template(messages, tools, **_options(template_options))
        options["special"] = True
        if stream:
            return client.generate(prompt, stream=True, **options)
        return await client.generate(prompt, **options)


def template_message(
    messages: Messages,
    tools: Messages | None,
    documents: Messages | None,
    add_generation_prompt: bool,
    template: str | None,
    options: Mapping[str, Any],
) -> ApplyTemplate:
    """Return the checked request; raises BadRequest for a wrong value."""
    fields: dict[str, Any] = {
        "id": core.new_id(),
        "messages": [without_unused(message) for message in _maps("messages", messages)],
        "tools": None if tools is None else _maps("tools", tools),
        "documents": None if documents is None else _maps("documents", documents),
        "add_generation_prompt": add_generation_prompt,
        "template": template,
        "options": dict(options),
    }
    return codec.build(ApplyTemplate, fields)


def _maps(name: str, values: object) -> list[dict[str, Any]]:
    """Return a sequence of maps as plain ones; raises BadRequest for anything else."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise BadRequest(f"{name}: expected a list of maps, found {type(values).__name__}")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise BadRequest(f"{name}[{i}]: expected a map, found {type(value).__name__}")
    return [dict(value) for value in values]


def _options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what `chat` hands on to `apply_template`; raises BadRequest for what that does not take."""
    options = {} if given is None else given
    if not isinstance(options, Mapping):
        raise BadRequest(f"template_options: expected a map, found {type(given).__name__}")
    for name in options:
        if not isinstance(name, str) or name in ("self", "messages", "tools"):
            raise BadRequest(f"template_options: {ascii(name)[:60]} is no option of a template")
    return dict(options)
