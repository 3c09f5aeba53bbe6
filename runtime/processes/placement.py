"""Starting and stopping the processes of an engine: what its keeper relies on, and the one way that there is.

A `Placement` decides where a process runs and by which means. The keeper (`daemon/engine/processes.py`) knows
neither pidfds nor sockets: it starts, hears of the end, kills.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from .child import Child
from .supervisor import Supervisor

SPAWN_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a process is and what it is given."""

    name: str
    """For logs and status: "worker 3"."""
    entry: str
    """What it runs: "module:function", called with `spec` and `fds`."""
    spec: Mapping[str, object]
    """Settings that msgpack can carry."""
    fds: Mapping[str, int]
    """Descriptors of shared memory and files by name; the caller keeps its own."""


class Placed(Protocol):
    """A process that was started."""

    @property
    def pid(self) -> int:
        """Its number on this machine, for status; 0 where it runs elsewhere."""

    def describe(self) -> str:
        """Return its name and its fate for a human."""

    def kill(self) -> None:
        """End it at once; without effect when it has ended."""

    def on_end(self, call: Callable[[], None]) -> None:
        """Have `call` called in the event loop once it has ended, also when that was before now."""


class Placement(Protocol):
    """Starts processes."""

    async def start(self, launch: Launch) -> Placed:
        """Return when the process exists, not when it is ready. Raises StartFailed within a bounded time."""


class _ForkedProcess:
    """A child of the nursery."""

    def __init__(self, child: Child) -> None:
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    def describe(self) -> str:
        return self._child.describe()

    def kill(self) -> None:
        self._child.signal(signal.SIGKILL)

    def on_end(self, call: Callable[[], None]) -> None:
        self._child.exit.add_done_callback(lambda _: call())


class NurseryPlacement:
    """Forks processes from the nursery on this machine."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def start(self, launch: Launch) -> Placed:
        """See `Placement.start`."""
        child = await self._supervisor.spawn(
            launch.name, launch.entry, launch.spec, launch.fds, SPAWN_TIMEOUT_S
        )
        return _ForkedProcess(child)
