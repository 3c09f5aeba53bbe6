"""The process that renders chat templates, as the daemon sees it: started, asked, and ended when it overruns.

In here: one `ChatProcess`, its pipes and how its death is told. Not in here: what runs in it
(`renderer.py`), what it is asked (`template.py`).
"""

from __future__ import annotations

import contextlib
import io
import os
import selectors
import signal
import subprocess
import threading
import time
from typing import Any

from ...shm.errors import InternalError, OutOfResources, ShuttingDown, SternaError
from ..python_command import python_command
from .renderer import MAX_FRAME_BYTES, MEMORY_NBYTES, frame_of, read_frame

# The process ends itself after its CPU time; this much later on the clock it is stuck, or the machine is.
WALL_S = 20.0
# Whoever has the turn finds the process killed and gives the turn back.
_CLOSE_S = 1.0
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TZ")
_KEPT_STDERR_BYTES = 4096


class RenderDiedError(Exception):
    """The process ended at a request; the text says of which limit, for "the template ..."."""


class ChatProcess:
    """Starts the process with the first request and again after it died; threads take turns.

    `templates` are opened in it whenever it starts.
    """

    def __init__(self, templates: dict[str, str]) -> None:
        self._templates = templates
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()
        self._closed = False

    def open(self, cpu_s: float) -> dict[str, Any]:
        """Start the process unless it runs, and return its reply to `open`.

        Raises RenderDiedError, OutOfResources if it cannot be started, InternalError with its last words if
        it cannot run or was killed, and ShuttingDown after `close`.
        """
        with self._turn:
            return self._start(cpu_s)

    def ask(self, request: dict[str, Any], open_cpu_s: float) -> dict[str, Any]:
        """Return the reply to a request; raises as `open` does, and RecursionError for too deep a request."""
        with self._turn:
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._start(open_cpu_s)
            return self._exchange(request)

    def rest(self) -> None:
        """End the process until it is asked again; waits for whoever has the turn."""
        with self._turn:
            self._end()

    def close(self) -> None:
        """End the process for good, also while a thread waits for its reply; may be called twice."""
        self._closed = True  # before the kill: a process that is just being started sees it
        if process := self._process:
            process.kill()
        if self._turn.acquire(timeout=_CLOSE_S):
            try:
                self._end()
            finally:
                self._turn.release()

    def _start(self, cpu_s: float) -> dict[str, Any]:
        self._end()
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        try:
            self._process = subprocess.Popen(
                python_command("-m", f"{__package__}.renderer"),
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**environment, "LC_ALL": "C.UTF-8"},
                process_group=0,  # a Ctrl-C is for the daemon
            )
        except OSError as error:
            raise OutOfResources(f"the process for chat templates: {error.strerror}") from None
        return self._exchange({"cpu_s": cpu_s, "open": self._templates})

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its reply; whatever goes wrong ends the process."""
        frame = frame_of(request)
        process = self._process
        try:
            if self._closed:
                raise ShuttingDown("chat templates are closed")
            if process is None:
                raise InternalError("the process for chat templates is not there")
            return _RoundTrip(process, frame).reply(time.monotonic() + WALL_S)
        except (RenderDiedError, SternaError):
            self._end()
            if self._closed:
                raise ShuttingDown("chat templates are closed") from None
            raise
        except (OSError, ValueError) as error:
            self._end()
            raise InternalError(f"the process for chat templates: {error}") from None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class _RoundTrip:
    """One request and its reply: writing and reading wait together, so that neither outlasts the deadline."""

    def __init__(self, process: subprocess.Popen[bytes], frame: bytes) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise InternalError("the process for chat templates has no pipes")
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._unsent = memoryview(frame)
        self._buffer = bytearray()
        self._said = b""

    def reply(self, until_s: float) -> dict[str, Any]:
        """Return the reply; raises RenderDiedError, InternalError, and ValueError for what is no reply."""
        os.set_blocking(self._stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.register(self._stdout, selectors.EVENT_READ)
            selector.register(self._stderr, selectors.EVENT_READ)
            while not self._is_whole():
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise RenderDiedError(f"was not rendered within {WALL_S:g} s")
                for key, _ in selector.select(left_s):
                    if not self._move(key.fileobj):
                        selector.unregister(key.fileobj)
        if self._unsent:
            raise ValueError("a reply to half a request")
        reply = read_frame(io.BytesIO(self._buffer))
        if reply is None:
            raise ValueError("a reply that is none")
        return reply

    def _is_whole(self) -> bool:
        if len(self._buffer) > MAX_FRAME_BYTES + 4:
            raise ValueError("a reply that is too long")
        return len(self._buffer) >= 4 and len(self._buffer) >= 4 + int.from_bytes(self._buffer[:4], "little")

    def _move(self, pipe: object) -> bool:
        """Write or read what a pipe takes or has; return whether there may be more."""
        if pipe is self._stdin:
            try:
                self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent) :]
            except BrokenPipeError:  # its end is seen where it would answer
                return False
            return bool(self._unsent)
        if pipe is self._stderr:
            part = os.read(self._stderr.fileno(), 2**16)
            self._said = (self._said + part)[-_KEPT_STDERR_BYTES:]
            return bool(part)
        part = os.read(self._stdout.fileno(), 2**16)
        if not part:
            raise self._death()
        self._buffer += part
        return True

    def _death(self) -> SternaError | RenderDiedError:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return RenderDiedError("closed its process's output")
        if code == -signal.SIGPROF:
            return RenderDiedError("needs more CPU time than it is given")
        if code in (-signal.SIGABRT, -signal.SIGSEGV):
            # An engine in Rust aborts when there is no memory, deep recursion overruns the stack.
            return RenderDiedError(f"needs more than {MEMORY_NBYTES >> 20} MiB of memory")
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.strsignal(-code) or 'signal'} ({-code})"
        return InternalError(f"the process for chat templates {how}{self._last_words()}")

    def _last_words(self) -> str:
        os.set_blocking(self._stderr.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            self._said += os.read(self._stderr.fileno(), 2**16)
        lines = self._said.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {ascii(last[:300])[1:-1]}" if last else ""
