"""The supervisor with a real nursery and real children; every death is a real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path

import psutil
import pytest
import uvloop

from sterna.runtime.processes.child import Child, ExitStatus
from sterna.runtime.processes.nursery_wire import Warm
from sterna.runtime.processes.supervisor import Supervisor, WarmProgress
from sterna.shm.errors import StartFailed

HERE = Path(__file__).parent
ENV = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    "STERNA_KERNEL_TARGET": "generic",  # a forced one needs no proof, which would compile
}
Run = Callable[[Coroutine[object, object, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine under one of the two event loops; the process must be clean afterwards."""

    def run_clean(main: Coroutine[object, object, None]) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.sleep(0))  # libuv keeps a pipe for the process from its first loop on
        before = fd_count()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main)
        assert psutil.Process().children(recursive=True) == []
        assert fd_count() == before

    return run_clean


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


def test_nursery_killed_while_it_warms_up_fails_the_call(run: Run) -> None:
    async def main() -> None:
        async with supervised() as supervisor:

            def kill(_: WarmProgress) -> None:
                os.kill(supervisor.nursery_pid, signal.SIGKILL)

            with pytest.raises(StartFailed, match=r"after step short \(1/2\): nursery .* killed by SIGKILL"):
                await supervisor.warm(kill, 10.0, Warm(steps="nursery_entries:endless_steps"))

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
