"""What the clients send: requests with checked values, and what each waits for. No socket, no clock.

In here: one function for each call of a client; it raises BadRequest for a wrong value. Not in here: what
comes back (`replies.py`), many requests as one call (`embedding.py`), the options' meaning (`options.py`).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from ...shm.errors import BadRequest, UsageError
from ..protocol import codec
from ..protocol.chat import without_unused
from ..protocol.messages import (
    ApplyTemplate,
    Cancel,
    Detokenize,
    Detokenized,
    Drain,
    Drained,
    Embed,
    Generate,
    Ping,
    Pong,
    Report,
    Resize,
    Status,
    Templated,
    Tokenize,
    Tokenized,
)
from .exchange import Call, CancelCall
from .options import check_names
from .replies import pong_key

Messages = Sequence[Mapping[str, Any]]
"""A conversation, tools or documents as a client gives them."""

Text = str | Sequence[int]
"""Text, or the token ids of one."""

_NONCES = itertools.count(1)


def new_id() -> str:
    """Return a fresh id for a request or a client."""
    return uuid4().hex


def check_process(made_in_pid: int, pid: int, closed: bool) -> None:
    """Refuse a client that was closed or carried over a fork; raises UsageError."""
    if pid != made_in_pid:
        raise UsageError(
            f"this client was made in process {made_in_pid} and is used in its fork {pid}: make one there"
        )
    if closed:
        raise UsageError("this client is closed")


# ---- answers and vectors ----


def generate_message(
    prompt: str | None, token_ids: Sequence[int] | None, options: Mapping[str, object]
) -> Generate:
    """Return the checked request; raises BadRequest for a wrong value, TypeError for an unknown option."""
    check_names(options, "generate")
    fields: dict[str, Any] = {"id": new_id(), "prompt": prompt, **options}
    if token_ids is not None:
        fields["token_ids"] = plain_ids(token_ids, "token_ids")
    return codec.build(Generate, fields)


def chat_options(options: Mapping[str, object]) -> dict[str, object]:
    """Return the options with which `chat` generates; raises BadRequest and TypeError as `generate` does."""
    check_names(options, "chat")
    checked = {**options, "special": True}
    generate_message("", None, checked)
    return checked


def embed_message(text: Text, pooling: str | None, normalize: bool, where: str) -> Embed:
    """Return the checked request for the vector of one text, which errors call `where`."""
    fields: dict[str, Any] = {"id": new_id(), "pooling": pooling, "normalize": normalize}
    if isinstance(text, str):
        return codec.build(Embed, {**fields, "prompt": text})
    if not isinstance(text, Iterable):
        raise BadRequest(f"{where}: expected text or token ids, found {ascii(text)[:60]}")
    return codec.build(Embed, {**fields, "token_ids": plain_ids(text, where)})


def plain_ids(token_ids: Sequence[int], where: str) -> list[int]:
    """Return ids as plain integers, so that an array of NumPy is as good as a list.

    Raises BadRequest, which begins with `where` and the index of what is no integer.
    """
    try:
        given = iter(token_ids)
    except TypeError:
        raise BadRequest(f"{where}: expected token ids, found {ascii(token_ids)[:60]}") from None
    ids = []
    for i, token_id in enumerate(given):
        try:
            ids.append(operator.index(token_id))
        except TypeError:
            raise BadRequest(f"{where}[{i}]: expected int, found {ascii(token_id)[:60]}") from None
    return ids


# ---- calls with one reply ----


def tokenize(text: str, *, add_bos: bool | None, special: bool) -> Call[Tokenized]:
    """Ask for the token ids of a text."""
    request = Tokenize(id=new_id(), text=text, add_bos=add_bos, special=special)
    return Call(request, request.id, Tokenized)


def detokenize(token_ids: Sequence[int]) -> Call[Detokenized]:
    """Ask for the text of token ids."""
    request = Detokenize(id=new_id(), token_ids=plain_ids(token_ids, "token_ids"))
    return Call(request, request.id, Detokenized)


def apply_template(
    messages: Messages,
    tools: Messages | None,
    documents: Messages | None,
    add_generation_prompt: bool,
    template: str | None,
    options: Mapping[str, Any],
) -> Call[Templated]:
    """Ask for a conversation as prompt text."""
    request = template_message(messages, tools, documents, add_generation_prompt, template, options)
    return Call(request, request.id, Templated)


def status() -> Call[Report]:
    """Ask for the daemon's report on itself."""
    request = Status(id=new_id())
    return Call(request, request.id, Report)


def resize(memory: str) -> Call[Report]:
    """Ask for another memory budget."""
    request = Resize(id=new_id(), memory=memory)
    return Call(request, request.id, Report)


def drain() -> Call[Drained]:
    """Ask the daemon to finish what runs and stop."""
    request = Drain(id=new_id())
    return Call(request, request.id, Drained)


def ping() -> Call[Pong]:
    """Ask whether the daemon is alive."""
    request = Ping(nonce=next(_NONCES))
    return Call(request, pong_key(request.nonce), Pong)


def cancel(request_id: str) -> CancelCall:
    """Ask for the end of a request."""
    return CancelCall(Cancel(id=request_id), Ping(nonce=next(_NONCES)))


# ---- conversations ----


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
        "id": new_id(),
        "messages": [without_unused(message) for message in _maps("messages", messages)],
        "tools": None if tools is None else _maps("tools", tools),
        "documents": None if documents is None else _maps("documents", documents),
        "add_generation_prompt": add_generation_prompt,
        "template": template,
        "options": dict(options),
    }
    return codec.build(ApplyTemplate, fields)


def template_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what `chat` hands on to `apply_template`; raises BadRequest for what that does not take."""
    options = {} if given is None else given
    if not isinstance(options, Mapping):
        raise BadRequest(f"template_options: expected a map, found {type(given).__name__}")
    for name in options:
        if not isinstance(name, str) or name in ("self", "messages", "tools"):
            raise BadRequest(f"template_options: {ascii(name)[:60]} is no option of a template")
    return dict(options)


def _maps(name: str, values: object) -> list[dict[str, Any]]:
    """Return a sequence of maps as plain ones; raises BadRequest for anything else."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise BadRequest(f"{name}: expected a list of maps, found {type(values).__name__}")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise BadRequest(f"{name}[{i}]: expected a map, found {type(value).__name__}")
    return [dict(value) for value in values]
