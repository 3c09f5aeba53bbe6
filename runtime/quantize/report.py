"""Tensors of a conversion put together by group, for a table. Pure; no numba."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .journal import Done
from .plan import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors of one group that became the same type."""

    name: str
    tensors: int
    before: str
    after: str
    kept: str
    """Why they stayed as they were; "" if they did not."""
    nbytes_before: int
    nbytes_after: int
    error: float | None
    """Root of the mean square error, as a share of that of the weights; None where nothing is known."""


def groups(choices: Sequence[Choice], done: Mapping[str, Done] | None = None) -> tuple[Group, ...]:
    """Return the tensors by group and what becomes of them; with what was lost where they are `done`."""
    members: dict[tuple[str, str, str, str], list[Choice]] = {}
    for choice in choices:
        key = (choice.group, choice.info.type.name, choice.target.name, choice.kept)
        members.setdefault(key, []).append(choice)
    return tuple(
        Group(
            name=name,
            tensors=len(group),
            before=before,
            after=after,
            kept=kept,
            nbytes_before=sum(choice.info.nbytes for choice in group),
            nbytes_after=sum(choice.nbytes for choice in group),
            error=None if kept else _error([choice.info.name for choice in group], done or {}),
        )
        for (name, before, after, kept), group in members.items()
    )


def _error(names: Sequence[str], done: Mapping[str, Done]) -> float | None:
    found = [done[name] for name in names if name in done]
    whole = sum(one.whole for one in found)
    return float((sum(one.lost for one in found) / whole) ** 0.5) if whole else None
