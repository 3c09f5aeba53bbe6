"""The nursery: one small single-threaded process that has the kernels loaded and forks the others.

Started by the daemon as `python -m sterna.runtime.processes.nursery FD`. It warms the kernels up, forks the
scheduler and the workers on request, hands their pidfds over and reports how they end. It decides
nothing: who runs, who is replaced and when to stop is the daemon's (supervisor.py). When the daemon
goes, by whatever death, the nursery goes, and all children with it.

It must stay single-threaded, because only the forking thread lives on in a child and a lock that
another one held stays locked for ever. Imports no numba itself: the variables come first.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn, cast

from ...shm.errors import ConfigError, SternaError
from . import nursery_wire as wire
from .trim import trim

EXIT_SOFTWARE = 70
POLL_SLICE_S = 5.0
# The daemon empties its end within milliseconds; hundreds of events fit in between.
SEND_TIMEOUT_S = 60.0
REAP_TIMEOUT_S = 2.0

# Ctrl-C, a closed terminal and a signal to the whole group reach every process; the daemon decides.
IGNORED_IN_CHILDREN = (signal.SIGINT, signal.SIGHUP)
IGNORED_HERE = (*IGNORED_IN_CHILDREN, signal.SIGTERM)

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 1, 15, 38

WarmSteps = list[tuple[str, Callable[[], None]]]
Entry = Callable[[Mapping[str, object], Mapping[str, int]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """A running child; the nursery owns `pidfd`."""

    key: int
    pid: int
    pidfd: int


def main() -> int:
    """Serve the daemon at the other end of descriptor argv[1] until it goes; return the exit code."""
    for number in IGNORED_HERE:
        signal.signal(number, signal.SIG_IGN)
    # Children inherit it, so that each of them writes where its threads stand: docs/debugging.md.
    faulthandler.register(signal.SIGUSR1)
    # The daemon started us with these blocked, so that none could come before this line.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    daemon_pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    die_with_parent(daemon_pid)
    _prctl(_PR_SET_NAME, _process_name("nursery"))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    sock.settimeout(SEND_TIMEOUT_S)
    nursery = Nursery(sock)
    try:
        nursery.serve()
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the daemon went while it was being told something
    except (OSError, wire.FrameError) as error:
        print_error("nursery", error)
        return EXIT_SOFTWARE
    finally:
        nursery.kill_all()
    return 0


class Nursery:
    """The loop: requests from the daemon in, children and their ends out."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._children: dict[int, Forked] = {}
        # poll, not epoll: it owns no descriptor that a child would have to close.
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)

    def serve(self) -> None:
        """Answer requests and report ended children until the daemon closes its end.

        Raises OSError when the daemon can no longer be told, FrameError for a request that is none.
        """
        self._send(wire.Ready())
        while True:
            for fd, _ in self._poll.poll(int(POLL_SLICE_S * 1000)):
                if fd != self._sock.fileno():
                    self._reap(fd)
                elif not self._serve_request():
                    return

    def kill_all(self) -> None:
        """Kill every child and wait until each is gone, at most REAP_TIMEOUT_S in all."""
        for child in self._children.values():
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)  # not reaped yet: it exists
        deadline = time.monotonic() + REAP_TIMEOUT_S
        for child in self._children.values():
            waiter = select.poll()
            waiter.register(child.pidfd, select.POLLIN)
            if waiter.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                os.waitpid(child.pid, 0)

    def _serve_request(self) -> bool:
        """Do what the next request says; False when the daemon has closed its end."""
        received = wire.receive(self._sock, wire.REQUESTS)
        if received is None:
            return False
        request, fds = received
        try:
            if isinstance(request, wire.Warm):
                self._warm(request)
            elif isinstance(request, wire.Spawn):
                self._spawn(request, fds)
            else:
                self._kill(request.key)
        finally:
            wire.close_all(fds)
        return True

    def _warm(self, request: wire.Warm) -> None:
        """Run the warm-up steps; report each, then the whole, or the first failure."""
        began_s = time.monotonic()
        borrowed: Path | None = None
        try:
            borrowed = self._borrow_folder()
            self._prepare_imports()
            steps: WarmSteps = cast("WarmSteps", resolve(request.steps)(**request.arguments))
            for done, (name, step) in enumerate(steps, start=1):
                step()
                self._send(wire.Progress(done=done, total=len(steps), name=name))
        except (BrokenPipeError, ConnectionResetError):
            raise  # the daemon has gone
        except Exception as error:  # reported to the daemon, whatever a step raised
            wrong = isinstance(error, ConfigError)
            self._send(wire.Failed(op="warm", text=describe(error), is_setting=wrong))
            return
        finally:
            if borrowed is not None:
                shutil.rmtree(borrowed, ignore_errors=True)
        # What was loaded is shared with every child for good: keep the collector from writing to it.
        gc.collect()
        trim()
        gc.freeze()
        self._send(wire.Warmed(seconds=time.monotonic() - began_s))

    def _spawn(self, request: wire.Spawn, fds: list[int]) -> None:
        """Fork the child that `request` describes and report its pidfd, or why there is none."""
        try:
            self._prepare_imports()
            if len(fds) != len(request.fd_names):
                raise ValueError(f"{len(request.fd_names)} descriptors named, {len(fds)} received")
            entry = cast("Entry", resolve(request.entry))
            _check_single_threaded()
            child = self._fork(request, entry, fds)
        except Exception as error:  # reported to the daemon, whatever the entry's import raised
            self._send(wire.Failed(op="spawn", key=request.key, text=describe(error)))
            return
        self._children[child.pidfd] = child
        self._poll.register(child.pidfd, select.POLLIN)
        self._send(wire.Spawned(key=child.key, name=request.name, pid=child.pid), [child.pidfd])

    def _kill(self, key: int) -> None:
        """Kill the child `key` if it has not ended; its end is reported like any other."""
        for child in self._children.values():
            if child.key == key:
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _fork(self, request: wire.Spawn, entry: Entry, fds: list[int]) -> Forked:
        """Fork; the child never returns from here."""
        sys.stdout.flush()
        sys.stderr.flush()
        nursery_pid = os.getpid()
        # Blocked across the fork: a SIGTERM for the child waits until the child can die of it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            pid = os.fork()
            if pid == 0:
                self._sock.detach()
                run_child(request, entry, dict(zip(request.fd_names, fds, strict=True)), nursery_pid)
            return Forked(key=request.key, pid=pid, pidfd=_open_pidfd(pid))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    def _reap(self, pidfd: int) -> None:
        """Collect the child behind `pidfd`, which has ended, and report how."""
        child = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        _, status = os.waitpid(child.pid, 0)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(status)
        self._send(wire.Exited(key=child.key, pid=child.pid, status=code))

    def _borrow_folder(self) -> Path | None:
        """Return a temporary folder for the kernels, None when their own can be written."""
        from .kernel_environment import borrow_folder

        return None if "numba" in sys.modules else borrow_folder()

    def _prepare_imports(self) -> None:
        """Set what numba and numpy read when they are imported; once, before the first of ours."""
        from .kernel_environment import prepare

        prepare()

    def _send(self, event: wire.Event, fds: list[int] | None = None) -> None:
        wire.send(self._sock, wire.encode(event), fds or ())


