"""Vectors of texts through real daemons: both clients, and processes that are killed meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import numpy as np
import numpy.typing as npt
import pytest

from sterna import AsyncClient
from sterna.shm.errors import TooLong

from .conftest import Serve, is_idle
from .daemon_process import Daemon, wait_until
from .requests import STORIES, sampled

# Many steps of 8 tokens each: the kill hits one in the middle.
LONG = [" and then ".join(STORIES * 6)[number : number + 800] for number in range(6)]


def test_both_clients_give_the_same_vectors(shared: Daemon) -> None:
    async def talk() -> list[npt.NDArray[np.float32]]:
        async with AsyncClient(shared.url) as client:
            answers = [client.embed(list(STORIES), pooling=how) for how in ("mean", "cls", "last")]
            _, *found = await asyncio.gather(client.generate(**sampled(0, 20)), *answers)
            return found

    mean, first, last = asyncio.run(talk())
    with shared.client() as client:
        assert client.embed(list(STORIES), pooling="mean").tobytes() == mean.tobytes()
        assert client.embed(list(STORIES)).tobytes() == last.tobytes()
        assert client.embed(STORIES[3]).tobytes() == last[3].tobytes()
        ids = client.tokenize(STORIES[3])
        assert client.embed(ids, pooling="mean").tobytes() == mean[3].tobytes()
        raw = client.embed(list(STORIES), normalize=False)
        np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), last, atol=1e-6)
        with pytest.raises(TooLong, match="tokens; the context has"):
            client.embed(["a", "king " * 2000])
        assert client.embed(STORIES[0], pooling="cls").tobytes() == first[0].tobytes()
    # Every text begins with the same token, which sees nothing else.
    assert {row.tobytes() for row in first} == {first[0].tobytes()}
    alike = last @ last.T
    assert np.allclose(np.diag(alike), 1.0, atol=1e-5)
    assert alike[~np.eye(len(alike), dtype=bool)].max() < 0.999


@pytest.mark.slow
def test_killed_processes_change_no_bit(serve: Serve, shared: Daemon) -> None:
    with shared.client() as client:
        expected = client.embed(LONG, pooling="mean")
    daemon = serve("--workers", "2", "--max-batch-tokens", "8")
    for process in ("worker", "scheduler"):
        found: list[npt.NDArray[np.float32]] = []
        steps = daemon.status()["totals"]["steps"]
        pid = daemon.pids(process)[-1]
        thread = threading.Thread(target=embed_long, args=(daemon, found))
        thread.start()
        wait_until(lambda before=steps: daemon.status()["totals"]["steps"] > before + 2, 10.0, "some steps")
        os.kill(pid, signal.SIGKILL)
        assert not found, "it was done before the kill"
        thread.join(60.0)
        assert daemon.status()["totals"][f"{process}_restarts"] == 1
        assert found[0].tobytes() == expected.tobytes()
    assert is_idle(daemon)


def embed_long(daemon: Daemon, found: list[npt.NDArray[np.float32]]) -> None:
    with daemon.client() as client:
        found.append(client.embed(LONG, pooling="mean"))
