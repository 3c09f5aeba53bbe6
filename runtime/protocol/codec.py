"""Bytes of a frame to a typed message and back; the only place that knows the envelope.

A frame is `[PROTOCOL, tag, body]` in msgpack, `body` a map of the message's fields. Decoding trusts nothing:
sizes are checked before memory is taken, then the shape, then every field. All functions raise errors of
Sterna's tree only, each one line. Not in here: what the messages are (`messages.py`) and how they travel
(`sockets.py`).
"""

from __future__ import annotations

import difflib
import math
import re
from enum import Enum
from typing import Any, TypeVar, cast

import msgpack  # type: ignore[import-untyped]
import msgspec

from ...shm.errors import BadRequest, ProtocolError, RequestError
from .messages import MAX_ID_CHARS, REPLIES, REQUESTS, Message, Reply, Request, tag_of

PROTOCOL = 1
MAX_FRAME_BYTES = 16 * 2**20
MAX_ARRAY_ITEMS = 2**20
MAX_MAP_ITEMS = 2**12
# A tool's JSON schema takes three levels for each array of objects in it.
MAX_DEPTH = 64

_TAGS = {cls: tag for registry in (REQUESTS, REPLIES) for tag, cls in registry.items()}
_LEAVES = frozenset({str, int, bool, type(None)})
_UNKNOWN_FIELD = re.compile(
    r"Object contains unknown field `(?P<name>.*?)`(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL
)
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>.*?)`(?: - at `(?P<path>[^`]*)`)?$")
_AT_PATH = re.compile(r"^(?P<what>.*) - at `(?P<path>[^`]*)`$", re.DOTALL)

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Return the frame of a message; raises BadRequest for values that have no form in it."""
    try:
        body = msgspec.to_builtins(message)
    except TypeError as e:  # such as a subclass of str where any value may lie
        raise BadRequest(f"{_TAGS[type(message)]}: {_one_line(e)}") from None
    try:
        return cast(bytes, msgpack.packb([PROTOCOL, _TAGS[type(message)], body], use_bin_type=True))
    except UnicodeEncodeError as e:
        where = next((k for k, v in body.items() if not _encodes(v)), "a field")
        raise BadRequest(
            f"{where}: expected valid Unicode, found the lone surrogate {e.object[e.start]!r}"
        ) from None
    except OverflowError:
        raise BadRequest(
            f"{_TAGS[type(message)]}: expected integers of 64 bits, found a larger one"
        ) from None


def decode_request(frame: bytes, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> Request:
    """Return the client's message in `frame`.

    Raises ProtocolError for what is no message of this protocol, BadRequest for a wrong field in one.
    """
    tag, body = _open_envelope(frame, max_frame_bytes)
    cls = REQUESTS.get(tag)
    if cls is None:
        raise ProtocolError(f"unknown message {_shown(tag)}; a client may send {', '.join(REQUESTS)}")
    return cast(Request, _convert(cls, body, BadRequest))


def decode_reply(frame: bytes, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> Reply:
    """Return the daemon's message in `frame`; raises ProtocolError, naming the field if one is wrong."""
    tag, body = _open_envelope(frame, max_frame_bytes)
    cls = REPLIES.get(tag)
    if cls is None:
        raise ProtocolError(f"unknown message {_shown(tag)}; a daemon may send {', '.join(REPLIES)}")
    return cast(Reply, _convert(cls, body, ProtocolError))


def build(cls: type[M], fields: dict[str, Any]) -> M:
    """Return a message of `fields` after the same checks that a decoded one gets; raises BadRequest."""
    _check_values(fields, tag_of(cls), 0, BadRequest)
    return _convert(cls, fields, BadRequest)


def peek_id(frame: bytes, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> str | None:
    """Return the request id in a frame that did not decode, or None; never raises."""
    try:
        envelope = _unpack(frame, max_frame_bytes)
    except ProtocolError:
        return None
    if not isinstance(envelope, list) or len(envelope) != 3 or not isinstance(envelope[2], dict):
        return None
    found = envelope[2].get("id")
    return found if isinstance(found, str) and 1 <= len(found) <= MAX_ID_CHARS else None


def _unpack(frame: bytes, max_frame_bytes: int) -> object:
    if len(frame) > max_frame_bytes:
        raise ProtocolError(f"frame of {len(frame)} bytes is over the limit of {max_frame_bytes}")
    try:
        # An array cannot hold more items than the frame has bytes: a short frame cannot claim much memory.
        return msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            max_str_len=len(frame),
            max_bin_len=0,
            max_ext_len=0,
            max_array_len=min(len(frame), MAX_ARRAY_ITEMS),
            max_map_len=min(len(frame), MAX_MAP_ITEMS),
        )
    except UnicodeDecodeError:
        raise ProtocolError("frame holds text that is not UTF-8") from None
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError, MemoryError) as e:
        raise ProtocolError(
            f"frame of {len(frame)} bytes is not msgpack within the limits ({_one_line(e)})"
        ) from None


