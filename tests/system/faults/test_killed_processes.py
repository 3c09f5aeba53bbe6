"""Processes of the daemon are killed or stopped in the middle of answers: nothing is lost, nothing hangs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from sterna.runtime.config import embedded_model
from sterna.shm.errors import DaemonUnreachable, ModelFileError, ModelReadError, SternaError
from sterna.workers.checkpoint.file.gguf import GgufFile

from ..conftest import Serve, is_idle
from ..daemon_process import Daemon, processes_in, wait_until
from ..requests import Request, essence, run_alone, run_together, run_while, sampled

BLOCK_TOKENS = 16  # of the KV cache
# A prompt of several chunks: kills also hit prefill, with log-probabilities that must not get lost.
LONG = (
    "There was once a king who had three daughters, and the youngest was so fair that the sun itself wondered"
)


def requests(count: int, max_tokens: int = 160) -> list[Request]:
    return [sampled(number, max_tokens) | {"logprobs": 2} for number in range(count)]


def restarts(daemon: Daemon, process: str) -> int:
    count: int = daemon.status()["totals"][f"{process}_restarts"]
    return count


def killer(daemon: Daemon, process: str, times: int) -> Callable[[], None]:
    """Return a function that kills the last process with a name, waits for the new one, and repeats."""

    def kill() -> None:
        for _ in range(times):
            before = restarts(daemon, process)
            os.kill(daemon.pids(process)[-1], signal.SIGKILL)
            wait_until(
                lambda before=before: restarts(daemon, process) > before, 10.0, f"{process} is replaced"
            )
            wait_until(lambda: daemon.pids(process), 10.0, f"{process} is there again")
            time.sleep(0.1)  # some steps with the new one

    return kill


@pytest.mark.parametrize(
    ("workers", "resident"), [*(pytest.param(n, "100%", marks=pytest.mark.slow) for n in (1, 2)), (2, "25%")]
)
def test_killed_worker_costs_no_token(serve: Serve, shared: Daemon, workers: int, resident: str) -> None:
    """With a quarter of the experts in memory most kills hit a worker that is reading one."""
    daemon = serve("--workers", str(workers), "--resident-experts", resident)
    expected = run_together(shared.url, requests(4))
    found = run_while(daemon.url, requests(4), killer(daemon, "worker", 3))
    assert restarts(daemon, "worker") == 3
    for one, other in zip(expected, found, strict=True):
        assert (one.text, one.logprobs) == (other.text, other.logprobs)
    assert is_idle(daemon)


def test_killed_idle_worker_is_replaced(serve: Serve) -> None:
    daemon = serve("--workers", "2")
    expected = run_alone(daemon.url, requests(1, 16))
    for pid in daemon.pids("worker"):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: restarts(daemon, "worker") == 2, 10.0, "both workers are replaced")
    assert run_alone(daemon.url, requests(1, 16))[0].text == expected[0].text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_that_die_together_while_experts_are_read_hang_nobody(serve: Serve) -> None:
    """The second dies while slots are filled for the first one's successor, or the other way round."""
    daemon = serve("--workers", "2", "--resident-experts", "50%")
    expected = [essence(result) for result in run_together(daemon.url, requests(4, 60))]
    for number in range(12):

        def kill_both(number: int = number) -> None:
            for pid in daemon.pids("worker"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.002 * (number % 5))

        found = run_while(daemon.url, requests(4, 60), kill_both)
        assert [essence(result) for result in found] == expected
    assert is_idle(daemon)


def test_a_worker_replaced_over_a_file_that_was_cut_short_hangs_nobody(serve: Serve, tmp_path: Path) -> None:
    """What cannot be read any more ends the requests that need it, by its code; all else goes on."""
    path = tmp_path / "model.gguf"
    shutil.copyfile(embedded_model(), path)
    whole = path.read_bytes()
    daemon = serve(str(path), "--workers", "1", "--resident-experts", "25%")
    expected = run_alone(daemon.url, requests(1, 24))[0]
    os.truncate(path, 2_000_000)
    os.kill(daemon.pids("worker")[0], signal.SIGKILL)
    wait_until(lambda: restarts(daemon, "worker") == 1, 10.0, "the worker is replaced")
    with daemon.client(20.0) as client, pytest.raises(ModelReadError, match="the model file ends at byte"):
        client.generate(**requests(1, 24)[0])
    wait_until(lambda: is_idle(daemon), 5.0, "nothing is left of the request")
    with path.open("r+b") as file:  # the card is back
        file.write(whole)
    assert essence(run_alone(daemon.url, requests(1, 24))[0]) == essence(expected)
    assert restarts(daemon, "scheduler") == 0


