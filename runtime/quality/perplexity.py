"""Scoring a text with a served model, and finding what a quality budget allows. No daemon is started here.

In here: windows of a text, teacher-forced scores with any budget, differences between two runs of the same
text with their standard error, and the search of `sterna calibrate`. Not in here: arguments and printing
(`cli/commands/quality.py`), where tables are stored (`calibration.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..client.client import Client
from ..client.results import Result, RoutingFacts
from ..protocol.messages import Basis
from .calibration import Point, envelope

# Neighbouring tokens are hard or easy together; beyond a sentence or two no longer.
BLOCK_TOKENS = 32
MAX_EPSILON = 0.5
RUNS_PER_BUDGET = 3
# What routing may lose, in budgets: where the search begins.
FIRST_RATIO = 2.0
# Closer than so to a budget, or to an epsilon that is too large, is close enough.
CLOSE_COST = 0.8
CLOSE_EPSILON = 1.15

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a text is scored: one token per step or whole, within which budget (None: exact)."""

    stepped: bool = False
    lost_mass: float | None = None
    quality_budget: float | None = None


@dataclass(slots=True)
class Routing:
    """What routing within a budget did to all windows of a text; see `messages.RoutingFacts`."""

    epsilon: float
    basis: Basis
    events: int = 0
    changed: int = 0
    swaps: int = 0
    lost: float = 0.0
    """Sum over the events of the share of the gate mass that was lost."""
    swapped: float = 0.0
    """Sum over the events of the share of the experts that were traded."""

    def add(self, facts: RoutingFacts) -> None:
        """Add one window."""
        self.events += facts.events
        self.changed += facts.changed
        self.swaps += facts.swaps
        self.lost += facts.lost_mass * facts.events
        self.swapped += facts.swap_share * facts.events

    def shown(self) -> dict[str, float | int | str]:
        """Return the figures under the names of `RoutingFacts`."""
        events = max(1, self.events)
        return {
            "epsilon": self.epsilon,
            "basis": self.basis,
            "events": self.events,
            "changed": self.changed,
            "swaps": self.swaps,
            "lost_mass": self.lost / events,
            "swap_share": self.swapped / events,
            "agreement": 1 - self.changed / events,
        }


