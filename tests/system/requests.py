"""Requests for system tests and ways to run them: alone, side by side, with something happening meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from sterna import AsyncClient, Client
from sterna.runtime.client.results import Result

Request = dict[str, Any]
TIMEOUT_S = 80.0

STORIES = (
    "Once upon a time",
    "The old king",
    "There was a poor woodcutter",
    "In the dark forest",
    "The princess said",
    "A wolf came",
    "Far away by the sea",
    "The youngest son",
)


def sampled(number: int, max_tokens: int = 64) -> Request:
    """Return request `number`: a story that is sampled by its own seed and never ends early."""
    return {
        "prompt": STORIES[number % len(STORIES)],
        "max_tokens": max_tokens,
        "temperature": 0.9,
        "seed": number,
        "ignore_eos": True,
    }


def essence(result: Result) -> bytes:
    """Return all of a result that must repeat exactly, as bytes; times and the drawn seed are not in it."""
    return msgspec.msgpack.encode(
        (
            result.text,
            result.token_ids,
            result.logprobs,
            result.prompt_token_ids,
            result.prompt_logprobs,
            result.finish_reason,
        )
    )


def run_alone(url: str, requests: Sequence[Request]) -> list[Result]:
    """Run requests one after the other."""
    with Client(url, timeout_s=TIMEOUT_S) as client:
        return [client.generate(**request) for request in requests]


def run_together(url: str, requests: Sequence[Request]) -> list[Result]:
    """Run requests side by side over one connection."""
    return run_while(url, requests, lambda: None)


def run_while(
    url: str,
    requests: Sequence[Request],
    act: Callable[[], None],
    *,
    watched: int | None = None,
    after: int = 4,
) -> list[Result]:
    """Run requests side by side; call `act` in a thread when the first `watched` have `after` tokens."""
    return asyncio.run(_run_while(url, requests, act, watched, after))


async def _run_while(
    url: str, requests: Sequence[Request], act: Callable[[], None], watched: int | None, after: int
) -> list[Result]:
    begun = [asyncio.Event() for _ in requests]

    async def run(client: AsyncClient, request: Request, begun: asyncio.Event) -> Result:
        count = 0
        async with client.generate(stream=True, **request) as stream:
            async for chunk in stream:
                count += len(chunk.token_ids)
                if count >= after:
                    begun.set()
        begun.set()  # it may have been shorter
        assert stream.result is not None
        return stream.result

    async with asyncio.timeout(TIMEOUT_S), AsyncClient(url, timeout_s=TIMEOUT_S) as client:
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(run(client, request, event))
                for request, event in zip(requests, begun, strict=True)
            ]
            for event in begun[:watched]:
                await event.wait()
            await asyncio.to_thread(act)
        return [task.result() for task in running]
