"""Runs a conversation with the peer under each event loop that the asyncio client is made for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from sterna import AsyncClient

from .peer import Peer


def run_async(peer: Peer, talk: Callable[[AsyncClient], Coroutine[Any, Any, None]], **options: float) -> None:
    """Run a conversation under asyncio and under uvloop, whose readiness callbacks differ."""

    async def connected() -> None:
        async with AsyncClient(peer.url, **options) as client:
            await talk(client)

    for factory in (None, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(connected())