@dataclass(slots=True)
class Scores:
    """Log-probabilities of a text's tokens, and what scoring took."""

    logprobs: list[float] = field(default_factory=list)
    """Natural logarithms."""
    seconds: float = 0.0
    routing: Routing | None = None
    requested: int | None = None
    """Experts that events needed; None where the daemon does not count them."""
    missed: int | None = None
    """Those of them that were not in memory."""

    @property
    def nats(self) -> float:
        """Mean of -log p, in nats per token."""
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """Exponential of the mean of -log p."""
        return math.exp(self.nats)

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed experts that were in memory."""
        if self.requested is None or self.missed is None:
            return None
        return 1 - self.missed / max(1, self.requested)


def windows(client: Client, text: str, size: int, tokens: int | None) -> list[list[int]]:
    """Return the text's token ids in windows of `size`, each with the model's first token, if it has one.

    At most `tokens` of the text, None for all. A rest of a single token is left out where nothing precedes
    it: there is nothing to score.
    """
    first = client.tokenize("")
    ids = client.tokenize(text, add_bos=False)[:tokens]
    step = size - len(first)
    cut = [[*first, *ids[at : at + step]] for at in range(0, len(ids), step)]
    return [window for window in cut if len(window) > 1]


def score(client: Client, parts: Sequence[list[int]], how: How, what: str, progress: Progress) -> Scores:
    """Return the scores of all tokens but each window's first; `what` is the phase's name for `progress`."""
    scores = Scores()
    before = _counts(client)
    total = sum(map(len, parts))
    done = 0
    progress(what, 0, total)
    for part in parts:
        began_s = time.monotonic()
        result = client.generate(
            token_ids=part,
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=True,
            stepped=how.stepped,
            lost_mass=how.lost_mass,
            # Exact means exact, whatever the daemon's default is.
            quality_budget=(how.quality_budget or 0.0) if how.lost_mass is None else None,
        )
        scores.seconds += time.monotonic() - began_s
        _take(scores, result)
        done += len(part)
        progress(what, done, total)
    if before is not None and (after := _counts(client)) is not None:
        scores.requested = after[0] - before[0]
        scores.missed = scores.requested - (after[1] - before[1])
    return scores


def _take(scores: Scores, result: Result) -> None:
    scores.logprobs += [value for value in result.prompt_logprobs or () if value is not None]
    if (facts := result.routing) is not None:
        if scores.routing is None:
            scores.routing = Routing(facts.epsilon, facts.basis)
        scores.routing.add(facts)


def _counts(client: Client) -> tuple[int, int] | None:
    """Return how many experts events needed since the start, and how many of them were in memory."""
    experts: dict[str, Any] = client.status().get("experts") or {}
    distinct, hits = experts.get("distinct"), experts.get("hits")
    return None if distinct is None or hits is None else (distinct, hits)


def resident_share(client: Client) -> float:
    """Return the share of the routed experts that fit into memory."""
    status = client.status()
    experts, model = status.get("experts") or {}, status["model"]
    if "share" in experts:
        return float(experts["share"])
    return float((model["resident_experts"] or 0) / max(1, model["experts"]))


# ---- two runs of the same text ----


def rise(exact: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return how far `other` has the larger perplexity, as a fraction, and the standard error of that.

    exp(mean d) - 1 for the differences d of the log-probabilities, token by token: what makes a token hard
    is in both. The error is that of means over blocks of BLOCK_TOKENS, carried through the exponential.
    """
    d = np.asarray(exact, np.float64) - np.asarray(other, np.float64)
    blocks = np.array_split(d, max(1, len(d) // BLOCK_TOKENS))
    ratio = math.exp(float(d.mean()))
    if len(blocks) < 2:
        return ratio - 1, math.inf
    means = np.array([float(block.mean()) for block in blocks])
    return ratio - 1, ratio * float(means.std(ddof=1)) / math.sqrt(len(blocks))


def mean_difference(exact: Sequence[float], other: Sequence[float]) -> float:
    """Return the mean of |log p - log p'| over the tokens, in nats."""
    return float(np.abs(np.asarray(exact, np.float64) - np.asarray(other, np.float64)).mean())


def point(epsilon: float, exact: Scores, other: Scores) -> Point:
    """Return what `other`, the same text with this epsilon, says about it."""
    delta, error = rise(exact.logprobs, other.logprobs)
    shown = other.routing.shown() if other.routing else {"swap_share": 0.0, "lost_mass": 0.0}
    misses = other.missed / exact.missed if exact.missed and other.missed is not None else None
    return Point(
        epsilon=epsilon,
        delta=delta,
        error=error,
        misses=misses,
        swap_share=float(shown["swap_share"]),
        lost_mass=float(shown["lost_mass"]),
    )


# ---- search ----


def search(
    budgets: Sequence[float], measure: Callable[[float], Point], *, margin: bool
) -> Iterator[list[Point]]:
    """Measure epsilons until each budget's largest is known well enough; yield all points after each.

    Budgets are fractions above 0. What was measured for one budget serves the next, at most RUNS_PER_BUDGET
    more for each; the same points would give the same choice.
    """
    points: list[Point] = []
    for budget in sorted(budgets):
        for _ in range(RUNS_PER_BUDGET):
            epsilon = next_epsilon(envelope(points, margin=margin), budget)
            if epsilon is None:
                break
            points = sorted([*points, measure(epsilon)], key=lambda point: point.epsilon)
            yield points


def next_epsilon(costs: Sequence[tuple[float, float]], budget: float) -> float | None:
    """Return the epsilon to measure next for a budget, None when `costs` tell enough.

    costs: (epsilon, cost) of `calibration.envelope`.
    """
    low, low_cost = max([(0.0, 0.0), *(c for c in costs if c[1] <= budget)])
    above = [c for c in costs if c[1] > budget]
    if low and low_cost >= CLOSE_COST * budget:
        return None
    if not above:
        if low >= MAX_EPSILON:
            return None
        guess = low * min(4.0, 0.95 * budget / low_cost) if low_cost > 0 else 2 * low
        return round(min(MAX_EPSILON, max(guess, 1.2 * low, FIRST_RATIO * budget)), 4)
    high, high_cost = min(above)
    if low and high / low <= CLOSE_EPSILON:
        return None
    along = (0.9 * budget - low_cost) / (high_cost - low_cost)
    return round(low + (high - low) * min(0.8, max(0.2, along)), 5)