def resolve(path: str) -> Callable[..., object]:
    """Return the callable that "module:function" names. Raises ValueError or what its import raises."""
    module_name, separator, function_name = path.partition(":")
    if not (separator and module_name and function_name):
        raise ValueError(f"entry {path!r} is not of the form module:function")
    function: object = getattr(import_module(module_name), function_name, None)
    if not callable(function):
        raise ValueError(f"module {module_name} has no function {function_name!r}")
    return function


def run_child(request: wire.Spawn, entry: Entry, fds: Mapping[str, int], nursery_pid: int) -> NoReturn:
    """Become the child: shed what is the nursery's, run the entry, exit with its code."""
    code = EXIT_SOFTWARE
    try:
        die_with_parent(nursery_pid)
        _prctl(_PR_SET_NAME, _process_name(request.name))
        _close_all_but({0, 1, 2, *fds.values()})
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _raise_oom_score(request.oom_score_add)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        code = entry(request.spec, fds)
        if type(code) is not int or not 0 <= code <= 255:
            raise TypeError(f"entry {request.entry} returned {code!r}, not an exit code")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:  # the child ends here; nothing above may run in it
        print_error(request.name, error)
        code = error.exit_code if isinstance(error, SternaError) else EXIT_SOFTWARE
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # whatever happened: the nursery's own frames above must not run here


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent's thread ends; exit if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent_pid:
        os._exit(EXIT_SOFTWARE)


def print_error(name: str, error: BaseException) -> None:
    """Print one line about `error`; with STERNA_DEBUG=1 its traceback too."""
    if os.environ.get("STERNA_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"{name}: error: {describe(error)}", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    """Our own errors speak for themselves; others need their type."""
    if isinstance(error, SternaError):
        return " ".join(str(error).split())
    return wire.one_line(error)


def _check_single_threaded() -> None:
    """Raise RuntimeError when this process has a second thread: a fork would not be safe."""
    tasks = sorted(Path("/proc/self/task").iterdir())
    if len(tasks) > 1:
        names = ", ".join((task / "comm").read_text().strip() for task in tasks)
        raise RuntimeError(f"the nursery has {len(tasks)} threads ({names}) and cannot fork safely")


def _open_pidfd(pid: int) -> int:
    """Return a pidfd of a child just forked; kill and collect it when there is no descriptor left."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _close_all_but(keep: set[int]) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = soft if 0 <= soft < 1 << 20 else 1 << 20
    low = 0
    for fd in sorted(keep):
        if low < fd:  # closerange(0, 0) closes everything (CPython 3.11)
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, limit)


def _raise_oom_score(add: int) -> None:
    """Offer this process to the out-of-memory killer before the daemon; a wish, not a need."""
    if add == 0:
        return
    path = Path("/proc/self/oom_score_adj")
    try:
        path.write_text(str(max(-1000, min(1000, int(path.read_text()) + add))))
    except OSError as error:
        print(f"warning: oom_score_adj stays as it is: {error}", file=sys.stderr)


def _process_name(name: str) -> ctypes.c_char_p:
    """Return "worker 0" as "sterna-worker0", cut to the 15 bytes that the kernel keeps."""
    return ctypes.c_char_p(f"sterna-{name.replace(' ', '')}".encode()[:15])


def _prctl(option: int, value: int | ctypes.c_char_p) -> None:
    """Call prctl(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.c_ulong(value) if isinstance(value, int) else value
    # prctl is variadic: unused arguments must be zero, and of full width.
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, argument, zero, zero, zero) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


if __name__ == "__main__":
    sys.exit(main())