def test_bytes_that_are_no_weights_end_the_requests_that_need_them(serve: Serve, tmp_path: Path) -> None:
    """Experts that were not read before the file was damaged; TQ2_0 has no code 3."""
    path = tmp_path / "model.gguf"
    shutil.copyfile(embedded_model(), path)
    whole = path.read_bytes()
    daemon = serve(str(path), "--workers", "1", "--resident-experts", "25%", "--prefetch", "off")
    with GgufFile.open(path) as file, path.open("r+b") as damaged:
        for info in [each for name, each in file.tensors.items() if "_exps" in name]:
            damaged.seek(info.offset)
            damaged.write(b"\xff" * info.nbytes)
    with (
        daemon.client(20.0) as client,
        pytest.raises(ModelFileError, match=r"blk\.\d+\.ffn_\w+\.weight: expert \d+: "),
    ):
        client.generate(**requests(1, 24)[0])
    wait_until(lambda: is_idle(daemon), 5.0, "nothing is left of the request")
    with path.open("r+b") as damaged:
        damaged.write(whole)
    assert len(run_alone(daemon.url, requests(1, 24))[0].token_ids) == 24
    assert restarts(daemon, "scheduler") == 0


@pytest.mark.parametrize("resident", ["100%", pytest.param("25%", marks=pytest.mark.slow)])
def test_killed_scheduler_costs_no_token(serve: Serve, resident: str) -> None:
    daemon = serve("--workers", "2", "--resident-experts", resident)
    expected = run_together(daemon.url, requests(4))
    found = run_while(daemon.url, requests(4), killer(daemon, "scheduler", 2))
    assert restarts(daemon, "scheduler") == 2
    for one, other in zip(expected, found, strict=True):
        assert (one.text, one.logprobs) == (other.text, other.logprobs)
    assert is_idle(daemon)


@pytest.mark.slow
def test_requests_that_come_while_the_scheduler_is_replaced_are_answered_once(serve: Serve) -> None:
    """They must not be handed to the new scheduler twice, once directly and once with the running ones."""
    daemon = serve("--workers", "1")
    late = [sampled(number, 60) for number in range(4, 8)]
    expected = [result.text for result in run_together(daemon.url, late)]
    found: list[str] = []

    def kill() -> None:
        os.kill(daemon.pids("scheduler")[0], signal.SIGKILL)
        found.extend(result.text for result in run_together(daemon.url, late))

    run_while(daemon.url, requests(2), kill)
    assert found == expected


@pytest.mark.slow
def test_cancelling_while_the_scheduler_is_replaced(serve: Serve) -> None:
    daemon = serve("--workers", "1")
    with daemon.client() as client, client.generate(stream=True, **sampled(0, 400)) as stream:
        next(stream)
        os.kill(daemon.pids("scheduler")[0], signal.SIGKILL)
        stream.cancel()
        assert stream.read().finish_reason == "cancelled"
        wait_until(lambda: restarts(daemon, "scheduler") == 1, 10.0, "the scheduler is replaced")
        assert client.generate(**sampled(1, 8)).usage.completion_tokens == 8
    wait_until(lambda: is_idle(daemon), 5.0, "all blocks are free")


@pytest.mark.slow
def test_kills_in_prefill_lose_no_prompt_logprob(serve: Serve) -> None:
    daemon = serve("--workers", "1", "--max-batch-tokens", "2")
    request: Request = {"prompt": LONG, "max_tokens": 40, "temperature": 0.0, "prompt_logprobs": True}
    (expected,) = run_alone(daemon.url, [request])

    def kill_soon(process: str) -> threading.Timer:
        (pid,) = daemon.pids(process)
        timer = threading.Timer(0.03, os.kill, (pid, signal.SIGKILL))
        timer.start()
        return timer

    for process in ("worker", "scheduler", "worker", "scheduler"):
        timer = kill_soon(process)
        (found,) = run_alone(daemon.url, [request])
        timer.join(5)
        assert found.prompt_logprobs == expected.prompt_logprobs
        assert found.text == expected.text
        wait_until(lambda process=process: daemon.pids(process), 10.0, f"{process} is there again")


@pytest.mark.slow
def test_scheduler_killed_when_the_oldest_stream_needs_a_block(serve: Serve) -> None:
    """Its successor must not give the oldest a block that another stream still holds."""
    daemon = serve("--workers", "1")
    streams = [sampled(number, 60) | {"logprobs": 0} for number in range(4)]
    expected = run_together(daemon.url, streams)
    for _ in range(2):
        (pid,) = daemon.pids("scheduler")
        # After this number of tokens the step that follows is the first of a block.
        after = BLOCK_TOKENS + 1 - len(expected[0].prompt_token_ids) % BLOCK_TOKENS
        kill = partial(os.kill, pid, signal.SIGKILL)
        found = run_while(daemon.url, streams, kill, watched=1, after=after)
        assert [essence(result) for result in found] == [essence(result) for result in expected]
        wait_until(lambda pid=pid: daemon.pids("scheduler") not in ([], [pid]), 10.0, "a new scheduler")
    assert is_idle(daemon)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("process", ["worker", "scheduler"])
def test_many_kills_cost_no_token(serve: Serve, process: str) -> None:
    daemon = serve("--workers", "2")
    streams = requests(8, 480)
    expected = [essence(result) for result in run_together(daemon.url, streams)]
    for _ in range(4):
        found = run_while(daemon.url, streams, killer(daemon, process, 5))
        assert [essence(result) for result in found] == expected
    assert restarts(daemon, process) == 20
    assert is_idle(daemon)


