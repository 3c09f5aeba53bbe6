"""The nursery alone, at the end of a bare socket; and the frames that cross it."""

from __future__ import annotations

import ast
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sterna.runtime.processes import nursery_wire as wire
from sterna.runtime.processes.nursery import resolve
from sterna.workers.kernels.cache import sources_digest

HERE = Path(__file__).parent
TARGET = "generic"  # a forced one needs no proof, which would compile
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

    def ask(self, request: wire.Request, fds: Sequence[int] = ()) -> tuple[wire.AnyEvent, list[int]]:
        wire.send(self.sock, wire.encode(request, len(fds)), fds)
        return self.next()

    def spawn(
        self, key: int, entry: str, fds: Mapping[str, int] | None = None, **more: object
    ) -> tuple[int, int]:
        """Spawn a child; return its pid and pidfd."""
        fds = fds or {}
        request = wire.Spawn(
            key=key, name=f"worker {key}", entry=f"nursery_entries:{entry}", spec=more, fd_names=list(fds),
            oom_score_add=500,
        )  # fmt: skip
        event, received = self.ask(request, list(fds.values()))
        assert isinstance(event, wire.Spawned), event
        assert (event.key, event.name) == (key, f"worker {key}")
        return event.pid, received[0]

    def run(self, entry: str, fds: Mapping[str, int] | None = None, **more: object) -> int:
        """Run a child called "worker 3" to its end; return how it ended."""
        pid, pidfd = self.spawn(3, entry, fds, **more)
        os.close(pidfd)
        event, _ = self.next()
        assert isinstance(event, wire.Exited)
        assert (event.key, event.pid) == (3, pid)
        return event.status

    def errors(self) -> str:
        """End the nursery; return what it and its children have printed."""
        self.sock.close()
        assert self.process.wait(5.0) == 0
        assert self.process.stderr is not None
        return self.process.stderr.read()


@pytest.fixture
def nursery(pair: Pair, tmp_path: Path) -> Iterator[Running]:
    """Start a nursery and hand it over once it has said that it is ready."""
    ours, theirs = pair
    command = [sys.executable, "-m", "sterna.runtime.processes.nursery", str(theirs.fileno())]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "NUMBA_CACHE_DIR": str(tmp_path),
        "STERNA_KERNEL_TARGET": TARGET,
    }
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
    _, pidfd = nursery.spawn(1, "wait")
    nursery.sock.close()
    assert has_ended(pidfd, 1.0)
    assert nursery.process.wait(1.0) == 0


def test_signals_to_the_whole_group_leave_the_decision_to_the_daemon(nursery: Running) -> None:
    pid, pidfd = nursery.spawn(1, "wait")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        nursery.process.send_signal(number)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.pidfd_send_signal(pidfd, number)
    _, second = nursery.spawn(2, "wait")
    assert not has_ended(second, 0.05)
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    assert nursery.next() == (wire.Exited(key=1, pid=pid, status=-signal.SIGTERM), [])
    assert has_ended(pidfd, 0.0)


def test_sigterm_right_after_the_fork_is_not_lost(nursery: Running) -> None:
    for key in range(20):
        pid, pidfd = nursery.spawn(key, "wait")
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        assert nursery.next() == (wire.Exited(key=key, pid=pid, status=-signal.SIGTERM), [])
        os.close(pidfd)


def test_kill_request_kills_that_child(nursery: Running) -> None:
    first, first_fd = nursery.spawn(1, "wait")
    _, second_fd = nursery.spawn(2, "wait")
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
    text = "ValueError: 2 descriptors named, 1 received"
    assert nursery.ask(request, [0]) == (wire.Failed(op="spawn", key=4, text=text), [])


def test_second_thread_forbids_forking(nursery: Running) -> None:
    event, _ = nursery.ask(wire.Warm(steps="nursery_entries:threaded_steps"))
    assert event == wire.Progress(done=1, total=1, name="thread")
    assert isinstance(nursery.next()[0], wire.Warmed)
    request = wire.Spawn(key=1, name="worker 1", entry="nursery_entries:wait", spec={}, fd_names=[])
    event, _ = nursery.ask(request)
    assert isinstance(event, wire.Failed)
    assert re.search(r"has 2 threads .* cannot fork safely", event.text)


def test_numba_sees_the_settings_and_children_fork_after_it(nursery: Running) -> None:
    nursery.sock.settimeout(60.0)
    event, _ = nursery.ask(wire.Warm(steps="nursery_entries:numba_steps"))
    assert event == wire.Progress(done=1, total=1, name="numba")
    assert isinstance(nursery.next()[0], wire.Warmed)
    assert nursery.run("leave", code=0) == 0


def test_child_has_what_it_was_given_and_nothing_else(
    nursery: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STERNA_KERNEL_TARGET", TARGET)  # the folder's name depends on it
    _, sibling = nursery.spawn(2, "wait")
    os.close(sibling)
    reading, writing = os.pipe()
    assert nursery.run("surroundings", {"out": writing}, layers=(1, 2)) == 0
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert ast.literal_eval(os.read(reading, 65536).decode()) == {
        "fds": [],
        "comm": "sterna-worker3",
        "pdeathsig": signal.SIGKILL,
        "core": (0, 0),
        "oom": min(1000, own + 500),
        "sigint_ignored": True,
        "sigterm_default": True,
        "blocked": [],
        "layer": "workqueue",
        "target": TARGET,
        "cache": str(tmp_path / f"kernels-{sources_digest()}"),
        "spec": {"layers": [1, 2]},
    }
    os.close(reading)
    os.close(writing)


FAILURES = [
    ("stumble", 70, "worker 3: error: KeyError: 'two\\nlines'\n"),
    ("refuse", 65, "worker 3: error: tales.gguf: tensor blk.0 is cut short\n"),
    ("confused", 70, "worker 3: error: TypeError: entry nursery_entries:confused returned 'fine', "
     "not an exit code\n"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "code", "line"), FAILURES)
def test_failing_child_says_why_in_one_line(nursery: Running, entry: str, code: int, line: str) -> None:
    assert nursery.run(entry) == code
    assert nursery.errors() == line


@pytest.mark.parametrize(("entry", "code", "line"), FAILURES)
def test_debugging_adds_the_traceback(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, entry: str, code: int, line: str
) -> None:
    monkeypatch.setenv("STERNA_DEBUG", "1")
    nursery: Running = request.getfixturevalue("nursery")
    assert nursery.run(entry) == code
    printed = nursery.errors()
    assert printed.startswith("Traceback")
    assert printed.endswith(line)


def test_forking_is_quick(nursery: Running) -> None:
    """The reason for a nursery: a child exists within milliseconds (0.1 s allows for a busy machine)."""
    nursery.spawn(0, "wait")
    took_s = []
    for key in range(1, 6):
        began = time.perf_counter()
        os.close(nursery.spawn(key, "wait")[1])
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
