"""What a client gets back: parts of an answer and the whole of it. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.messages import FinishReason, RoutingFacts, Timings, TokenLogprob, Usage

__all__ = ["Chunk", "FinishReason", "Result", "RoutingFacts", "Timings", "TokenLogprob", "Usage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New tokens of an answer. `text` may lag behind `token_ids`: a character can span tokens.

    The last chunk may have text only: what was held back because it could have begun a stop string.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    """One entry per token of `token_ids`; None where it was not asked for."""
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[float | None, ...] | None
    """One entry per token of `prompt_token_ids`, the first is None."""
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    """The same seed gives the same answer again."""
    routing: RoutingFacts | None
    """What a quality budget did; None where none was in force."""
