"""The process behind chat templates: its limits, how its ends are told, bounded waits."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from sterna.runtime.chat import process as chat_process
from sterna.runtime.chat.process import ChatProcess, RenderDiedError
from sterna.runtime.chat.template import OPEN_CPU_S
from sterna.shm.errors import InternalError, ShuttingDown

NOW = datetime(2026, 11, 21, 12, 0)
COUNT = "{{ messages | length }}"
# More than a pipe holds.
LONG = {"messages": [{"role": "user", "content": "x" * 60_000}] * 4}

HOSTILE = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
    "repetition": "{{ 'A' * 2000000000 }}",
    "width of a format": "{{ '%1000000000d'|format(1) }}",
    "lorem ipsum": "{{ lipsum(n=1000000) }}",
    "huge range": "{{ range(1000000000)|list|length }}",
    "recursive macro": "{% macro m(n) %}{{ m(n+1) }}{{ m(n+1) }}{% endmacro %}{{ m(0) }}",
    "doubled string": "{% set n = namespace(s='A') %}{% for i in range(60) %}"
    "{% set n.s = [n.s, n.s]|join %}{% endfor %}{{ n.s|length }}",
    "grown namespace": "{% set n = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set n.l = (n.l + n.l)|list %}{% endfor %}{{ n.l|length }}",
    "tree of references": "{% set n = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l|tojson }}",
    "sorted lists": "{% for i in range(9999) %}{{ range(99999)|sort|unique|list|length }}{% endfor %}",
    "padding": "{{ 'a'|indent(1000000000, true) }}{{ [1]|slice(1000000000)|list|length }}",
    "deep value": "{% set n = namespace(l=[]) %}{% for i in range(100000) %}{% set n.l = [n.l] %}{% endfor %}"
    "{{ n.l|tojson }}",
    "attributes": "{{ ''.__class__.__mro__[1] }}{{ cycler.__init__.__globals__.os.getpid() }}",
    "other files": "{% include '/etc/passwd' %}",
}  # fmt: skip


def rendering(name: str, context: dict[str, Any]) -> dict[str, Any]:
    return {"cpu_s": 0.1, "render": name, "context": context, "now": NOW.isoformat(), "limit": 2**16}


@pytest.fixture
def counting() -> Iterator[ChatProcess]:
    """Return a process that counts messages; it runs, and is closed at the end."""
    process = ChatProcess({"count": COUNT})
    process.open(OPEN_CPU_S)
    yield process
    process.close()


def pid_of(process: ChatProcess) -> int:
    child = process._process
    assert child is not None
    return child.pid


def test_stopped_process_is_given_up_with_its_request_half_sent(
    counting: ChatProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_process, "WALL_S", 0.2)
    os.kill(pid_of(counting), signal.SIGSTOP)
    start_s = time.monotonic()
    with pytest.raises(RenderDiedError, match=r"was not rendered within 0\.2 s"):
        counting.ask(rendering("count", LONG), OPEN_CPU_S)
    assert time.monotonic() - start_s < 5
    monkeypatch.setattr(chat_process, "WALL_S", 20.0)
    assert counting.ask(rendering("count", LONG), OPEN_CPU_S) == {"text": "4"}


def test_close_does_not_wait_for_who_has_the_turn(counting: ChatProcess) -> None:
    os.kill(pid_of(counting), signal.SIGSTOP)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            counting.ask(rendering("count", LONG), OPEN_CPU_S)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    until_s = time.monotonic() + 5
    while not counting._turn.locked() and time.monotonic() < until_s:
        time.sleep(0.001)
    start_s = time.monotonic()
    counting.close()
    for thread in threads:
        thread.join(5)
    # WALL_S is 20 s: nobody waited for it, and nobody started the process again.
    assert time.monotonic() - start_s < 5
    assert [type(error) for error in errors] == [ShuttingDown] * 3
    assert counting._process is None
    with pytest.raises(ShuttingDown, match="closed"):
        counting.open(OPEN_CPU_S)


def test_killed_process_is_not_the_templates_fault(counting: ChatProcess) -> None:
    child = pid_of(counting)
    os.kill(child, signal.SIGSTOP)
    # Killed while it is asked: before, it would only be started again.
    killer = threading.Timer(0.1, os.kill, (child, signal.SIGKILL))
    killer.start()
    with pytest.raises(InternalError, match=r"was killed by Killed \(9\)$"):
        counting.ask(rendering("count", LONG), OPEN_CPU_S)
    killer.join()


def test_process_that_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "minijinja.py").write_text("raise ModuleNotFoundError(\"No module named 'minijinja'\")\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    process = ChatProcess({"count": COUNT})
    with pytest.raises(
        InternalError, match=r"exit code 1: ModuleNotFoundError: No module named 'minijinja'$"
    ):
        process.open(OPEN_CPU_S)
    process.close()


def test_libraries_are_found_where_the_daemon_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere/but/kept")
    process = ChatProcess({"count": COUNT})
    process.open(OPEN_CPU_S)
    environment = Path(f"/proc/{pid_of(process)}/environ").read_bytes().split(b"\0")
    process.close()
    assert b"LD_LIBRARY_PATH=/nowhere/but/kept" in environment


def test_hostile_templates_end_soon_in_little_memory(capsys: pytest.CaptureFixture[str]) -> None:
    process = ChatProcess(HOSTILE)
    times = {}
    try:
        assert set(process.open(OPEN_CPU_S)["engines"].values()) == {"minijinja"}
        for name in HOSTILE:
            start_s = time.perf_counter()
            try:
                reply = process.ask(rendering(name, {}), OPEN_CPU_S)
                assert "error" in reply, (name, reply["text"][:100])
                ending = reply["error"]
            except RenderDiedError as error:
                ending = str(error)
            times[name] = (time.perf_counter() - start_s, ending)
    finally:
        process.close()
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    with capsys.disabled():
        for name, (seconds, ending) in times.items():
            print(f"\n{name:20} {seconds:.3f} s  {ending[:80]}", end="")
        print(f"\nlargest process {largest >> 20} MiB")
    assert max(seconds for seconds, _ in times.values()) < 5
