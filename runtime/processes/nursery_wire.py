"""What the daemon and its fork server say to each other, and how a frame crosses the socket.

One frame is one packet of a SOCK_SEQPACKET pair: a msgpack map, with descriptors as ancillary data. Both
ends are ours and are started together, so that there is no version field. Not in here: what either
side does with a message (nursery.py, supervisor.py). Imports no asyncio: the nursery stays small.

    daemon -> nursery   warm, spawn (+ the child's descriptors), kill
    nursery -> daemon   ready, progress, warmed, spawned (+ pidfd), exited, failed
"""

from __future__ import annotations

import contextlib
import os
import socket
from array import array
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

MAX_FRAME_BYTES = 64 * 1024
# The kernel's own limit for one packet is 253.
MAX_FDS = 128
_FD_BYTES = array("i").itemsize
_FDS_SPACE_BYTES = socket.CMSG_SPACE(MAX_FDS * _FD_BYTES)

WARM_STEPS = "sterna.runtime.processes.kernel_steps:steps"


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag=str.lower):
    """Base of what the daemon asks for."""


class Warm(Request, frozen=True, kw_only=True):
    """Run every step of `steps` ("module:function" that returns (name, callable) pairs).

    The function is called with `arguments` by keyword.
    """

    steps: str = WARM_STEPS
    arguments: dict[str, object] = {}


class Spawn(Request, frozen=True, kw_only=True):
    """Fork a child that runs `entry(spec, fds)`; `fd_names` name the frame's descriptors in order."""

    key: int
    name: str
    entry: str
    spec: dict[str, object]
    fd_names: list[str]
    oom_score_add: int = 0


class Kill(Request, frozen=True, kw_only=True):
    """Kill child `key`, whose pidfd did not arrive."""

    key: int


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """Base of what the nursery reports."""


class Ready(Event, frozen=True, kw_only=True):
    """The nursery listens."""


class Progress(Event, frozen=True, kw_only=True):
    """Warm-up step `name` has ended as number `done` of `total`."""

    done: int
    total: int
    name: str


class Warmed(Event, frozen=True, kw_only=True):
    """All warm-up steps have ended."""

    seconds: float


class Spawned(Event, frozen=True, kw_only=True):
    """Child `key` runs; the frame carries its pidfd."""

    key: int
    name: str
    pid: int


class Exited(Event, frozen=True, kw_only=True):
    """Child `key` has ended: `status` >= 0 is its exit code, < 0 the signal that killed it."""

    key: int
    pid: int
    status: int


class Failed(Event, frozen=True, kw_only=True):
    """`op` did not succeed; `text` is one line for a human. `key` is the spawn's, else -1."""

    op: str
    text: str
    key: int = -1
    is_setting: bool = False
    """Whether a setting of the environment is what is wrong: a ConfigError."""


AnyRequest = Warm | Spawn | Kill
AnyEvent = Ready | Progress | Warmed | Spawned | Exited | Failed
M = TypeVar("M")

REQUESTS: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
EVENTS: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(AnyEvent)


class FrameError(Exception):
    """A frame is too large, cut short or not a known message."""


def encode(message: Request | Event, num_fds: int = 0) -> bytes:
    """Return `message` as one frame. Raises FrameError when it or its descriptors exceed a limit."""
    try:
        frame = msgspec.msgpack.encode(message)
    except (TypeError, OverflowError) as error:
        raise FrameError(f"cannot be sent: {error}") from error
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameError(f"message of {len(frame)} bytes, limit {MAX_FRAME_BYTES}")
    if num_fds > MAX_FDS:
        raise FrameError(f"message with {num_fds} descriptors, limit {MAX_FDS}")
    return frame


def send(sock: socket.socket, frame: bytes, fds: Sequence[int] = ()) -> None:
    """Send one frame; the receiver gets duplicates of `fds`. Raises OSError as the socket does."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    # Not socket.send_fds, which drops its flags: without this one a closed peer may raise SIGPIPE.
    sock.sendmsg([frame], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, decoder: msgspec.msgpack.Decoder[M]) -> tuple[M, list[int]] | None:
    """Return the next message with its descriptors (close-on-exec, the caller's), None at the end.

    Fewer descriptors than were sent arrive when this process has none left; the caller compares.
    Raises FrameError for a frame that is cut short or unknown (its descriptors are closed), and
    BlockingIOError or TimeoutError as the socket does.
    """
    try:
        # socket.recv_fds drops its flags, as socket.send_fds does.
        frame, ancillary, flags, _ = sock.recvmsg(MAX_FRAME_BYTES, _FDS_SPACE_BYTES, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None
    fds: list[int] = []
    for level, cmsg_type, data in ancillary:
        if (level, cmsg_type) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.extend(memoryview(data[: len(data) // _FD_BYTES * _FD_BYTES]).cast("i"))
    if not frame:
        close_all(fds)
        return None
    try:
        if flags & socket.MSG_TRUNC:
            raise FrameError(f"frame of more than {MAX_FRAME_BYTES} bytes")
        return decoder.decode(frame), fds
    except msgspec.MsgspecError as error:
        close_all(fds)
        raise FrameError(f"unknown frame: {error}") from error
    except FrameError:
        close_all(fds)
        raise


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that this process owns, even when one of them is gone already."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def one_line(error: BaseException) -> str:
    """Return `Type: text` of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
