"""Frames: what goes in comes out, and whatever else comes in is one clear error."""

from __future__ import annotations

import struct
import time
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sterna.runtime.protocol import codec, messages
from sterna.runtime.protocol.chat import ChatMessage, Function
from sterna.runtime.protocol.messages import REPLIES, REQUESTS, ApplyTemplate, Embed, Generate, Message
from sterna.shm.errors import BadRequest, ProtocolError, SternaError

TALK = [{"role": "user", "content": "Hi"}]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def values(annotation: object, limits: dict[str, Any] | None = None) -> st.SearchStrategy[Any]:
    """Return values of a field's type, within its declared range."""
    limits = limits or {}
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        merged = {
            k: v
            for m in args[1:]
            for k in ("ge", "le", "gt", "lt", "min_length", "max_length")
            if (v := getattr(m, k)) is not None
        }
        return values(args[0], merged)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(
            values(args[0]),
            min_size=limits.get("min_length", 0),
            max_size=min(4, limits.get("max_length", 4)),
        )
    if origin is tuple:
        return st.tuples(*map(values, args))
    if origin is dict or annotation is dict:
        return st.dictionaries(TEXT, JSON, max_size=3)
    if args:  # a union
        return st.one_of(*map(values, args))
    if annotation is int:
        high = limits.get("le", limits.get("lt", 2**63) - 1)
        return st.integers(limits.get("ge", 0), high)
    if annotation is float:
        low, high = limits.get("ge", limits.get("gt")), limits.get("le")
        return st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min="gt" in limits)
    if annotation is str:
        alphabet = st.characters(exclude_categories=["Cs"])
        return st.text(
            alphabet, min_size=limits.get("min_length", 0), max_size=min(30, limits.get("max_length", 30))
        )
    if annotation is bytes:
        return st.binary(max_size=30)
    if annotation is bool:
        return st.booleans()
    if annotation is type(None):
        return st.none()
    return bodies(annotation)


