"""The supervisor with a real nursery and real children; every death is a real one.

What cannot be started, and the warm-up of the nursery, are in test_supervisor_start.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from sterna.runtime.processes.child import ExitStatus
from sterna.shm.errors import StartFailed

from .supervised import ENV, HERE, Run, awaiting_byte, ended, fd_count, runs, spawn, supervised, until


def test_descriptors_reach_the_child_and_memory_is_shared(run: Run) -> None:
    async def main() -> None:
        fd = os.memfd_create("test")
        os.ftruncate(fd, 4096)
        with mmap.mmap(fd, 4096) as memory:
            async with supervised() as supervisor:
                for expected in (1, 2):
                    child = await spawn(supervisor, "increment", {}, {"arena": fd})
                    assert await ended(child) == ExitStatus(code=0)
                    assert memory[0] == expected
        os.fstat(fd)  # the caller's descriptor is still the caller's
        os.close(fd)

    run(main())


def test_exit_codes_and_signals_are_reported(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            for code in (0, 1, 42, 255):
                child = await spawn(supervisor, "leave", {"code": code})
                assert await ended(child) == ExitStatus(code=code)
                assert child.describe() == f"worker 3 (pid {child.pid}) exited with code {code}"
                assert not child.signal(signal.SIGTERM)
            for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN + 3):
                child = await spawn(supervisor, "wait")
                assert child.signal(number)
                assert await ended(child) == ExitStatus(signal=int(number))

    run(main())


def test_killed_child_is_noticed_at_once(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            child = await spawn(supervisor, "wait")
            other = await spawn(supervisor, "wait", name="worker 4")
            assert child.describe() == f"worker 3 (pid {child.pid}) runs"
            os.kill(child.pid, signal.SIGKILL)
            assert await ended(child, 0.5) == ExitStatus(signal=signal.SIGKILL)
            fate = "killed by SIGKILL (possibly out of memory)"
            assert child.describe() == f"worker 3 (pid {child.pid}) {fate}"
            assert supervisor.children == (other,)
            assert not supervisor.lost.done()

    run(main())


def test_child_that_dies_while_the_nursery_hangs_is_still_noticed(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            child = await spawn(supervisor, "wait")
            os.kill(supervisor.nursery_pid, signal.SIGSTOP)
            os.kill(child.pid, signal.SIGKILL)
            assert await ended(child, 1.0) == ExitStatus()
            assert child.describe() == f"worker 3 (pid {child.pid}) ended, nobody saw how"
            with pytest.raises(StartFailed, match=r"nursery did not fork worker 5 within 0\.2 s"):
                await supervisor.spawn("worker 5", "nursery_entries:wait", {}, {}, 0.2)
            os.kill(supervisor.nursery_pid, signal.SIGCONT)
            # The late child belongs to nobody; it must not stay. Requests are served in order.
            assert await ended(await spawn(supervisor, "leave", {"code": 5})) == ExitStatus(code=5)
            await until(lambda: supervisor.children == (), 2.0)
            assert psutil.Process(supervisor.nursery_pid).children() == []

    run(main())


def test_stopping_is_bounded_when_the_nursery_hangs(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            await spawn(supervisor, "wait")
            os.kill(supervisor.nursery_pid, signal.SIGSTOP)
            began = time.monotonic()
            await supervisor.stop_all(0.2)
            assert time.monotonic() - began < 4.0

    run(main())


def test_killed_nursery_takes_its_children_along_and_is_reported(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            children = [await spawn(supervisor, "wait", name=f"worker {i}") for i in range(3)]
            defiant = await awaiting_byte(supervisor, "defiant")
            os.kill(supervisor.nursery_pid, signal.SIGKILL)
            for child in (*children, defiant):
                await ended(child, 1.0)
                assert not runs(child.pid)
            await asyncio.wait([supervisor.lost], timeout=1.0)
            assert supervisor.lost.result() == ExitStatus(signal=signal.SIGKILL)
            assert supervisor.describe() == f"nursery (pid {supervisor.nursery_pid}) killed by SIGKILL"
            with pytest.raises(StartFailed, match=r"cannot fork worker 3: nursery .* killed by SIGKILL"):
                await spawn(supervisor, "wait")

    run(main())


def test_killed_daemon_leaves_no_process() -> None:
    daemon = subprocess.Popen(
        [sys.executable, str(HERE / "doomed_daemon.py")], stdout=subprocess.PIPE, env={**os.environ, **ENV}
    )
    assert daemon.stdout is not None
    with daemon.stdout:
        pids = json.loads(daemon.stdout.readline())
    assert [runs(pid) for pid in pids] == [True] * 4
    daemon.kill()
    daemon.wait(5.0)
    deadline = time.monotonic() + 1.0
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if runs(pid)]
        time.sleep(0.01)


def test_stop_gives_grace_then_kills(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            obedient = await awaiting_byte(supervisor, "obedient")
            defiant = await awaiting_byte(supervisor, "defiant")
            began = time.monotonic()
            await supervisor.stop_all(0.4)
            assert 0.4 <= time.monotonic() - began < 10.0
            assert obedient.status == ExitStatus(code=7)
            assert defiant.status == ExitStatus(signal=signal.SIGKILL)
            assert defiant.describe() == f"worker 3 (pid {defiant.pid}) killed by SIGKILL"
            assert not supervisor.lost.done()
            await supervisor.stop_all(0.4)
            with pytest.raises(StartFailed, match="it is being stopped"):
                await spawn(supervisor, "wait")

    run(main())


def test_stop_without_children_is_quick_and_may_come_twice_at_once(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            began = time.monotonic()
            await asyncio.gather(supervisor.stop_all(5.0), supervisor.stop_all(5.0))
            assert time.monotonic() - began < 5.0
            assert supervisor.describe().endswith("exited with code 0")

    run(main())


def test_cancelled_stop_still_leaves_nothing(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            defiant = await awaiting_byte(supervisor, "defiant")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await supervisor.stop_all(30.0)
            assert defiant.exit.done()
            await until(lambda: not runs(defiant.pid), 1.0)

    run(main())


def test_hundred_children_leak_no_descriptor(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:
            fd = os.memfd_create("test")
            os.ftruncate(fd, 4096)
            counts = set()
            for _ in range(100):
                assert await ended(await spawn(supervisor, "increment", {}, {"arena": fd})) == ExitStatus(
                    code=0
                )
                # Its exit is reported before the nursery turns to its next request.
                counts.add((fd_count(), fd_count(supervisor.nursery_pid)))
            os.close(fd)
            assert len(counts) == 1
            assert psutil.Process(supervisor.nursery_pid).children() == []

    run(main())