def _open_envelope(frame: bytes, max_frame_bytes: int) -> tuple[str, dict[str, Any]]:
    envelope = _unpack(frame, max_frame_bytes)
    if not isinstance(envelope, list) or not envelope:
        raise ProtocolError(f"frame is not [protocol, tag, body], found {_shown(envelope)}")
    # First of all: another protocol may have another number of parts.
    if type(envelope[0]) is not int or envelope[0] != PROTOCOL:
        raise ProtocolError(f"frame speaks protocol {_shown(envelope[0])}, this side speaks {PROTOCOL}")
    if len(envelope) != 3:
        raise ProtocolError(f"frame is not [protocol, tag, body], found {_shown(envelope)}")
    _, tag, body = envelope
    if not isinstance(tag, str):
        raise ProtocolError(f"tag: expected str, found {_shown(tag)}")
    if not isinstance(body, dict):
        raise ProtocolError(f"body of {_shown(tag)}: expected a map, found {_shown(body)}")
    _check_values(body, tag, 0, BadRequest if tag in REQUESTS else ProtocolError)
    return tag, body


def _check_values(value: object, path: str, depth: int, error: type[RequestError]) -> None:
    """Refuse what msgspec lets through: non-finite numbers, keys and values of other types, deep nesting."""
    if depth > MAX_DEPTH:
        raise error(f"{_shown_path(path)}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise error(f"{_shown_path(path)}: expected text as key, found {_shown(key)}")
            if type(item) not in _LEAVES:
                _check_values(item, key if depth == 0 else f"{path}.{key}", depth + 1, error)
    elif isinstance(value, (list, tuple)):
        if _LEAVES.issuperset(map(type, value)):  # a long prompt is one pass in C
            return
        for i, item in enumerate(value):
            if type(item) not in _LEAVES:
                _check_values(item, f"{path}[{i}]", depth + 1, error)
    elif isinstance(value, float) and not math.isfinite(value):
        raise error(f"{_shown_path(path)}: expected a finite number, found {value}")
    elif depth > 1 and not isinstance(value, (str, int, float, Enum)):  # fields have their own types
        raise error(
            f"{_shown_path(path)}: expected text, a number, an array or a map, found {type(value).__name__}"
        )


def _convert(cls: type[M], body: dict[str, Any], error: type[RequestError]) -> M:
    try:
        return msgspec.convert(body, cls)
    except msgspec.ValidationError as e:
        raise error(_explain(cls, body, str(e))) from None
    except BadRequest as e:
        raise error(str(e)) from None


def _explain(cls: type[Message], body: dict[str, Any], text: str) -> str:
    """Return msgspec's complaint in our form: field, what was expected, what was found."""
    tag = tag_of(cls)
    if m := _UNKNOWN_FIELD.match(text):
        near = difflib.get_close_matches(m["name"], cls.__struct_fields__, n=1) if not m["path"] else []
        hint = f", did you mean {near[0]!r}?" if near else ""
        return f"{_field_path(tag, m['path'])}: unknown field {_shown(m['name'])}{hint}"
    if m := _MISSING_FIELD.match(text):
        return f"{_field_path(tag, m['path'])}: field {m['name']!r} is missing"
    if m := _AT_PATH.match(text):
        what = m["what"].split(", got ")[0].replace("`", "").replace("Expected", "expected")
        return f"{_field_path('', m['path'])}: {_one_line(what)}, found {_shown(_value_at(body, m['path']))}"
    return f"{tag}: {_one_line(text)}"


def _field_path(tag: str, path: str | None) -> str:
    inner = (path or "").removeprefix("$").removeprefix(".")
    return f"{tag}.{inner}" if tag and inner else inner or tag


def _value_at(body: object, path: str) -> object:
    """Follow msgspec's path, such as `$.items[0].id` or `$.stop[...]` (some item), as far as it goes."""
    value = body
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        if name and isinstance(value, dict) and name in value:
            value = value[name]
        elif index and isinstance(value, (list, tuple)) and int(index) < len(value):
            value = value[int(index)]
        else:
            break
    return value


def _shown(value: object) -> str:
    """Return a value for an error text: one line, at most about 60 characters whatever it is."""
    if isinstance(value, (list, tuple, dict)):
        container = "map" if isinstance(value, dict) else "array"
        return f"{container} of {len(value)}"
    if isinstance(value, str) and len(value) > 40:
        return f"{value[:40]!r}... ({len(value)} characters)"
    return ascii(value)[:60]


def _shown_path(path: str) -> str:
    return ascii(path[:80])[1:-1]


def _one_line(error: object) -> str:
    text = str(error) or type(error).__name__
    return ascii(text[:160])[1:-1]


def _encodes(value: object) -> bool:
    try:
        msgpack.packb(value)
    except UnicodeEncodeError:
        return False
    return True
