"""Many streams at once, clients that are killed or stop reading, and that the others never notice."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sterna import AsyncClient

from .conftest import Serve
from .daemon_process import Daemon, wait_until
from .requests import TIMEOUT_S, run_alone, run_together, run_while, sampled

# Streams all that it is told, one line per chunk.
STREAMING = """
import sys
from sterna import Client
with Client(sys.argv[1]) as client:
    options = {"max_tokens": int(sys.argv[2]), "ignore_eos": True}
    for chunk in client.generate("Once upon a time", stream=True, **options):
        print(len(chunk.token_ids), flush=True)
print("end", flush=True)
"""


@contextmanager
def streaming_process(daemon: Daemon, max_tokens: int) -> Iterator[subprocess.Popen[str]]:
    """Yield another process that streams and has its first tokens."""
    command = [sys.executable, "-c", STREAMING, daemon.url, str(max_tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            watchdog = threading.Timer(60, process.kill)
            watchdog.start()
            assert process.stdout.readline() == "1\n"
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def sequences(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.status()["sequences"]
    return found


def test_sixteen_streams_complete_and_are_what_they_are_alone(shared: Daemon) -> None:
    requests = [sampled(number) for number in range(16)]
    together = run_together(shared.url, requests)
    assert [len(result.token_ids) for result in together] == [64] * 16
    assert [result.finish_reason for result in together] == ["length"] * 16
    assert [result.text for result in together] == [result.text for result in run_alone(shared.url, requests)]


def test_forty_streams_complete_over_sixteen_records(shared: Daemon) -> None:
    requests = [sampled(number, max_tokens=8) for number in range(40)]
    results = run_together(shared.url, requests)
    assert [len(result.token_ids) for result in results] == [8] * 40
    assert max(result.timings.queue_s for result in results) > 0


def test_three_hundred_answers_and_a_thousand_other_calls_over_one_client(shared: Daemon) -> None:
    """More than the daemon's queue of 256 holds: the rest waits in the client."""

    async def ask() -> None:
        async with asyncio.timeout(TIMEOUT_S), AsyncClient(shared.url, timeout_s=TIMEOUT_S) as client:
            requests = [
                client.generate(token_ids=[5, 6, 7, 8, number % 200 + 9], max_tokens=4, ignore_eos=True)
                for number in range(300)
            ]
            texts = [client.tokenize(f"tale {number}") for number in range(1000)]
            results, ids = await asyncio.gather(asyncio.gather(*requests), asyncio.gather(*texts))
            assert [result.finish_reason for result in results] == ["length"] * 300
            assert [len(result.token_ids) for result in results] == [4] * 300
            assert all(ids)

    asyncio.run(ask())


def test_killed_client_is_gone_within_a_second_and_disturbs_nobody(shared: Daemon) -> None:
    requests = [sampled(number, max_tokens=200) for number in range(4)]
    expected = [result.text for result in run_together(shared.url, requests)]
    seconds: list[float] = []

    with streaming_process(shared, 500) as victim:

        def kill() -> None:
            assert sequences(shared)["running"] == 5
            cancelled = shared.status()["totals"]["requests_cancelled"]
            victim.kill()
            began_s = time.monotonic()
            wait_until(lambda: sequences(shared)["running"] < 5, 5.0, "the killed client's sequence is gone")
            seconds.append(time.monotonic() - began_s)
            # It was the victim's, not one of the four.
            assert shared.status()["totals"]["requests_cancelled"] == cancelled + 1

        found = run_while(shared.url, requests, kill)
    assert [result.text for result in found] == expected
    print(f"the killed client's sequence was gone after {seconds[0]:.2f} s")


def test_killed_client_alone_is_gone_within_a_second(shared: Daemon) -> None:
    with streaming_process(shared, 500) as victim:
        assert sequences(shared)["running"] == 1
        victim.kill()
        began_s = time.monotonic()
        wait_until(lambda: sequences(shared)["running"] == 0, 5.0, "the killed client's sequence is gone")
        print(f"the killed client's sequence was gone after {time.monotonic() - began_s:.2f} s")


@pytest.mark.slow
def test_client_killed_while_it_waits_leaves_the_queue(serve: Serve) -> None:
    daemon = serve("--max-num-seqs", "1")
    with streaming_process(daemon, 400):
        waiting = subprocess.Popen(
            [sys.executable, "-c", STREAMING, daemon.url, "10"], stdout=subprocess.PIPE
        )
        with waiting:
            wait_until(lambda: sequences(daemon)["waiting"] == 1, 20.0, "the second request waits")
            waiting.kill()
            wait_until(lambda: sequences(daemon)["waiting"] == 0, 2.0, "the second request is gone")
        assert sequences(daemon)["running"] == 1


@pytest.mark.slow
def test_stopped_client_does_not_slow_others(shared: Daemon) -> None:
    """A client that reads nothing for a while gets all of its answer when it goes on."""
    requests = [sampled(number, max_tokens=100) for number in range(3)]
    expected = [result.text for result in run_together(shared.url, requests)]
    with streaming_process(shared, 400) as slow:
        slow.send_signal(signal.SIGSTOP)
        results = run_together(shared.url, requests)
        assert [result.text for result in results] == expected
        wait_until(lambda: sequences(shared)["running"] == 0, 30.0, "the stopped client's answer is complete")
        slow.send_signal(signal.SIGCONT)
        out, _ = slow.communicate(timeout=30)
    lines = out.split()
    assert lines[-1] == "end"
    assert 1 + sum(int(line) for line in lines[:-1]) == 400
