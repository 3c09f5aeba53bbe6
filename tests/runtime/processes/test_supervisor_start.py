"""The supervisor's starts with a real nursery: what is refused, and the warm-up before the first child."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys

import psutil
import pytest

from sterna.runtime.processes.child import ExitStatus
from sterna.runtime.processes.nursery_wire import Warm
from sterna.runtime.processes.supervisor import Supervisor, WarmProgress
from sterna.shm.errors import StartFailed

from .supervised import Run, ended, spawn, supervised, until


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("no_such_module:run", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("nursery_entries:fly", "module nursery_entries has no function 'fly'"),
        ("nursery_entries:HERE", "module nursery_entries has no function 'HERE'"),
        ("nursery_entries", "entry 'nursery_entries' is not of the form module:function"),
    ],
)
def test_unknown_entry_is_a_clear_error(run: Run, entry: str, text: str) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            with pytest.raises(StartFailed) as caught:
                await supervisor.spawn("worker 0", entry, {}, {}, 5.0)
            assert str(caught.value).startswith("worker 0 could not be started: ")
            assert text in str(caught.value)
            assert await ended(await spawn(supervisor, "leave", {"code": 0})) == ExitStatus(code=0)

    run(main())


def test_what_cannot_be_sent_is_a_clear_error(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            with pytest.raises(StartFailed, match="limit 65536"):
                await spawn(supervisor, "wait", {"blob": b"x" * 70_000})
            with pytest.raises(StartFailed, match="cannot be sent"):
                await spawn(supervisor, "wait", {"supervisor": supervisor})
            with pytest.raises(StartFailed, match="129 descriptors, limit 128"):
                await spawn(supervisor, "wait", {}, {str(i): 0 for i in range(129)})
            with pytest.raises(StartFailed, match="Bad file descriptor"):
                await spawn(supervisor, "wait", {}, {"closed": 1 << 19})

    run(main())


def test_daemon_without_a_free_descriptor_fails_the_spawn_only(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            child = await spawn(supervisor, "wait")
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            hoard = []
            try:
                with contextlib.suppress(OSError):
                    while True:
                        hoard.append(os.dup(0))
                with pytest.raises(StartFailed, match="no file descriptor is left in the daemon"):
                    await spawn(supervisor, "wait")
            finally:
                for fd in hoard:
                    os.close(fd)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            nursery = psutil.Process(supervisor.nursery_pid)
            await until(lambda: [process.pid for process in nursery.children()] == [child.pid], 1.0)

    run(main())


def test_warm_reports_progress(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            seen: list[WarmProgress] = []
            seconds = await supervisor.warm(seen.append, 10.0, Warm(steps="nursery_entries:three_steps"))
            assert 0.03 <= seconds < 5.0
            assert seen == [WarmProgress(done=i + 1, total=3, name=f"step {i}") for i in range(3)]
            assert await ended(await spawn(supervisor, "leave", {"code": 3})) == ExitStatus(code=3)

    run(main())


def test_warm_failure_names_the_step_and_the_nursery_lives(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            text = r"after step first \(1/2\): IndexError: list index out of range"
            with pytest.raises(StartFailed, match=text):
                await supervisor.warm(None, 10.0, Warm(steps="nursery_entries:failing_steps"))
            with pytest.raises(StartFailed, match=r"after step none: .* no function 'nothing'"):
                await supervisor.warm(None, 10.0, Warm(steps="nursery_entries:nothing"))
            assert await supervisor.warm(None, 10.0, Warm(steps="nursery_entries:three_steps")) > 0

    run(main())


def test_endless_warm_is_bounded(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            with pytest.raises(StartFailed, match=r"within 0\.5 s; last step: short \(1/2\)"):
                await supervisor.warm(None, 0.5, Warm(steps="nursery_entries:endless_steps"))

    run(main())


def test_nursery_killed_while_it_warms_up_fails_the_call(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:

            def kill(_: WarmProgress) -> None:
                os.kill(supervisor.nursery_pid, signal.SIGKILL)

            with pytest.raises(StartFailed, match=r"after step short \(1/2\): nursery .* killed by SIGKILL"):
                await supervisor.warm(kill, 10.0, Warm(steps="nursery_entries:endless_steps"))

    run(main())


def test_nursery_that_cannot_start_is_a_clear_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(StartFailed, match=r"did not start: nursery \(pid \d+\) exited with code 1"):
            await Supervisor.start()
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(StartFailed, match="No such file"):
            await Supervisor.start()

    run(main())


def test_start_is_refused_outside_the_main_thread() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="main thread"):
            await asyncio.to_thread(lambda: asyncio.run(Supervisor.start()))

    asyncio.run(main())
