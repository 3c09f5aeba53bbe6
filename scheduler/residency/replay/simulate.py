"""Replay of a routing trace: what a policy would have fetched with so much memory.

Event-atomic (expert-memory.md 5.2): an event's hits are what was resident when it began, what it misses is
admitted after it, and none of its experts is evicted by it. `belady` evicts what is used again last and must
admit every miss, `belady-bypass` need not: the bounds for exact routing (where all experts are of one size).
`cache-prior` is the default policy with routing that prefers residents (5.1, without its budget of lost
mass), in decode only.

Not in here: files (`trace.py`), the rules themselves (`workers/kernels/`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ....shm.errors import UsageError
from ....workers.kernels.routing import eviction
from ....workers.kernels.routing.replay import EventScratch, Pool, PriorEvents, replay, replay_with_prior
from ..policies import DEFAULT_CAP, DEFAULT_DECAY, DEFAULT_POLICY, POLICY_IDS, PolicyArrays
from .trace import DECODE, Trace

BELADY, BELADY_BYPASS, CACHE_PRIOR = "belady", "belady-bypass", "cache-prior"
POLICIES: Final = (*POLICY_IDS, BELADY, BELADY_BYPASS, CACHE_PRIOR)
NEVER = np.iinfo(np.int64).max >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySetting:
    """What to replay with."""

    policy: str = DEFAULT_POLICY
    memory_bytes: int
    per_layer: bool = False  # each layer its share of the memory, instead of one pool
    floor: int = 0  # experts that every layer keeps
    bypass: bool = False
    decay: float = DEFAULT_DECAY  # per pass through the layers
    cap: float = DEFAULT_CAP
    bonus: float = 0.15  # cache-prior: largest loss of score for a swap, as a share of the token's spread
    keep: int | None = None  # cache-prior: ranks that are never swapped; default 1 up to top-2, else 2
    exact_layers: int = 1  # cache-prior: first layers that are never swapped


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What came out; rates are of distinct experts per event, NaN where there was no such event."""

    policy: str
    memory_bytes: int
    peak_bytes: int
    share: float  # of all experts, by bytes
    hit_rate: float
    decode_hit_rate: float
    misses_per_logical: float  # fetched / experts used, each token's counted
    bytes_per_token: float
    decode_bytes_per_token: float
    slots_needed: float  # r: distinct experts of an event / slots per layer; the mean
    slots_needed_p95: float
    events_too_large: float  # share of events with r > 1
    cycle_ratio: float  # memory / what one token uses in all layers; below 1 an LRU never hits
    swapped: float | None = None  # cache-prior: share of the slots in decode
    recoverable: float | None = None  # (misses - Belady's) / misses, negative if it beats exact routing

    def as_dict(self) -> dict[str, Any]:
        """Return it with None for what is not finite, for JSON."""
        body = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in body.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ReplayCounts:
    """Per event, int64 (events,): distinct experts and fetched; then swapped slots and bytes at the peak."""

    distinct: NDArray[np.int64]
    fetched: NDArray[np.int64]
    swapped: int
    peak_bytes: int


def simulate(trace: Trace, setting: ReplaySetting) -> ReplayReport:
    """Replay `trace`; raises UsageError for a setting that the trace or the policy cannot have."""
    _check(trace, setting)
    if setting.policy == CACHE_PRIOR:
        return _report(trace, setting, _replay_with_prior(trace, setting))
    return _report(trace, setting, _replay(trace, setting))


def compare(trace: Trace, settings: Iterable[ReplaySetting]) -> list[ReplayReport]:
    """Replay every setting, and Belady for comparison, so that `recoverable` is known."""
    bounds: dict[ReplaySetting, ReplayReport] = {}
    reports = []
    for setting in settings:
        report = simulate(trace, setting)
        exact = ReplaySetting(
            policy=BELADY,
            memory_bytes=setting.memory_bytes,
            per_layer=setting.per_layer,
            floor=setting.floor,
        )
        if exact not in bounds:
            bounds[exact] = simulate(trace, exact)
        misses, least = report.misses_per_logical, bounds[exact].misses_per_logical
        reports.append(replace(report, recoverable=(misses - least) / misses if misses else 0.0))
    return reports


