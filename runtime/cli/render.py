"""Text for people: tables, statistics, and model output that cannot command a terminal. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..client.results import Result, RoutingFacts

# Everything that moves a cursor, sets a title or answers back; tab and newline stay.
_CONTROLS = {c: "\ufffd" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}


def for_terminal(text: str) -> str:
    """Return a text that a terminal only shows: control characters are replaced."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """Return an error text as one line."""
    return " ".join(for_terminal(text).split())


def table(body: dict[str, Any]) -> str:
    """Return a nested report as aligned lines `path  value`; lists of plain values stay on one line."""
    rows = list(_rows("", body))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(for_terminal(f"{name:<{width}}  {value}") for name, value in rows)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    rule = [("-" * width) + (":" if i else "-") for i, width in enumerate(widths)]
    lines = [" | ".join(_aligned(cells, widths)) for cells in (head, *rows)]
    body = [f"| {for_terminal(line)} |" for line in lines]
    return "\n".join([body[0], f"|{'|'.join(['-' + part for part in rule])}|", *body[1:]])


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    pairs = zip(cells, widths, strict=True)
    return [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)]


def statistics(result: Result) -> str:
    """Return one line on an answer: tokens and speeds of both phases, the wait, the end and the seed."""
    used, times = result.usage, result.timings
    parts = [
        f"prompt {used.prompt_tokens} tokens{_rate(used.prompt_tokens, times.prefill_s)}",
        # The first token of the answer comes out of the prefill.
        f"answer {used.completion_tokens} tokens{_rate(used.completion_tokens - 1, times.decode_s)}",
        f"queued {times.queue_s:.2f} s",
        f"ended by {result.finish_reason}",
        f"seed {result.seed}",
    ]
    return ", ".join(parts)


def routing_line(facts: RoutingFacts) -> str:
    """Return one line on what a quality budget did to an answer."""
    line = (
        f"experts traded {facts.swap_share:.1%}, selections unchanged {facts.agreement:.1%}, "
        f"gate mass lost {facts.lost_mass:.3%} of at most {facts.epsilon:.3%}"
    )
    return line + (" (not calibrated for this model)" if facts.basis == "uncalibrated" else "")


def _rate(tokens: int, seconds: float) -> str:
    return f" at {tokens / seconds:.1f} tok/s" if tokens > 0 and seconds > 0 else ""


def _rows(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _rows(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for i, item in enumerate(value):
            yield from _rows(f"{prefix}[{i}]", item)
    else:
        yield prefix, _shown(value)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ({}, []):
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return str(value)
