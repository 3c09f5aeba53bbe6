"""The daemon's side of all processes: start the nursery, spawn children, see them end, stop them.

A child is known by its pidfd, so that a signal can never hit another process that took its number.
Every wait here has a bound, and the nursery's own death is an event like any other: children die
with it, pending calls fail, `Supervisor.lost` says how it went. Not in here: whether a child is
replaced, which is the daemon's decision. Imports no numba.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ...shm.errors import ConfigError, StartFailed
from ..python_command import python_command
from . import nursery_wire as wire
from .child import Child, ExitStatus, collect_orphan

log = logging.getLogger("sterna.supervisor")

START_TIMEOUT_S = 10.0
# Scheduler and workers can be replaced without losing a token, the daemon cannot: they go first.
CHILD_OOM_SCORE_ADD = 500
# The nursery reports within a millisecond, unless it is inside a warm-up step.
STATUS_WAIT_S = 0.4
KILL_WAIT_S = 2.0
NURSERY_GRACE_S = 1.0
SEND_RETRY_S = 0.01
# What Ctrl-C and a service manager send; held back until the nursery has said that it ignores them.
HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmProgress:
    """Warm-up step `name` has ended as number `done` of `total`."""

    done: int
    total: int
    name: str


Reply = Child | wire.Ready | wire.Warmed | wire.Failed


class Supervisor:
    """Owns the nursery and every child. Made by `start`, ended by `stop_all`; one event loop.

    `lost` is done with the nursery's status when it dies without having been told to, and stays
    pending otherwise. A lost supervisor starts nothing more: stop it and start another.
    """

    def __init__(self, process: subprocess.Popen[bytes], pidfd: int, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._sock = sock
        self._pidfd = pidfd
        self._keys = itertools.count()
        self._children: dict[int, Child] = {}
        self._childless = asyncio.Event()
        self._replies: dict[int | str, asyncio.Future[Reply]] = {}
        self._on_progress: Callable[[WarmProgress], None] | None = None
        self._last_step = "none"
        self._stopping = False
        self._closed = False
        self._stop_lock = asyncio.Lock()
        self._nursery_exit: asyncio.Future[ExitStatus] = self._loop.create_future()
        self.lost: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._childless.set()
        self._loop.add_reader(sock.fileno(), self._read_events)
        self._loop.add_reader(self._pidfd, self._nursery_ended)

    @classmethod
    async def start(
        cls, *, env: Mapping[str, str] | None = None, timeout_s: float = START_TIMEOUT_S
    ) -> Supervisor:
        """Start the nursery and return when it answers; `env` is added to its environment.

        Call it from the main thread: the kernel kills the nursery when the thread that started it
        ends. Raises StartFailed.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the nursery must be started from the main thread")
        supervisor = cls(*_start_nursery(env or {}))
        try:
            reply = await supervisor._reply("ready", "answer", timeout_s)
            if isinstance(reply, wire.Failed):
                raise StartFailed(f"the nursery did not start: {reply.text}")
        except BaseException:
            supervisor._close()
            raise
        return supervisor

    @property
    def nursery_pid(self) -> int:
        """The nursery's process number, for status pages."""
        return self._process.pid

    @property
    def children(self) -> tuple[Child, ...]:
        """Every child that has not ended."""
        return tuple(self._children.values())

    def describe(self) -> str:
        """Return the nursery and its fate for a human."""
        fate = self._nursery_exit.result().describe() if self._nursery_exit.done() else "runs"
        return f"nursery (pid {self._process.pid}) {fate}"

    async def warm(
        self,
        on_progress: Callable[[WarmProgress], None] | None,
        timeout_s: float,
        request: wire.Warm,
    ) -> float:
        """Have the nursery run the steps of `request`; return the seconds it took.

        `on_progress` is called in the loop after each step and must not raise. Raises ConfigError for a wrong
        environment, StartFailed when a step or the nursery fails, or after `timeout_s`.
        """
        if "warm" in self._replies:
            raise RuntimeError("the nursery is warming up already")
        self._on_progress = on_progress
        self._last_step = "none"
        try:
            reply = await self._ask("warm", request, (), "finish warming up", timeout_s)
        finally:
            self._on_progress = None
        if isinstance(reply, wire.Warmed):
            return reply.seconds
        error = ConfigError if isinstance(reply, wire.Failed) and reply.is_setting else StartFailed
        raise error(f"warming up failed after step {self._last_step}: {_text(reply)}")

    async def spawn(
        self,
        name: str,
        entry: str,
        spec: Mapping[str, object],
        fds: Mapping[str, int],
        timeout_s: float,
        *,
        oom_score_add: int = CHILD_OOM_SCORE_ADD,
    ) -> Child:
        """Fork a child that runs `entry` ("module:function") with `spec` and duplicates of `fds`.

        `spec` holds what msgpack can carry (tuples arrive as lists), 64 KiB at most; the caller
        keeps its own descriptors. Returns when the process exists, not when it is ready to work.
        Raises StartFailed; a child that arrives after that is killed.
        """
        request = wire.Spawn(
            key=next(self._keys),
            name=name,
            entry=entry,
            spec=dict(spec),
            fd_names=list(fds),
            oom_score_add=oom_score_add,
        )
        reply = await self._ask(request.key, request, fds.values(), f"fork {name}", timeout_s)
        if isinstance(reply, Child):
            return reply
        raise StartFailed(f"{name} could not be started: {_text(reply)}")

    async def stop_all(self, grace_s: float) -> None:
        """End every child, then the nursery: SIGTERM, `grace_s` to comply, SIGKILL.

        No process and no descriptor is left, also when this call is cancelled midway (then nobody
        gets any grace). May be called again, and by several at once.
        """
        self._stopping = True
        async with self._stop_lock:
            if self._closed:
                return
            try:
                await self._stop_children(signal.SIGTERM, grace_s)
                await self._stop_children(signal.SIGKILL, KILL_WAIT_S)
                # The end of the stream is what tells the nursery to go, unless it has gone.
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_WR)
                await asyncio.wait([self._nursery_exit], timeout=NURSERY_GRACE_S)
            finally:
                self._close()

    async def _stop_children(self, number: int, wait_s: float) -> None:
        """Signal every child that runs and wait until all have ended, at most `wait_s`."""
        for child in self.children:
            child.signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._childless.wait()

    async def _ask(
        self, key: int | str, request: wire.Request, fds: Iterable[int], what: str, timeout_s: float
    ) -> Reply:
        """Send `request` and return what answers it. Raises StartFailed."""
        descriptors = tuple(fds)
        try:
            frame = wire.encode(request, len(descriptors))
        except wire.FrameError as error:
            raise StartFailed(f"the nursery cannot {what}: {error}") from error
        deadline_s = self._loop.time() + timeout_s
        while True:
            if self._stopping or self._nursery_exit.done():
                state = "it is being stopped" if self._stopping else self.describe()
                raise StartFailed(f"the nursery cannot {what}: {state}")
            try:
                wire.send(self._sock, frame, descriptors)
                break
            except BlockingIOError:  # its queue is full: it is busy inside a warm-up step
                if self._loop.time() > deadline_s:
                    raise StartFailed(f"the nursery took no request within {timeout_s:g} s") from None
                await asyncio.sleep(SEND_RETRY_S)
            except OSError as error:
                raise StartFailed(f"the nursery cannot {what}: {error.strerror}") from error
        return await self._reply(key, what, deadline_s - self._loop.time())

    async def _reply(self, key: int | str, what: str, timeout_s: float) -> Reply:
        """Wait for the reply filed under `key`. Raises StartFailed saying what took how long."""
        reply: asyncio.Future[Reply] = self._loop.create_future()
        self._replies[key] = reply
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except BaseException as error:
            if reply.done() and not reply.cancelled():
                self._disown(reply.result())
            if isinstance(error, TimeoutError):
                step = f"; last step: {self._last_step}" if key == "warm" else ""
                raise StartFailed(f"the nursery did not {what} within {timeout_s:.1f} s{step}") from None
            raise
        finally:
            del self._replies[key]

    def _disown(self, reply: Reply) -> None:
        """Kill a child whose caller has just given up."""
        if isinstance(reply, Child):
            reply.signal(signal.SIGKILL)

    def _read_events(self) -> None:
        """Take every frame that has arrived; after the end of the stream the pidfd says the rest."""
        while True:
            try:
                received = wire.receive(self._sock, wire.EVENTS)
            except BlockingIOError:
                return
            except (OSError, wire.FrameError) as error:
                log.error("nursery.garbled error=%s", wire.one_line(error))
                self._process.kill()
                received = None
            if received is None:
                self._loop.remove_reader(self._sock.fileno())
                return
            self._dispatch(*received)

    def _dispatch(self, event: wire.AnyEvent, fds: list[int]) -> None:
        """Give one event to whoever awaits it."""
        if isinstance(event, wire.Spawned):
            self._adopt(event, fds)
        elif isinstance(event, wire.Exited):
            self._child_ended(event.key, ExitStatus.from_returncode(event.status))
        elif isinstance(event, wire.Progress):
            self._last_step = f"{event.name} ({event.done}/{event.total})"
            if self._on_progress is not None:
                self._on_progress(WarmProgress(done=event.done, total=event.total, name=event.name))
        elif isinstance(event, wire.Ready):
            self._resolve("ready", event)
        elif isinstance(event, wire.Warmed):
            self._resolve("warm", event)
        else:
            self._resolve("warm" if event.op == "warm" else event.key, event)

    def _resolve(self, key: int | str, reply: Reply) -> bool:
        """Hand `reply` to the call that waits under `key`; False when it has given up."""
        waiting = self._replies.get(key)
        if waiting is None or waiting.done():
            return False
        waiting.set_result(reply)
        return True

    def _adopt(self, event: wire.Spawned, fds: list[int]) -> None:
        """Enter a new child and watch its pidfd; one that nobody awaits any more is killed."""
        if not fds:
            text = "no file descriptor is left in the daemon"
            self._resolve(event.key, wire.Failed(op="spawn", text=text))
            wire.send(self._sock, wire.encode(wire.Kill(key=event.key)))
            return
        (pidfd,) = fds
        child = Child(name=event.name, pid=event.pid, pidfd=pidfd)
        self._children[event.key] = child
        self._childless.clear()
        self._loop.add_reader(pidfd, self._pidfd_readable, event.key)
        reply = wire.Failed(op="spawn", text="the daemon stops") if self._stopping else child
        if not self._resolve(event.key, reply) or self._stopping:
            child.signal(signal.SIGKILL)

    def _pidfd_readable(self, key: int) -> None:
        """Note that the child has ended; give the nursery a moment to say how."""
        child = self._children.get(key)
        if child is None:
            return
        pidfd = child.pidfd
        self._loop.remove_reader(pidfd)
        if self._nursery_exit.done():
            self._child_ended(key, collect_orphan(pidfd))
        else:
            self._loop.call_later(STATUS_WAIT_S, self._child_ended, key, ExitStatus())

    def _child_ended(self, key: int, status: ExitStatus) -> None:
        """Enter the end of a child, the first time that it is heard of."""
        child = self._children.pop(key, None)
        if child is None:
            return
        self._loop.remove_reader(child.pidfd)
        child.ended(status)
        if not self._children:
            self._childless.set()

    def _nursery_ended(self) -> None:
        """Enter the nursery's end: hear its last words, fail who waits, end its children."""
        self._loop.remove_reader(self._pidfd)
        self._read_events()
        self._loop.remove_reader(self._sock.fileno())
        try:
            status = ExitStatus.from_returncode(self._process.wait(timeout=KILL_WAIT_S))
        except subprocess.TimeoutExpired:  # killed inside a system call that cannot be interrupted
            log.error("nursery.stuck pid=%d", self._process.pid)
            status = ExitStatus()
        self._nursery_exit.set_result(status)
        for key in list(self._replies):
            self._resolve(key, wire.Failed(op="", text=self.describe()))
        for child in self.children:
            child.signal(signal.SIGKILL)
        if not self._stopping:
            log.error("nursery.lost pid=%d exit=%s", self._process.pid, status.describe())
            self.lost.set_result(status)

    def _close(self) -> None:
        """Kill what is left and give every descriptor back; without waiting for anybody's grace."""
        if self._closed:
            return
        self._closed = self._stopping = True
        for key, child in list(self._children.items()):
            log.warning("supervisor.killed name=%s pid=%d", child.name, child.pid)
            child.signal(signal.SIGKILL)
            self._child_ended(key, ExitStatus())
        if not self._nursery_exit.done():
            self._process.kill()
            self._nursery_ended()
        self._sock.close()
        os.close(self._pidfd)


def _text(reply: Reply) -> str:
    """Return why there is no other reply than this one."""
    return reply.text if isinstance(reply, wire.Failed) else f"unexpected answer {reply!r}"


def _start_nursery(
    env: Mapping[str, str],
) -> tuple[subprocess.Popen[bytes], int, socket.socket]:
    """Start the nursery process; return it, its pidfd and our end of its socket. Raises StartFailed."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise StartFailed(f"cannot start the nursery: {error.strerror}") from error
    ours.setblocking(False)
    command = python_command("-m", "sterna.runtime.processes.nursery", str(theirs.fileno()))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # the daemon's standard output is its own
            env={**os.environ, **env},
        )
        return process, _open_pidfd(process), ours
    except OSError as error:
        ours.close()
        raise StartFailed(f"cannot start the nursery: {error.strerror}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()


def _open_pidfd(process: subprocess.Popen[bytes]) -> int:
    """Return a pidfd of `process`; end it when there is no descriptor left for one."""
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.wait(timeout=KILL_WAIT_S)
        raise
