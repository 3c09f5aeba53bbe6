"""The nursery alone, at the end of a bare socket; and the frames that cross it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sterna.runtime import nursery_wire as wire
from sterna.runtime.nursery import resolve

HERE = Path(__file__).parent
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of such a socket as the nursery's."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.settimeout(5.0)
        right.settimeout(5.0)
        yield left, right


@dataclass
class Running:
    """A nursery process and the daemon's end of its socket."""

    process: subprocess.Popen[str]
    sock: socket.socket

    def next(self) -> tuple[wire.AnyEvent, list[int]]:
        received = wire.receive(self.sock, wire.EVENTS)
        assert received is not None
        return received

    def spawn(self, key: int, entry: str) -> tuple[int, int]:
        """Spawn a child; return its pid and pidfd."""
        request = wire.Spawn(key=key, name="worker 0", entry=entry, spec={}, fd_names=[])
        wire.send(self.sock, wire.encode(request))
        event, fds = self.next()
        assert isinstance(event, wire.Spawned)
        assert (event.key, event.name) == (key, "worker 0")
        return event.pid, fds[0]


@pytest.fixture
def nursery(pair: Pair) -> Iterator[Running]:
    """Start a nursery and hand it over once it has said that it is ready."""
    ours, theirs = pair
    command = [sys.executable, "-m", "sterna.runtime.nursery", str(theirs.fileno())]
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    with subprocess.Popen(
        command, pass_fds=(theirs.fileno(),), env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        theirs.close()
        running = Running(process, ours)
        try:
            assert running.next() == (wire.Ready(), [])
            yield running
        finally:
            process.kill()


def has_ended(pidfd: int, limit_s: float) -> bool:
    """Whether the process behind `pidfd` ends within `limit_s`; closes it."""
    ready, _, _ = select.select([pidfd], [], [], limit_s)
    os.close(pidfd)
    return bool(ready)


def test_closed_socket_ends_the_nursery_and_its_children(nursery: Running) -> None:
    _, pidfd = nursery.spawn(1, "nursery_entries:wait")
    nursery.sock.close()
    assert has_ended(pidfd, 1.0)
    assert nursery.process.wait(1.0) == 0


def test_signals_to_the_whole_group_leave_the_decision_to_the_daemon(nursery: Running) -> None:
    pid, pidfd = nursery.spawn(1, "nursery_entries:wait")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        nursery.process.send_signal(number)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.pidfd_send_signal(pidfd, number)
    _, second = nursery.spawn(2, "nursery_entries:wait")
    assert not has_ended(second, 0.05)
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    assert nursery.next() == (wire.Exited(key=1, pid=pid, status=-signal.SIGTERM), [])
    assert has_ended(pidfd, 0.0)


def test_sigterm_right_after_the_fork_is_not_lost(nursery: Running) -> None:
    for key in range(20):
        pid, pidfd = nursery.spawn(key, "nursery_entries:wait")
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        assert nursery.next() == (wire.Exited(key=key, pid=pid, status=-signal.SIGTERM), [])
        os.close(pidfd)


def test_kill_request_kills_that_child(nursery: Running) -> None:
    first, first_fd = nursery.spawn(1, "nursery_entries:wait")
    _, second_fd = nursery.spawn(2, "nursery_entries:wait")
    wire.send(nursery.sock, wire.encode(wire.Kill(key=1)))
    wire.send(nursery.sock, wire.encode(wire.Kill(key=7)))
    assert nursery.next() == (wire.Exited(key=1, pid=first, status=-signal.SIGKILL), [])
    os.close(first_fd)
    assert not has_ended(second_fd, 0.05)


def test_garbage_ends_the_nursery_with_one_line(nursery: Running) -> None:
    nursery.sock.send(b"\xc1 garbage")
    assert nursery.process.wait(2.0) == 70
    assert nursery.process.stderr is not None
    lines = nursery.process.stderr.read().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("nursery: error: FrameError: unknown frame")


def test_missing_descriptors_fail_the_spawn(nursery: Running) -> None:
    request = wire.Spawn(key=4, name="w", entry="nursery_entries:wait", spec={}, fd_names=["a", "b"])
    wire.send(nursery.sock, wire.encode(request, 1), [0])
    text = "ValueError: 2 descriptors named, 1 received"
    assert nursery.next() == (wire.Failed(op="spawn", key=4, text=text), [])


def test_forking_is_quick(nursery: Running) -> None:
    """The reason for a nursery: a child exists within milliseconds (0.1 s allows for a busy machine)."""
    nursery.spawn(0, "nursery_entries:wait")
    took_s = []
    for key in range(1, 6):
        began = time.perf_counter()
        os.close(nursery.spawn(key, "nursery_entries:wait")[1])
        took_s.append(time.perf_counter() - began)
    assert min(took_s) < 0.1


def test_frames_carry_messages_and_descriptors(pair: Pair) -> None:
    left, right = pair
    request = wire.Spawn(
        key=3,
        name="worker 0",
        entry="a:b",
        spec={"layers": [1, 2], "digest": b"\x00", "deep": {"x": None}},
        fd_names=["one", "two"],
        oom_score_add=500,
    )
    fd = os.memfd_create("test")
    wire.send(left, wire.encode(request, 2), [fd, fd])
    received = wire.receive(right, wire.REQUESTS)
    assert received is not None
    assert received[0] == request
    assert [os.fstat(other).st_ino for other in received[1]] == [os.fstat(fd).st_ino] * 2
    assert not any(os.get_inheritable(other) for other in received[1])
    wire.close_all([fd, *received[1]])


def test_end_of_stream_is_none(pair: Pair) -> None:
    left, right = pair
    left.close()
    assert wire.receive(right, wire.EVENTS) is None


@pytest.mark.parametrize(
    "frame",
    [
        b"\xc1",
        b"\x80",
        b"\x81\xa5event\xa4fork",
        b"\x81\xa5event\xa6exited",
        b"x" * (wire.MAX_FRAME_BYTES + 1),
    ],
    ids=["no msgpack", "no tag", "unknown tag", "fields missing", "too long"],
)
def test_bad_frame_is_refused_and_its_descriptors_are_closed(pair: Pair, frame: bytes) -> None:
    left, right = pair
    before = len(list(Path("/proc/self/fd").iterdir()))
    wire.send(left, frame, [0, 1])
    with pytest.raises(wire.FrameError):
        wire.receive(right, wire.EVENTS)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("path", ["", "os", "os:", ":path", "os:nothing", "os:name"])
def test_resolve_refuses_what_is_no_function(path: str) -> None:
    with pytest.raises(ValueError, match=r"not of the form module:function|has no function"):
        resolve(path)


def test_resolve_returns_the_function() -> None:
    assert resolve("os.path:join") is os.path.join
