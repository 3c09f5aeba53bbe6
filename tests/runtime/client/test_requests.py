"""Conversations that a client is given: what goes into a request, and what is refused before."""

from __future__ import annotations

import enum
from typing import Any, cast

import numpy as np
import pytest

from sterna import Client
from sterna.runtime.client.requests import template_message
from sterna.runtime.protocol import codec
from sterna.runtime.protocol.chat import ChatMessage
from sterna.runtime.protocol.messages import ApplyTemplate
from sterna.shm.errors import BadRequest

TALK = [{"role": "user", "content": "Hi"}]
CYCLE: dict[str, Any] = {}
CYCLE["it"] = CYCLE


def request(messages: object, **fields: object) -> ApplyTemplate:
    given: dict[str, Any] = {"tools": None, "documents": None, "template": None, "options": {}, **fields}
    return template_message(cast("Any", messages), add_generation_prompt=True, **given)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"messages": "hello"}, "messages: expected a list of maps, found str"),
        ({"messages": TALK[0]}, "messages: expected a list of maps, found dict"),
        ({"messages": 5}, "messages: expected a list of maps, found int"),
        ({"messages": None}, "messages: expected a list of maps, found NoneType"),
        ({"messages": ["hi"]}, "messages[0]: expected a map, found str"),
        ({"messages": [TALK[0], None]}, "messages[1]: expected a map, found NoneType"),
        ({"tools": ["x"]}, "tools[0]: expected a map, found str"),
        ({"tools": [{"f": {1: 2}}]}, "tools[0].f: expected text as key, found 1"),
        ({"documents": [{"f": {1, 2}}]},
         "documents[0].f: expected text, a number, an array or a map, found set"),
        ({"options": {"x": {1: 2}}}, "options.x: expected text as key, found 1"),
        ({"options": {"x": object()}},
         "options.x: expected text, a number, an array or a map, found object"),
        ({"options": {"x": [b"y"]}},
         "options.x[0]: expected text, a number, an array or a map, found bytes"),
        ({"options": {"x": float("nan")}}, "options.x: expected a finite number, found nan"),
        ({"messages": [{"role": "user", "refusal": "no"}]},
         "apply_template.messages[0]: unknown field 'refusal'"),
    ],
)  # fmt: skip
def test_wrong_conversations(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadRequest) as caught:
        request(**{"messages": TALK, **fields})
    assert str(caught.value) == complaint


def test_values_of_other_classes() -> None:
    class Role(enum.StrEnum):
        USER = "user"

    frame = codec.encode(request([{"role": Role.USER, "content": "Hi"}], options={"as": Role.USER}))
    assert b"user" in frame
    with pytest.raises(BadRequest, match=r"^apply_template: Encoding objects of type numpy\.float64"):
        codec.encode(request(TALK, options={"x": np.float64(1)}))


def test_a_map_within_itself_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"nested deeper than 64 levels$"):
        request(TALK, options={"x": CYCLE})


@pytest.mark.parametrize("options", [5, "x", {1: 2}, {"messages": []}, {"tools": []}, {"self": 1}])
def test_wrong_template_options_of_chat(options: object) -> None:
    # Refused before there is a connection: no daemon is asked.
    with (
        Client("ipc:///nowhere/sterna.sock") as client,
        pytest.raises(BadRequest, match="template_options: "),
    ):
        client.chat(TALK, template_options=cast("Any", options))


def test_answer_of_another_api_may_be_appended() -> None:
    answer = {"role": "assistant", "content": "Hello", "refusal": None, "audio": None, "function_call": None,
              "annotations": [], "tool_calls": None}  # fmt: skip
    message = request([*TALK, answer])
    assert message.messages[1] == ChatMessage(role="assistant", content="Hello")
    assert codec.decode_request(codec.encode(message)) == message
