"""What the children and warm-up steps of the supervisor tests do. Run inside the nursery."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sterna.shm.errors import ModelFileError

Fds = Mapping[str, int]


def leave(spec: Mapping[str, object], fds: Fds) -> int:
    """Exit at once with spec["code"]."""
    code = spec["code"]
    assert isinstance(code, int)
    return code


def wait(spec: Mapping[str, object], fds: Fds) -> int:
    """Sleep until somebody ends it; after a minute it is a test that went wrong."""
    time.sleep(60)
    return 99


def defiant(spec: Mapping[str, object], fds: Fds) -> int:
    """Ignore SIGTERM; say so through the pipe "said"."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(fds["said"], b"x")
    return wait(spec, fds)


def obedient(spec: Mapping[str, object], fds: Fds) -> int:
    """Exit with code 7 on SIGTERM; say through the pipe "said" that the handler is in place."""

    def leave_now(number: int, frame: object) -> None:
        os._exit(7)

    signal.signal(signal.SIGTERM, leave_now)
    os.write(fds["said"], b"x")
    return wait(spec, fds)


def increment(spec: Mapping[str, object], fds: Fds) -> int:
    """Add one to the first byte of the shared memory."""
    with mmap.mmap(fds["arena"], 4096) as memory:
        memory[0] += 1
    return 0


def surroundings(spec: Mapping[str, object], fds: Fds) -> int:
    """Write what a child is like, one fact per line, into the pipe "out"."""
    pdeathsig = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(pdeathsig))
    open_fds = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            os.fstat(int(path.name))
        except OSError:
            continue  # the listing's own descriptor
        open_fds.append(int(path.name))
    facts = {
        "fds": sorted(set(open_fds) - {0, 1, 2, *fds.values()}),
        "comm": Path("/proc/self/comm").read_text().strip(),
        "pdeathsig": pdeathsig.value,
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "oom": int(Path("/proc/self/oom_score_adj").read_text()),
        "sigint_ignored": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        "sigterm_default": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "layer": os.environ["NUMBA_THREADING_LAYER"],
        "target": os.environ["STERNA_KERNEL_TARGET"],
        "cache": os.environ["NUMBA_CACHE_DIR"],
        "spec": dict(spec),
    }
    os.write(fds["out"], repr(facts).encode())
    return 0


def stumble(spec: Mapping[str, object], fds: Fds) -> int:
    """Fail as a bug would."""
    raise KeyError("two\nlines")


def refuse(spec: Mapping[str, object], fds: Fds) -> int:
    """Fail as our own errors do."""
    raise ModelFileError("tales.gguf: tensor blk.0 is cut short")


def confused(spec: Mapping[str, object], fds: Fds) -> str:
    """Return what is no exit code."""
    return "fine"


def three_steps() -> list[tuple[str, Callable[[], None]]]:
    """Return three warm-up steps that do something."""
    return [(f"step {index}", lambda: time.sleep(0.01)) for index in range(3)]


def failing_steps() -> list[tuple[str, Callable[[], None]]]:
    """Return steps of which the second cannot compile."""
    return [("first", lambda: None), ("second", lambda: [].__getitem__(5))]


def endless_steps() -> list[tuple[str, Callable[[], None]]]:
    """Return a step that outlasts every bound."""
    return [("short", lambda: None), ("endless", lambda: time.sleep(60))]


def threaded_steps() -> list[tuple[str, Callable[[], None]]]:
    """Return a step that leaves a thread behind, which makes forking unsafe."""
    return [("thread", threading.Thread(target=time.sleep, args=(60,), daemon=True).start)]


def numba_steps() -> list[tuple[str, Callable[[], None]]]:
    """Import numba, the way that real steps do; it must see the nursery's settings."""

    def load() -> None:
        assert "numba" not in sys.modules
        import numba

        assert numba.config.THREADING_LAYER == "workqueue"
        assert os.environ["NUMBA_CACHE_DIR"] == numba.config.CACHE_DIR

    return [("numba", load)]
