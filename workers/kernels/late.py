"""What happens when a kernel is called that is not in memory yet: it is compiled, refused, or reported.

A compiler takes some 100 MB and seconds, which nobody has planned for in a process that serves. So the
nursery refuses to compile (a process that ends does it: `runtime.processes.kernel_steps`), and after `seal`
each kernel that was forgotten shows as an event in the log: `kernel.compiled_late`, or `kernel.loaded_late`
where the cache had it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
from pathlib import Path
from typing import Any

from numba.core import config, event

log = logging.getLogger("sterna.kernels")


class NotCompiled(Exception):
    """A kernel is not in the cache, and this process was told not to compile."""


class _Rule(event.Listener):
    """Sees each compilation before it begins."""

    def __init__(self) -> None:
        self.refusing = False
        self.sealed = False

    def on_start(self, event: Any) -> None:
        """Raises NotCompiled in a process that compiles nothing."""
        name = event.data["dispatcher"].py_func.__qualname__
        if self.refusing:
            raise NotCompiled(f"kernel {name}{event.data['args']} is not in the cache")
        if self.sealed:
            log.error("kernel.compiled_late name=%s signature=%s", name, _signature(event.data["args"]))

    def on_end(self, event: Any) -> None:
        """Nothing: what was compiled is there."""


_RULE = _Rule()
event.register("numba:compile", _RULE)


def refuse(refusing: bool) -> None:
    """Raise NotCompiled from now on, or no longer, where something would be compiled."""
    _RULE.refusing = refusing


def seal() -> None:
    """Say that everything is there; this process and those forked from it report what was forgotten."""
    _RULE.sealed = True


def watched(dispatcher: Any) -> Any:
    """Have `dispatcher` report what it loads from the cache in a sealed process; return it.

    Compiling is seen by the library's own event; for loading it has none. Under NUMBA_DISABLE_JIT a kernel is
    a plain function, which loads nothing.
    """
    if config.DISABLE_JIT:
        return dispatcher
    _save_alone(dispatcher._cache)
    find = dispatcher.compile

    def compile_or_load(signature: Any) -> Any:
        if not _RULE.sealed:
            return find(signature)
        before = sum(dispatcher.stats.cache_hits.values())
        entry = find(signature)
        if sum(dispatcher.stats.cache_hits.values()) > before:
            name = dispatcher.py_func.__qualname__
            log.error("kernel.loaded_late name=%s signature=%s", name, _signature(signature))
        return entry

    dispatcher.compile = compile_or_load
    return dispatcher


def _save_alone(cache: Any) -> None:
    """Have no two processes write to a cache at once.

    The library picks a file's number and writes index and file without a lock: of two processes that compile
    different signatures of a kernel one may find the other's machine code under its own.
    """
    save = cache.save_overload

    def save_locked(signature: Any, data: Any) -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # then `save` cannot write either, and says so
                lock = stack.enter_context((Path(cache.cache_path) / "lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            save(signature, data)

    cache.save_overload = save_locked


def _signature(arguments: Any) -> str:
    """Return the types in one word: a value of a log line."""
    return ",".join(str(each).replace(" ", "") for each in arguments)
