"""A supervisor with a real nursery, for tests: it is started, used under both event loops, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path

import psutil

from sterna.runtime.processes.child import Child, ExitStatus
from sterna.runtime.processes.supervisor import Supervisor

HERE = Path(__file__).parent
ENV = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    "STERNA_KERNEL_TARGET": "generic",  # a forced one needs no proof, which would compile
}
Run = Callable[[Coroutine[object, object, None]], None]


def fd_count(pid: int | str = "self") -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@contextlib.asynccontextmanager
async def supervised(env: Mapping[str, str] | None = None) -> AsyncIterator[Supervisor]:
    supervisor = await Supervisor.start(env={**ENV, **(env or {})})
    try:
        yield supervisor
    finally:
        await supervisor.stop_all(1.0)


async def spawn(
    supervisor: Supervisor,
    entry: str,
    spec: Mapping[str, object] | None = None,
    fds: Mapping[str, int] | None = None,
    name: str = "worker 3",
) -> Child:
    return await supervisor.spawn(name, f"nursery_entries:{entry}", spec or {}, fds or {}, 5.0)


async def ended(child: Child, limit_s: float = 5.0) -> ExitStatus:
    """Return how `child` ended; fail when it has not within `limit_s`."""
    await asyncio.wait([child.exit], timeout=limit_s)
    assert child.exit.done(), f"{child.describe()} after {limit_s} s"
    return child.exit.result()


async def until(condition: Callable[[], bool], limit_s: float) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


def runs(pid: int) -> bool:
    """Whether a process exists and is more than a zombie (in a container nobody may collect it)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def awaiting_byte(supervisor: Supervisor, entry: str) -> Child:
    """Spawn a child and return once it has written to its descriptor "said"."""
    reading, writing = os.pipe()
    try:
        child = await spawn(supervisor, entry, {}, {"said": writing})
        assert await asyncio.to_thread(lambda: select.select([reading], [], [], 5.0)[0])
    finally:
        os.close(reading)
        os.close(writing)
    return child
