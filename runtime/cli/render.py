"""Text for people: tables, statistics, and model output that cannot command a terminal. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..client.results import Result, RoutingFacts
    from ..daemon.announcement import Announcement

# Of a vector that a person looks at, and of the text that it stands for.
SHOWN_VALUES = 4
SHOWN_CHARS = 24
# More columns of similarities do not fit a screen.
MAX_COMPARED = 8
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


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines without rules: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    return ["  ".join(_aligned(cells, widths)).rstrip() for cells in (head, *rows)]


def statistics(result: Result) -> str:
    """Return one line of at most 100 columns on an answer: tokens and speeds, the wait, the end, the seed."""
    used, times = result.usage, result.timings
    parts = [
        f"prompt {used.prompt_tokens} tokens{_rate(used.prompt_tokens, times.prefill_s)}",
        # The first token of the answer comes out of the prefill.
        f"answer {used.completion_tokens} tokens{_rate(used.completion_tokens - 1, times.decode_s)}",
        *([f"waited {times.queue_s:.1f} s"] if times.queue_s >= 0.05 else []),
        result.finish_reason,
        f"seed {result.seed}",
    ]
    return ", ".join(parts)


def cut_line(result: Result, max_tokens: int | None, context: int) -> str:
    """Return a line on an answer that was cut, "" on one that the model ended.

    max_tokens: what the request asked for, None for the default; context: tokens of the daemon's context.
    """
    if result.finish_reason != "length":
        return ""
    used = result.usage
    if used.prompt_tokens + used.completion_tokens >= context and used.completion_tokens != max_tokens:
        return f"sterna: the answer is cut at the context of {context} tokens"
    return f"sterna: the answer is cut at {used.completion_tokens} tokens; -n sets how many"


def ready_line(announcement: Announcement) -> str:
    """Return the line that tells somebody at a terminal that the daemon serves, and what to try next."""
    socket = "" if announcement.is_default_socket else f" --socket {announcement.socket}"
    return (
        f"sterna: ready: {announcement.name}, context {announcement.context} tokens{announcement.shortage}; "
        f'try in another terminal: sterna generate{socket} "Once upon a time"; Ctrl-C stops'
    )


def embeddings(texts: Sequence[str], vectors: Sequence[Sequence[float]]) -> str:
    """Return what a person sees of vectors: first values of each, and cosine similarities of 2 to 8 texts."""
    width = min(SHOWN_CHARS, max(len(text) for text in texts))
    lines = []
    for number, (text, vector) in enumerate(zip(texts, vectors, strict=True), 1):
        first = " ".join(f"{value:+.4f}" for value in vector[:SHOWN_VALUES])
        more = " ..." if len(vector) > SHOWN_VALUES else ""
        lines.append(
            f"{number}  {one_line(text)[:SHOWN_CHARS]:<{width}}  {len(vector)} values: {first}{more}"
        )
    if 2 <= len(texts) <= MAX_COMPARED:
        cells = [
            (str(i), *(f"{_cosine(one, other):.3f}" for other in vectors)) for i, one in enumerate(vectors, 1)
        ]
        head = ("", *(str(i) for i in range(1, len(texts) + 1)))
        lines += ["", "cosine similarities", *columns(head, cells)]
    return "\n".join(lines)


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0


def routing_line(facts: RoutingFacts) -> str:
    """Return one line on what a quality budget did to an answer."""
    line = (
        f"experts traded {facts.swap_share:.1%}, selections unchanged {facts.agreement:.1%}, "
        f"gate mass lost {facts.lost_mass:.3%} of at most {facts.epsilon:.3%}"
    )
    return line + (" (not calibrated for this model)" if facts.basis == "uncalibrated" else "")


def _rate(tokens: int, seconds: float) -> str:
    if tokens <= 0 or seconds <= 0:
        return ""
    rate = tokens / seconds
    return f" ({rate:.0f} tok/s)" if rate >= 100 else f" ({rate:.1f} tok/s)"


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
