"""A peer that plays the daemon, a client for it, and a heartbeat in a hurry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna import Client
from sterna.runtime.client import heartbeat

from .peer import Peer


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with Peer(tmp_path) as peer:
        yield peer


@pytest.fixture
def client(peer: Peer) -> Iterator[Client]:
    with Client(peer.url) as client:
        yield client


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the heartbeat, so that its failure is a matter of half a second."""
    monkeypatch.setattr(heartbeat, "PING_AFTER_S", 0.1)
    monkeypatch.setattr(heartbeat, "LOST_AFTER_PING_S", 0.3)
