"""The chat templates that a model file holds: which there are, and conversations as prompt text.

In here: reading them from metadata, checking them when a model is loaded, and what a template is given. Not
in here: the engines and their limits (`renderer.py`), the process they run in (`process.py`). No
template ever comes from a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import product
from typing import Any, Final

from ...shm.errors import BadRequest, ModelFileError, TooLong
from ..protocol.chat import ChatMessage, Forms, Function, ToolCall
from ..text.tokenizer import Tokenizer
from .process import ChatProcess, RenderDiedError

KEY: Final = "tokenizer.chat_template"
DEFAULT: Final = "default"
TOOL_USE: Final = "tool_use"
MAX_TEMPLATES: Final = 16
MAX_SOURCE_BYTES: Final = 256 * 2**10
MAX_CONTEXT_BYTES: Final = 8 * 2**20
MIN_OUTPUT_BYTES: Final = 2**16
# English takes some 4.5 bytes a token, indented code 10: four times the context would refuse what fits.
OUTPUT_BYTES_PER_TOKEN: Final = 16

OPEN_CPU_S: Final = 2.0
# Real templates take a millisecond, on a Raspberry Pi some; more is for long conversations, which take their
# time to be read alone. All of it is less than what the clock allows (`chat_process.WALL_S`).
RENDER_CPU_S: Final = 0.5
CPU_S_PER_BYTE: Final = 1e-6
CPU_S_PER_MESSAGE: Final = 1e-3
MAX_CPU_S: Final = 12.0
# jinja2 imports and compiles slowly, on a Raspberry Pi most of all.
JINJA2_CPU_S: Final = 2.0

_MARK = "Sterna4b1d"
_GIVEN = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
)


def template_sources(metadata: Mapping[str, object], source: str) -> dict[str, str]:
    """Return the templates of a file by name, the one without a name as `default`.

    Reads `tokenizer.chat_template` and `tokenizer.chat_template.<name>`. Raises ModelFileError that names the
    key for what is no text, too long or too many.
    """
    found: dict[str, str] = {}
    for key, value in metadata.items():
        if key != KEY and not key.startswith(f"{KEY}."):
            continue
        if not isinstance(value, str):
            raise ModelFileError(f"{source}: {key}: expected a string, found {type(value).__name__}")
        nbytes = len(value.encode("utf-8", "surrogatepass"))
        if nbytes > MAX_SOURCE_BYTES:
            raise ModelFileError(
                f"{source}: {key}: expected at most {MAX_SOURCE_BYTES} bytes, found {nbytes}"
            )
        if value.strip():
            found[DEFAULT if key == KEY else key.removeprefix(f"{KEY}.")] = value
    if len(found) > MAX_TEMPLATES:
        raise ModelFileError(f"{source}: expected at most {MAX_TEMPLATES} chat templates, found {len(found)}")
    return found


def describe_templates(metadata: Mapping[str, object], source: str) -> str:
    """Return one line for `sterna inspect`: names and sizes, or "none"; raises as `template_sources`."""
    sources = template_sources(metadata, source)
    return ", ".join(f"{name} ({len(text)} characters)" for name, text in sources.items()) or "none"


def token_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of the special tokens that there are, by the names that templates use."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id,
           "pad_token": tokenizer.pad_id}  # fmt: skip
    return {name: tokenizer.id_to_piece(token) for name, token in ids.items() if token is not None}


class ChatTemplate:
    """The chat templates of one model, parsed; to be closed. Threads may share it."""

    def __init__(
        self, sources: Mapping[str, str], tokens: Mapping[str, str], source: str, output_limit: int
    ) -> None:
        """Parse `sources`; raises ModelFileError that names key and line, and OutOfResources.

        tokens: texts of special tokens by the names that templates use, such as `bos_token`; source: the
        file, for errors; output_limit: bytes that a conversation may become.
        """
        self._tokens = dict(tokens)
        self._source = source
        self._output_limit = output_limit
        self._process = ChatProcess({_key_of(name): text for name, text in sources.items()})
        try:
            self._engines = self._open()
            self._forms = {name: self._probe(name) for name in sources}
        finally:
            # Ten megabytes that only those who chat need; it starts again in a tenth of a second.
            self._process.rest()

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, object], *, tokens: Mapping[str, str], source: str, context: int
    ) -> ChatTemplate | None:
        """Return the templates of a file, None if it has none; raises as `__init__`, `template_sources`."""
        sources = template_sources(metadata, source)
        limit = max(MIN_OUTPUT_BYTES, OUTPUT_BYTES_PER_TOKEN * context)
        return cls(sources, tokens, source, limit) if sources else None

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        now: datetime,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation as prompt text; blocks for milliseconds, in the worst case for seconds.

        `template` is the name of one; by default `tool_use` if there are tools and such a template. `options`
        are further variables, such as `enable_thinking`. Raises BadRequest with the template's own words if
        it refuses the conversation, or with the limit that it met, and TooLong.
        """
        name = self._pick(template, bool(tools))
        context = self._variables(messages, self._forms[name], add_generation_prompt=add_generation_prompt)
        if tools:
            context["tools"] = list(tools)
        if documents:
            context["documents"] = list(documents)
        for key, value in (options or {}).items():
            if key in _GIVEN or key in self._tokens:
                raise BadRequest(f"options.{key}: is given by the conversation or the model")
            context[key] = value
        return self._rendered(name, context, now)

    def _variables(
        self, messages: Sequence[ChatMessage], forms: Forms, *, add_generation_prompt: bool
    ) -> dict[str, Any]:
        return {
            **self._tokens,
            # For most templates, to have no tools is not to be given any: `tools|length` of null fails.
            **({"tools": None, "documents": None} if forms.null_tools else {}),
            "messages": [message.plain(forms) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }

    def close(self) -> None:
        """End the process behind the templates for good, also in the midst of a rendering."""
        self._process.close()

    def _open(self) -> dict[str, str]:
        try:
            reply = self._process.open(OPEN_CPU_S)
        except RenderDiedError as error:
            raise ModelFileError(f"{self._source}: {KEY}: {error}") from None
        if "error" in reply:
            key = reply.get("failed", KEY)
            raise ModelFileError(f"{self._source}: {key}: {reply['error']}")
        return dict(reply["engines"])

    def _pick(self, template: str | None, has_tools: bool) -> str:
        if template is None:
            wanted = TOOL_USE if has_tools and TOOL_USE in self._forms else DEFAULT
            return wanted if wanted in self._forms else next(iter(self._forms))
        if template not in self._forms:
            known = ", ".join(self._forms)
            raise BadRequest(f"template: expected one of {known}, found {ascii(template)[:60]}")
        return template

    def _rendered(self, name: str, context: dict[str, Any], now: datetime) -> str:
        try:
            nbytes = len(json.dumps(context))
            if nbytes > MAX_CONTEXT_BYTES:
                raise TooLong(
                    f"the conversation has {nbytes} bytes, at most {MAX_CONTEXT_BYTES} are rendered"
                )
            cpu_s = RENDER_CPU_S + CPU_S_PER_BYTE * nbytes + CPU_S_PER_MESSAGE * len(context["messages"])
            reply = self._ask(name, context, now, min(cpu_s, MAX_CPU_S))
        except RecursionError:
            raise BadRequest("messages: nested too deeply") from None
        except RenderDiedError as error:
            raise BadRequest(f"chat template {name!r} {error}") from None
        if "error" in reply:
            raise BadRequest(f"chat template {name!r}: {reply['error']}")
        return str(reply["text"])

    def _ask(self, name: str, context: dict[str, Any], now: datetime, cpu_s: float) -> dict[str, Any]:
        key = _key_of(name)
        request = {
            "cpu_s": max(cpu_s, JINJA2_CPU_S) if self._engines[key] == "jinja2" else cpu_s,
            "render": key,
            "context": context,
            "now": now.isoformat(),
            "limit": self._output_limit,
        }
        return self._process.ask(request, OPEN_CPU_S)

    def _probe(self, name: str) -> Forms:
        """Find out in which forms the template shows all of a short conversation; templates differ in it.

        Some read content as a list of parts only, some paste arguments as text, some call tools only where
        the content is null, some must be told that there are no tools. The usual form is kept where no other
        shows more.
        """
        asks = [ChatMessage(role="user", content=_MARK)]
        call = ToolCall(id="call00001", function=Function(name="look", arguments={"at": _MARK}))
        calls = [
            ChatMessage(role="user", content="look"),
            ChatMessage(role="assistant", tool_calls=[call]),
            ChatMessage(role="tool", tool_call_id="call00001", name="look", content="nothing"),
        ]
        try:
            for content_parts, null_tools in product((False, True), repeat=2):
                usual = Forms(content_parts=content_parts, null_tools=null_tools)
                if self._shows(name, asks, usual):
                    break
            else:
                usual = Forms()
            for argument_text, null_content in product((False, True), repeat=2):
                forms = replace(usual, argument_text=argument_text, null_content=null_content)
                if self._shows(name, calls, forms):
                    return forms
        except RenderDiedError:  # it would take its limits in every form; who uses it will be told
            return Forms()
        return usual

    def _shows(self, name: str, messages: Sequence[ChatMessage], forms: Forms) -> bool:
        context = self._variables(messages, forms, add_generation_prompt=True)
        # No clock here: what a template makes of the date is not looked at.
        reply = self._ask(name, context, datetime(2000, 1, 1), RENDER_CPU_S)
        return _MARK in reply.get("text", "")


def _key_of(name: str) -> str:
    return KEY if name == DEFAULT else f"{KEY}.{name}"
