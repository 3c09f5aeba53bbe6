"""The event loops under which the tests of processes run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import psutil
import pytest
import uvloop

from .supervised import Run, fd_count


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
