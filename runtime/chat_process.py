"""The process that renders chat templates, as the daemon sees it: started, asked, and ended when it overruns.

In here: one `ChatProcess`, its pipes and how its death is told. Not in here: what runs in it
(`chat_renderer.py`), what it is asked (`chat_template.py`).
"""

from __future__ import annotations

import contextlib
import io
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from ..shm.errors import InternalError, OutOfResources, SternaError
from .chat_renderer import MAX_FRAME_BYTES, MEMORY_NBYTES, frame_of, read_frame

# The process ends itself after its CPU time; this much later on the clock it is stuck, or the machine is.
WALL_S = 20.0
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TZ")


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

    def open(self, cpu_s: float) -> dict[str, Any]:
        """Start the process unless it runs, and return its reply to `open`.

        Raises RenderDiedError, and OutOfResources if it cannot be started.
        """
        with self._turn:
            return self._start(cpu_s)

    def ask(self, request: dict[str, Any], open_cpu_s: float) -> dict[str, Any]:
        """Return the reply to a request; raises as `open` does."""
        with self._turn:
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._start(open_cpu_s)
            return self._exchange(request)

    def close(self) -> None:
        """End the process; may be called twice, and it starts anew when it is asked again."""
        with self._turn:
            self._end()

    def _start(self, cpu_s: float) -> dict[str, Any]:
        self._end()
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.chat_renderer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**environment, "LC_ALL": "C.UTF-8"},
                process_group=0,  # a Ctrl-C is for the daemon
            )
        except OSError as error:
            raise OutOfResources(f"the process for chat templates: {error.strerror}") from None
        return self._exchange({"cpu_s": cpu_s, "open": self._templates})

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its reply; whatever goes wrong ends the process."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise InternalError("the process for chat templates has no pipes")
        try:
            with contextlib.suppress(BrokenPipeError):  # its end is seen where it would answer
                process.stdin.write(frame_of(request))
                process.stdin.flush()
            return _reply(process, time.monotonic() + WALL_S)
        except RenderDiedError:
            self._end()
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
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _reply(process: subprocess.Popen[bytes], until_s: float) -> dict[str, Any]:
    if process.stdout is None:
        raise InternalError("the process for chat templates has no pipes")
    buffer = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if len(buffer) >= 4 and len(buffer) >= 4 + int.from_bytes(buffer[:4], "little"):
                break
            if len(buffer) > MAX_FRAME_BYTES + 4:
                raise ValueError("a reply that is too long")
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not selector.select(left_s):
                raise RenderDiedError(f"was not rendered within {WALL_S:g} s")
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                raise _death(process)
            buffer += part
    reply = read_frame(io.BytesIO(buffer))
    if reply is None:
        raise ValueError("a reply that is none")
    return reply


def _death(process: subprocess.Popen[bytes]) -> SternaError | RenderDiedError:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return RenderDiedError("closed its process's output")
    if code == -signal.SIGPROF:
        return RenderDiedError("needs more CPU time than it is given")
    if code in (-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV):
        # An engine in Rust aborts when there is no memory, deep recursion overruns the stack.
        return RenderDiedError(f"needs more than {MEMORY_NBYTES >> 20} MiB of memory")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return InternalError(f"the process for chat templates {how}")