def test_status_tells_that_nobody_computes(serve: Serve) -> None:
    daemon = serve("--workers", "1")
    assert daemon.status()["progress"]["workers_missing_s"] is None
    (nursery,) = daemon.pids("nursery")
    os.kill(nursery, signal.SIGSTOP)  # nobody can be forked
    try:
        os.kill(daemon.pids("worker")[0], signal.SIGKILL)
        wait_until(lambda: daemon.status()["state"] == "recovering", 5.0, "the loss is told")
        progress = daemon.status()["progress"]
        assert progress["workers_missing"] == [0]
        assert 0 <= progress["workers_missing_s"] < 10
    finally:
        os.kill(nursery, signal.SIGCONT)
    wait_until(lambda: daemon.status()["state"] == "serving", 10.0, "a new worker")
    assert daemon.status()["progress"]["workers_missing"] == []


def test_worker_that_dies_again_and_again_ends_the_daemon(serve: Serve) -> None:
    """With one error that says which worker, as often as it was started in vain."""
    daemon = serve("--workers", "1")
    os.kill(daemon.pids("scheduler")[0], signal.SIGSTOP)  # it takes no worker in: none is ever ready
    until_s = time.monotonic() + 60
    while daemon.process.poll() is None and time.monotonic() < until_s:
        for process in processes_in(daemon.folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith("sterna-worker"):
                    process.kill()
        time.sleep(0.01)
    assert daemon.wait(10) == 75
    (line,) = [line for line in daemon.stderr.splitlines() if line.startswith("sterna: error: ")]
    assert "worker 0" in line
    assert "8 times in a row before it was ready" in line


def test_stuck_worker_is_replaced(serve: Serve) -> None:
    daemon = serve("--workers", "2", "--step-timeout", "1")
    expected = [result.text for result in run_together(daemon.url, requests(3))]

    def stop() -> None:
        os.kill(daemon.pids("worker")[0], signal.SIGSTOP)
        wait_until(lambda: restarts(daemon, "worker") > 0, 20.0, "the stuck worker is replaced")

    found = run_while(daemon.url, requests(3), stop)
    assert [result.text for result in found] == expected


def test_scheduler_that_dies_again_and_again_ends_the_daemon(serve: Serve) -> None:
    """One that cannot even start is no use: the daemon gives up with an error instead of trying for ever."""
    daemon = serve("--workers", "1")
    os.kill(daemon.pids("scheduler")[0], signal.SIGSTOP)  # it takes no worker in: none is ever ready
    until_s = time.monotonic() + 60
    while daemon.process.poll() is None and time.monotonic() < until_s:
        for process in processes_in(daemon.folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "sterna-schedule":
                    process.kill()
        time.sleep(0.01)
    assert daemon.wait(10) in (70, 75)
    (line,) = [line for line in daemon.stderr.splitlines() if line.startswith("sterna: error: ")]
    assert "scheduler" in line


def test_killed_daemon_takes_everything_with_it(serve: Serve) -> None:
    daemon = serve("--workers", "2")
    children = len(processes_in(daemon.folder)) - 1
    assert children == 4  # nursery, scheduler, two workers
    errors: list[SternaError] = []

    def stream() -> None:
        try:
            with daemon.client() as client:
                client.generate(**sampled(0, 400))
        except SternaError as error:
            errors.append(error)

    thread = threading.Thread(target=stream)
    thread.start()
    wait_until(lambda: daemon.status()["sequences"]["running"] == 1, 10.0, "the stream runs")
    daemon.signal(signal.SIGKILL)
    began_s = time.monotonic()
    assert daemon.wait() == -signal.SIGKILL
    wait_until(lambda: not processes_in(daemon.folder), 5.0, "no child is left")
    assert time.monotonic() - began_s < 5.0
    thread.join(10)
    assert isinstance(errors[0], DaemonUnreachable)

    with pytest.raises(DaemonUnreachable, match="nothing listens there"):
        daemon.status()
    daemon.start()  # over the socket file and the temporary folder that the killed one left
    assert run_alone(daemon.url, requests(1, 8))[0].usage.completion_tokens == 8
    assert len(list((daemon.folder / "tmp").iterdir())) == 1


def test_killed_nursery_ends_the_daemon_with_an_error(serve: Serve) -> None:
    daemon = serve("--workers", "2")
    (nursery,) = daemon.pids("nursery")
    with daemon.client() as client, client.generate(stream=True, **sampled(0, 400)) as stream:
        next(stream)
        os.kill(nursery, signal.SIGKILL)
        with pytest.raises(SternaError) as caught:
            stream.read()
    assert caught.value.code == "engine_lost"
    assert daemon.wait(10) == 75
    assert daemon.stderr.splitlines()[-1].startswith("sterna: error: the fork server killed by SIGKILL")