def bodies(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Return messages of a class."""
    fields = {
        name: values(annotation)
        for name, annotation in get_type_hints(cls, include_extras=True).items()
        if name in cls.__struct_fields__
    }
    if cls is Embed:
        with_text = st.builds(lambda **kw: Embed(**{**kw, "token_ids": None}), **fields | {"prompt": TEXT})
        ids = values(list[messages.TokenId])
        return with_text | st.builds(
            lambda **kw: Embed(**{**kw, "prompt": None}), **fields | {"token_ids": ids}
        )
    if cls is Generate:
        either = st.sampled_from(["prompt", "token_ids"])
        fields |= {"prompt": TEXT, "token_ids": values(list[messages.TokenId])}
        budget = st.sampled_from(["quality_budget", "lost_mass"])
        return st.builds(
            lambda drop, other, **kw: Generate(**{**kw, drop: None, other: None}),
            drop=either,
            other=budget,
            **fields,
        )
    if cls is ChatMessage:
        part = st.builds(lambda text: {"type": "text", "text": text}, TEXT)
        fields["content"] = st.none() | TEXT | st.lists(part, max_size=3)
    if cls is Function:  # text must be JSON of a map
        fields["arguments"] = values(dict) | st.just('{"a": 1}')
    return st.builds(cls, **fields)


ANY_REQUEST = st.sampled_from(list(REQUESTS.values())).flatmap(bodies)
ANY_REPLY = st.sampled_from(list(REPLIES.values())).flatmap(bodies)


@given(ANY_REQUEST)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_request_comes_back_as_it_went(message: Message) -> None:
    assert codec.decode_request(codec.encode(message)) == message


@given(ANY_REPLY)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_reply_comes_back_as_it_went(message: Message) -> None:
    assert codec.decode_reply(codec.encode(message)) == message


def test_every_message_has_its_tag_in_one_registry() -> None:
    found = {
        cls
        for cls in vars(messages).values()
        if isinstance(cls, type) and issubclass(cls, Message) and cls is not Message
    }
    parts = {
        messages.ModelFacts,
        messages.Limits,
        messages.TokenItem,
        messages.TokenLogprob,
        messages.Usage,
        messages.Timings,
        messages.RoutingFacts,
    }
    assert found - parts == {*REQUESTS.values(), *REPLIES.values()}
    assert REPLIES["going_away"] is messages.GoingAway
    assert not REQUESTS.keys() & REPLIES.keys()


def poke(frame: bytes) -> None:
    """Decode in every way; only errors of the tree, of one line, may come out."""
    for decode in (codec.decode_request, codec.decode_reply):
        text = "fine"
        try:
            decode(frame)
        except SternaError as e:
            text = str(e)
        assert "\n" not in text
        assert 0 < len(text) < 400
    found = codec.peek_id(frame)
    assert found is None or 1 <= len(found) <= 64


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\x91" * 1000 + b"\x90")
@example(b"\x91" * 5000)
@example(b"\x93\x01\xa4ping\x81\xa5nonce\xd7\xff" + bytes(8))
@example(b"\x93\x01\xa4ping\x81\xc4\x05nonce\x01")
@settings(max_examples=500, deadline=None)
def test_random_bytes(frame: bytes) -> None:
    poke(frame)


@given(JSON, JSON, st.sampled_from([*REQUESTS, *REPLIES]))
@settings(max_examples=300, deadline=None)
def test_wrong_bodies(body: object, extra: object, tag: str) -> None:
    poke(msgpack.packb([codec.PROTOCOL, tag, body]))
    poke(
        msgpack.packb(
            [codec.PROTOCOL, tag, {"id": "a", "nonce": extra, "items": [extra], "token_ids": [extra]}]
        )
    )
    poke(msgpack.packb([extra, tag, body]))


@given(ANY_REQUEST | ANY_REPLY, st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_truncations_and_bit_flips(message: Message, data: st.DataObject) -> None:
    frame = codec.encode(message)
    poke(frame[: data.draw(st.integers(0, len(frame) - 1))])
    flipped = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        flipped[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    poke(bytes(flipped))


def request_error(tag: str, **body: object) -> str:
    with pytest.raises(BadRequest) as caught:
        codec.decode_request(msgpack.packb([codec.PROTOCOL, tag, body]))
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_tokens": 0}, "max_tokens: expected int >= 1, found 0"),
        ({"max_tokens": 2**20 + 1}, "max_tokens: expected int <= 1048576, found 1048577"),
        ({"max_tokens": True}, "max_tokens: expected int, found True"),
        ({"max_tokens": 1.0}, "max_tokens: expected int, found 1.0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number, found nan"),
        ({"min_p": float("inf")}, "min_p: expected a finite number, found inf"),
        ({"top_p": 0}, "top_p: expected float > 0.0, found 0"),
        ({"seed": -1}, "seed: expected int >= 0, found -1"),
        ({"seed": 2**63}, "seed: expected int <= 9223372036854775807, found 9223372036854775808"),
        ({"stop": ["a"] * 17}, "stop: expected array of length <= 16, found array of 17"),
        ({"stop": ["a", ""]}, "stop[1]: expected str of length >= 1, found ''"),
        ({"stop": ["ä" * 129]}, "stop[0]: expected at most 256 bytes, found 258"),
        ({"logprobs": 21}, "logprobs: expected int <= 20, found 21"),
        ({"tempreature": 1}, "generate: unknown field 'tempreature', did you mean 'temperature'?"),
        ({"a\nb": 1}, "generate: unknown field 'a\\nb'"),
        ({"token_ids": [1]}, "prompt, token_ids: expected exactly one of the two, found both"),
        ({"prompt": None}, "prompt, token_ids: expected exactly one of the two, found neither"),
        ({"prompt": None, "token_ids": [1, -3]}, "token_ids[1]: expected int >= 0, found -3"),
        ({"id": ""}, "id: expected str of length >= 1, found ''"),
        ({"quality_budget": 0.2}, "quality_budget: expected float <= 0.1, found 0.2"),
        ({"lost_mass": -0.1}, "lost_mass: expected float >= 0.0, found -0.1"),
        (
            {"quality_budget": 0.0, "lost_mass": 0.0},
            "quality_budget, lost_mass: expected at most one of the two, found both",
        ),
    ],
)  # fmt: skip
def test_wrong_field_is_named_with_what_was_expected_and_found(fields: dict[str, Any], text: str) -> None:
    assert request_error("generate", **{"id": "a", "prompt": "x", **fields}) == text


def test_no_number_field_of_a_request_takes_a_non_finite_value() -> None:
    for tag, cls in REQUESTS.items():
        for name, annotation in get_type_hints(cls).items():
            if annotation is float:
                for bad in (float("nan"), float("inf"), float("-inf")):
                    assert request_error(tag, **{"id": "a", "prompt": "x", name: bad}).startswith(f"{name}: ")


def test_missing_field() -> None:
    assert request_error("generate", prompt="x") == "generate: field 'id' is missing"


def test_a_long_value_is_not_repeated_whole() -> None:
    assert len(request_error("cancel", id="x" * 10_000)) < 150


def test_a_wrong_reply_is_the_protocols_fault() -> None:
    frame = msgpack.packb(
        [codec.PROTOCOL, "tokens", {"items": [{"id": "a", "index": -1, "token_ids": [], "text": ""}]}]
    )
    with pytest.raises(ProtocolError, match=r"^items\[0\]\.index: expected int >= 0, found -1$"):
        codec.decode_reply(frame)


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (msgpack.packb([2, "ping", {"nonce": 1}]), "frame speaks protocol 2, this side speaks 1"),
        (msgpack.packb([2, "ping", {}, "more"]), "frame speaks protocol 2, this side speaks 1"),
        (msgpack.packb([True, "ping", {}]), "frame speaks protocol True, this side speaks 1"),
        (msgpack.packb([1, "ping"]), "frame is not [protocol, tag, body], found array of 2"),
        (msgpack.packb({"a": 1}), "frame is not [protocol, tag, body], found map of 1"),
        (msgpack.packb([1, 5, {}]), "tag: expected str, found 5"),
        (msgpack.packb([1, "ping", []]), "body of 'ping': expected a map, found array of 0"),
        (msgpack.packb([1, "pnig", {}]), "unknown message 'pnig'; a client may send hello, generate, embed"),
        (msgpack.packb([1, "pong", {"nonce": 1}]), "unknown message 'pong'; a client may send"),
        (msgpack.packb([1, "ping", {1: 2}]), "is not msgpack within the limits"),
        (msgpack.packb([1, "ping", {b"nonce": 2}]), "is not msgpack within the limits"),
        (msgpack.packb([1, "ping", {"nonce": msgpack.Timestamp(1, 2)}]), "is not msgpack within the limits"),
        (b"\x93\x01\xa2\xff\xff\x80", "frame holds text that is not UTF-8"),
        (b"", "frame of 0 bytes is not msgpack"),
    ],
)  # fmt: skip
def test_what_is_no_message(frame: bytes, text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        codec.decode_request(frame)
    assert text in str(caught.value)


def test_deep_nesting_is_refused_by_name() -> None:
    body: Any = {"x": 1}
    for _ in range(900):
        body = {"x": body}
    with pytest.raises(ProtocolError, match=r"^body\.x\.x.*: nested deeper than 64 levels$"):
        codec.decode_reply(msgpack.packb([1, "report", {"id": "a", "body": body}]))
    with pytest.raises(BadRequest, match=r"^options\.x\.x.*: nested deeper than 64 levels$"):
        codec.build(ApplyTemplate, {"id": "a", "messages": TALK, "options": body})
    body["again"] = body
    with pytest.raises(BadRequest, match=r"nested deeper than 64 levels$"):
        codec.build(ApplyTemplate, {"id": "a", "messages": TALK, "options": body})


def test_schema_of_a_real_tool_goes_through() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(8):
        items = {"type": "object", "properties": {"of": schema}}
        schema = {"type": "array", "items": items}
    message = codec.build(ApplyTemplate, {"id": "a", "messages": TALK, "tools": [{"parameters": schema}]})
    assert codec.decode_request(codec.encode(message)) == message


def test_unknown_field_of_a_message_is_named_with_its_place() -> None:
    said = request_error("apply_template", id="a", messages=[{"role": "user", "refusal": "no"}])
    assert said == "apply_template.messages[0]: unknown field 'refusal'"


def test_frame_over_the_limit_is_not_decoded() -> None:
    frame = codec.encode(messages.Tokenize(id="a", text="x" * 100_000))
    with pytest.raises(ProtocolError, match=f"frame of {len(frame)} bytes is over the limit of 65536"):
        codec.decode_request(frame, max_frame_bytes=65_536)
    assert codec.peek_id(frame, max_frame_bytes=65_536) is None


def test_short_frame_cannot_claim_much() -> None:
    start_s = time.monotonic()
    for marker in (0xDD, 0xDF, 0xDB):
        poke(b"\x93\x01\xa4ping" + struct.pack(">BI", marker, 2**32 - 1))
        poke(struct.pack(">BI", marker, 2**31) * 200)
    assert time.monotonic() - start_s < 2


def test_peek_id() -> None:
    assert codec.peek_id(msgpack.packb([1, "generate", {"id": "q", "x": 1}])) == "q"
    assert codec.peek_id(msgpack.packb([7, "whatever", {"id": "q"}])) == "q"
    assert codec.peek_id(msgpack.packb([1, "generate", {"id": 5}])) is None
    assert codec.peek_id(msgpack.packb([1, "generate", {"id": "x" * 65}])) is None
    assert codec.peek_id(b"\xc1") is None


def test_build_checks_like_decode() -> None:
    with pytest.raises(BadRequest, match=r"^temperature: expected float <= 100\.0, found 101$"):
        codec.build(Generate, {"id": "a", "prompt": "x", "temperature": 101})
    with pytest.raises(BadRequest, match=r"^top_p: expected a finite number, found nan$"):
        codec.build(Generate, {"id": "a", "prompt": "x", "top_p": float("nan")})
    with pytest.raises(BadRequest, match=r"^prompt: expected str \| null, found b'x'$"):
        codec.build(Generate, {"id": "a", "prompt": b"x"})


def test_text_without_utf8_form_is_refused_before_it_is_sent() -> None:
    with pytest.raises(
        BadRequest, match=r"^text: expected valid Unicode, found the lone surrogate '\\ud800'$"
    ):
        codec.encode(messages.Tokenize(id="a", text="x\ud800"))


def test_messages_are_frozen() -> None:
    with pytest.raises(AttributeError):
        messages.Ping(nonce=1).nonce = 2
    assert msgspec.structs.asdict(messages.Ping(nonce=1)) == {"nonce": 1}