def next_uses(starts: NDArray[np.int64], keys: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return for each use the event in which its key is used next, or NEVER; int64 (n,)."""
    events = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    found = np.full(len(keys), NEVER, dtype=np.int64)
    found[order[again]] = events[order[again + 1]]
    return found


def _check(trace: Trace, setting: ReplaySetting) -> None:
    if setting.policy not in POLICIES:
        raise UsageError(f"policy: expected one of {', '.join(POLICIES)}, found {setting.policy}")
    if setting.memory_bytes < 0 or setting.floor < 0:
        raise UsageError("memory and floor must not be negative")
    needed = setting.floor * int(trace.expert_bytes.sum())
    if setting.floor and (setting.per_layer or needed > setting.memory_bytes):
        raise UsageError(f"a floor of {setting.floor} experts per layer needs one pool of {needed} bytes")
    if setting.policy != CACHE_PRIOR:
        return
    if trace.runner_ups is None:
        raise UsageError(
            "cache-prior needs a trace with the scores of runner-ups; `sterna trace` records them"
        )
    if not (0.0 <= setting.bonus <= 1.0 and 0 <= (setting.keep or 0) <= trace.top_k):
        raise UsageError(f"cache-prior: bonus {setting.bonus:g} (0 to 1), keep {setting.keep}")


def _memory(trace: Trace, setting: ReplaySetting) -> tuple[Pool, PolicyArrays]:
    """Return empty memory and an empty policy."""
    keys, layers = trace.num_layers * trace.experts_per_layer, trace.num_layers
    span = trace.experts_per_layer if setting.per_layer else keys
    budgets = np.array([setting.memory_bytes], dtype=np.int64)
    if setting.per_layer:
        # A share such as a quarter is meant in whole experts; float error must not cost one.
        slots = int(trace.experts_per_layer * setting.memory_bytes / trace.total_bytes + 1e-6)
        budgets = slots * trace.expert_bytes
    groups = keys // span
    pool = Pool(
        experts=trace.experts_per_layer,
        span=span,
        floor=setting.floor,
        bypass=setting.bypass or setting.policy == BELADY_BYPASS,
        sizes=trace.expert_bytes,
        budgets=budgets,
        used=np.zeros(groups, dtype=np.int64),
        peak=np.zeros(groups, dtype=np.int64),
        layer_counts=np.zeros(layers, dtype=np.int64),
        candidates=np.zeros(keys, dtype=np.uint8),
        masked=np.zeros(keys, dtype=np.uint8),
    )
    return pool, PolicyArrays.empty(
        keys, groups, setting.decay / max(1, len(np.unique(trace.layers))), setting.cap
    )


def _replay(trace: Trace, setting: ReplaySetting) -> _ReplayCounts:
    pool, arrays = _memory(trace, setting)
    starts, keys, tokens = trace.uses()
    exact = setting.policy in (BELADY, BELADY_BYPASS)
    policy_id = eviction.BELADY if exact else POLICY_IDS[setting.policy]
    following = next_uses(starts, keys) if exact else np.zeros(len(keys), dtype=np.int64)
    fetched = np.zeros(len(keys), dtype=np.uint8)
    replay(policy_id, starts, keys, tokens, following, fetched, *arrays, pool)
    sums = np.concatenate(([0], np.cumsum(fetched, dtype=np.int64)))
    return _ReplayCounts(
        distinct=np.diff(starts),
        fetched=np.diff(sums[starts]),
        swapped=0,
        peak_bytes=int(pool.peak.sum()),
    )


def _replay_with_prior(trace: Trace, setting: ReplaySetting) -> _ReplayCounts:
    pool, arrays = _memory(trace, setting)
    routes = trace.runner_ups
    assert routes is not None  # noqa: S101 - `_check` has refused the trace otherwise
    keep = setting.keep if setting.keep is not None else (1 if trace.top_k <= 2 else 2)
    event_of_token = np.repeat(np.arange(trace.num_events), np.diff(trace.rows))
    exact = np.unique(trace.layers)[: setting.exact_layers]
    may_swap = (trace.phases == DECODE) & ~np.isin(trace.layers, exact)
    largest = int(np.diff(trace.rows).max()) * trace.top_k
    out = np.zeros((trace.num_events, 3), dtype=np.int64)
    events = PriorEvents(
        rows=trace.rows,
        layers=trace.layers,
        may_swap=may_swap[event_of_token].astype(np.uint8),
        experts=trace.experts.copy(),
        scores=routes.scores,
        others=routes.others,
        other_scores=routes.other_scores,
        limits=routes.spread * np.float32(setting.bonus),
    )
    scratch = EventScratch(
        seen=np.full(len(pool.candidates), -1, dtype=np.int32),
        keys=np.zeros(largest, dtype=np.int32),
        tokens=np.zeros(largest, dtype=np.float32),
        fetched=np.zeros(largest, dtype=np.uint8),
    )
    replay_with_prior(POLICY_IDS[DEFAULT_POLICY], events, keep, scratch, *arrays, pool, out)
    return _ReplayCounts(
        distinct=out[:, 0],
        fetched=out[:, 1],
        swapped=int(out[:, 2].sum()),
        peak_bytes=int(pool.peak.sum()),
    )


def _report(trace: Trace, setting: ReplaySetting, counts: _ReplayCounts) -> ReplayReport:
    logical, decode = trace.logical, trace.phases == DECODE
    read = counts.fetched * trace.expert_bytes[trace.layers]
    share = setting.memory_bytes / trace.total_bytes
    slots = share * trace.experts_per_layer
    needed = counts.distinct / slots if slots else np.full(trace.num_events, np.inf)
    passes = trace.num_tokens
    tokens = np.diff(trace.rows)
    decode_passes = max(
        (int(tokens[decode & (trace.layers == layer)].sum()) for layer in np.unique(trace.layers)), default=0
    )
    return ReplayReport(
        policy=setting.policy,
        memory_bytes=setting.memory_bytes,
        peak_bytes=counts.peak_bytes,
        share=share,
        hit_rate=_rate(counts, np.ones_like(decode)),
        decode_hit_rate=_rate(counts, decode),
        misses_per_logical=float(counts.fetched.sum() / logical.sum()),
        bytes_per_token=float(read.sum() / passes),
        decode_bytes_per_token=float(read[decode].sum() / decode_passes) if decode_passes else float("nan"),
        slots_needed=float(needed.mean()),
        slots_needed_p95=float(np.sort(needed)[int(0.95 * (len(needed) - 1))]),
        events_too_large=float((needed > 1.0).mean()),
        cycle_ratio=setting.memory_bytes / trace.cycle_bytes,
        swapped=counts.swapped / max(1, int(logical[decode].sum()))
        if setting.policy == CACHE_PRIOR
        else None,
    )


def _rate(counts: _ReplayCounts, among: NDArray[np.bool_]) -> float:
    distinct = int(counts.distinct[among].sum())
    return 1.0 - int(counts.fetched[among].sum()) / distinct if distinct else float("nan")
