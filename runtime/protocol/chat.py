"""The messages of a conversation as they come from a client, and as a chat template wants them.

In here: `ChatMessage` with its checks, and its plain form. Not in here: the request around them
(`messages.py`), templates (`chat/template.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from msgspec import Meta, Struct

from ...shm.errors import BadRequest

MAX_MESSAGES = 16_384
MAX_PARTS = 1024
MAX_TOOLS = 1024

Name = Annotated[str, Meta(min_length=1, max_length=256)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """How a template wants what can be written in several ways."""

    content_parts: bool = False
    """The content of a message is a list of parts, not text."""
    argument_text: bool = False
    """The arguments of a call are JSON text, not a map."""
    null_content: bool = False
    """The content of a message that only calls tools is null, not ""."""
    null_tools: bool = False
    """Tools and documents that were not given are null, not left out."""


class Function(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tool call calls; `arguments` is a map, or JSON text of one as the OpenAI API has it."""

    name: Name
    arguments: dict[str, Any] | str = {}

    def __post_init__(self) -> None:
        """Refuse text that is no map; raises BadRequest."""
        _arguments(self.arguments)


class ToolCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call that the assistant made."""

    function: Function
    id: Name | None = None
    type: Literal["function"] = "function"


class ChatMessage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    """One that the template knows: most know system, user, assistant and tool."""
    content: str | Annotated[list[dict[str, Any]], Meta(max_length=MAX_PARTS)] | None = None
    """Text, or a list of `{"type": "text", "text": ...}`, which are joined by newlines."""
    reasoning_content: str | None = None
    """What the assistant thought before `content`; templates show it or leave it out as the model wants."""
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    name: Name | None = None

    def __post_init__(self) -> None:
        """Refuse parts that are not text; raises BadRequest."""
        if isinstance(self.content, list):
            for part in self.content:
                _part_text(part)

    def plain(self, forms: Forms) -> dict[str, Any]:
        """Return the message as a template gets it: what was not given is left out, but for `content`."""
        text = self.content
        if isinstance(text, list):
            text = "\n".join(_part_text(part) for part in text)
        message: dict[str, Any] = {"role": self.role}
        if text is None:
            message["content"] = None if forms.null_content and self.tool_calls else ""
        elif not text and self.tool_calls and forms.null_content:
            message["content"] = None
        else:
            message["content"] = [{"type": "text", "text": text}] if forms.content_parts else text
        for name in ("reasoning_content", "tool_call_id", "name"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [_plain_call(call, forms) for call in self.tool_calls]
        return message


def without_unused(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without the unknown fields that are null or empty.

    Answers of other APIs, which people append to the conversation, carry `refusal`, `audio`, `function_call`
    and `annotations` as null or empty. A field with a value stays, and is refused by name.
    """
    known = ChatMessage.__struct_fields__
    return {name: value for name, value in message.items() if name in known or value not in (None, [])}


def _plain_call(call: ToolCall, forms: Forms) -> dict[str, Any]:
    arguments: dict[str, Any] | str = _arguments(call.function.arguments)
    if forms.argument_text:
        given = call.function.arguments
        arguments = given if isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)
    plain = {"type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
    return plain if call.id is None else {"id": call.id, **plain}


def _arguments(given: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        arguments = json.loads(given or "{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"tool_calls.function.arguments: expected JSON, found {error}") from None
    if not isinstance(arguments, dict):
        raise BadRequest("tool_calls.function.arguments: expected a JSON object")
    return arguments


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _part_text(part: dict[str, Any]) -> str:
    part_type, text = part.get("type"), part.get("text")
    if part_type != "text":
        raise BadRequest(f"content: expected parts of type 'text', found {ascii(part_type)[:60]}")
    if not isinstance(text, str) or len(part) != 2:
        raise BadRequest("content: expected parts with a string `text` and nothing else than `type`")
    return text
