"""Connections of the blocking client: shared by threads, used again, lost, closed, carried over a fork."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from sterna.runtime.client.client import Client
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import (
    DaemonUnreachable,
    NotFound,
    ProtocolError,
    UsageError,
)

from .peer import Peer


def test_threads_share_a_client(client: Client, peer: Peer) -> None:
    inside = threading.Barrier(4, timeout=10)
    answers: list[str] = []

    def ask(word: str) -> None:
        with client.generate("slow", stream=True) as stream:
            next(stream)
            inside.wait()  # all four are in flight now
        answers.extend([client.generate(word).text for _ in range(20)])

    threads = [threading.Thread(target=ask, args=(word * 5,)) for word in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == sorted([word * 5 + "!" for word in "abcd"] * 20)
    assert len(peer.connections()) == 4
    assert len({hello.client for hello in peer.messages(m.Hello)}) == 1


def test_connections_are_used_again(client: Client, peer: Peer) -> None:
    for _ in range(5):
        client.generate("a")
        with pytest.raises(NotFound):
            client.generate("fail not_found")
    assert len(peer.connections()) == 1


def test_no_socket(tmp_path: Path) -> None:
    start_s = time.monotonic()
    url = f"ipc://{tmp_path}/none.sock"
    with Client(url) as client, pytest.raises(DaemonUnreachable) as caught:
        client.status()
    assert str(caught.value) == f"no daemon at {url}: there is no such socket; start one with 'sterna serve'"
    assert time.monotonic() - start_s < 1


def test_silent_daemon(peer: Peer) -> None:
    peer.answers_hello = False
    start_s = time.monotonic()
    with (
        Client(peer.url, connect_timeout_s=0.3) as client,
        pytest.raises(
            DaemonUnreachable, match=r"gave no answer within 0\.3 s; start one with 'sterna serve'"
        ),
    ):
        client.status()
    assert 0.3 <= time.monotonic() - start_s < 2


def test_refused(client: Client, peer: Peer) -> None:
    peer.refuses = True
    with pytest.raises(ProtocolError, match="not you"):
        client.status()


def test_daemon_that_was_restarted(tmp_path: Path) -> None:
    with Client(f"ipc://{tmp_path}/peer.sock") as client:
        for _ in range(3):
            with Peer(tmp_path):
                assert client.generate("a").text == "a!"
            with pytest.raises(DaemonUnreachable):
                client.generate("a")


def test_daemon_that_announces_its_end(client: Client, peer: Peer) -> None:
    stream = client.generate("slow", stream=True)
    peer.go_away()
    time.sleep(0.05)
    next(stream)  # goes on
    stream.close()
    client.generate("a")
    assert len(peer.connections()) == 2


def test_closed_client(client: Client) -> None:
    client.close()
    client.close()
    with pytest.raises(UsageError, match="this client is closed"):
        client.status()


def test_use_after_fork(peer: Peer) -> None:
    script = """
        import os, sys
        from sterna.runtime.client.client import Client
        client = Client(sys.argv[1])
        client.status()
        stream = client.generate("slow", stream=True)
        if os.fork() == 0:
            for call in (client.status, stream.__next__):
                try:
                    call()
                except Exception as e:
                    print(type(e).__name__, e, flush=True)
            del stream
            client.close()
            os._exit(0)
        os.wait()
        print(next(stream).text, client.generate("a").text)
        stream.close()
        client.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), peer.url], capture_output=True, text=True, timeout=30
    )
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert first.startswith("UsageError this client was made in process ")
    assert last == "x a!"
    assert done.returncode == 0, done.stderr


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_open(peer: Peer) -> None:
    def use() -> None:
        with Client(peer.url) as client, client.generate("slow", stream=True) as stream:
            next(stream)

    use()
    time.sleep(0.1)
    before = open_descriptors()
    for _ in range(20):
        use()
    time.sleep(0.2)  # the peer closes its ends
    assert open_descriptors() <= before + 2
