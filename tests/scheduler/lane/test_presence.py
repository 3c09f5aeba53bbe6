"""Real processes that end while they are watched."""

from __future__ import annotations

import select
import signal
import subprocess
from collections.abc import Iterator

import pytest

from sterna.scheduler.lane.presence import PidfdPresence
from sterna.workers.messages import Hello

WAIT_S = 10.0


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait(WAIT_S)


def hello(process: subprocess.Popen[bytes]) -> Hello:
    return Hello(index=0, incarnation=1, pid=process.pid)


class ReapedInBetween(PidfdPresence):
    """The process ends, and is reaped by its parent, after `ended` was asked."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__()
        self.process = process

    def ended(self, peer: int) -> bool:
        found = super().ended(peer)
        self.process.kill()
        self.process.wait(WAIT_S)
        return found


def test_kill_ends_the_process_and_its_end_is_seen(process: subprocess.Popen[bytes]) -> None:
    presence = PidfdPresence()
    assert presence.watch(7, hello(process))
    assert not presence.ended(7)
    presence.kill(7)
    assert select.select(presence.sources(), [], [], WAIT_S)[0] == presence.sources()
    assert presence.ended(7)
    assert process.wait(WAIT_S) == -signal.SIGKILL
    presence.kill(7)  # it has ended: nothing to do
    presence.forget(7)
    assert presence.sources() == []
    assert presence.ended(7)


def test_kill_of_a_process_that_is_reaped_meanwhile_does_nothing(process: subprocess.Popen[bytes]) -> None:
    presence = ReapedInBetween(process)
    assert presence.watch(0, hello(process))
    presence.kill(0)
    assert process.returncode == -signal.SIGKILL
    presence.forget(0)


def test_process_that_has_ended_before_is_not_watched(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(WAIT_S)
    presence = PidfdPresence()
    assert not presence.watch(0, hello(process))
    assert presence.sources() == []
