"""PagingRequest: bring an expert in or let it go, and how soon."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Self


class Direction(Enum):
    """Into memory or out of it."""

    IN = "in"
    OUT = "out"


class Priority(IntEnum):
    """The greater goes first: a token waits for what is urgent, nothing waits for a prefetch."""

    PREFETCH = 0
    NORMAL = 1
    URGENT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PagingRequest:
    """What the owner of the memory is asked to do with expert `expert_id` of MoE layer `layer`."""

    layer: int = 0
    expert_id: int
    direction: Direction
    priority: Priority

    @classmethod
    def urgent_in(cls, expert_id: int, layer: int = 0) -> Self:
        """Return a request for an expert that a token was routed to."""
        return cls(layer=layer, expert_id=expert_id, direction=Direction.IN, priority=Priority.URGENT)

    @classmethod
    def prefetch(cls, expert_id: int, layer: int = 0) -> Self:
        """Return a request for an expert that may be needed soon."""
        return cls(layer=layer, expert_id=expert_id, direction=Direction.IN, priority=Priority.PREFETCH)

    @classmethod
    def page_out(cls, expert_id: int, layer: int = 0) -> Self:
        """Return a request to let an expert go."""
        return cls(layer=layer, expert_id=expert_id, direction=Direction.OUT, priority=Priority.NORMAL)
