"""Replay of a whole routing trace through the eviction rules of `eviction.py`.

Event-atomic: what an event needs is never evicted by it, and hits are counted against what was resident at
its start. Belady's rule is here because only a replay knows the future.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernel import kernel, merged
from .eviction import BELADY, PRIORITY, admit, evict, tick, use, victim


class Pool(NamedTuple):
    """The memory that a replay fills: one budget for each `span` keys (all of them, or one layer's)."""

    experts: int  # of one layer
    span: int
    floor: int  # experts that every layer keeps, as far as it has them
    bypass: bool  # compute without admitting what is worth less than its victim
    sizes: NDArray[np.int64]  # (layers,) bytes of an expert
    budgets: NDArray[np.int64]  # (groups,) bytes
    used: NDArray[np.int64]  # (groups,) bytes
    peak: NDArray[np.int64]  # (groups,) most bytes ever used
    layer_counts: NDArray[np.int64]  # (layers,) resident experts
    candidates: NDArray[np.uint8]  # (keys,) resident and not in the event
    masked: NDArray[np.uint8]  # (keys,) scratch: candidates above the floor


@merged
def make_room(policy, key, scalars, table, resident, pool):
    """Evict until `key` fits; whether it does, and `bypass` does not refuse it."""
    group, size = key // pool.span, pool.sizes[key // pool.experts]
    low, asked = group * pool.span, False
    if size > pool.budgets[group]:
        return False
    while pool.used[group] + size > pool.budgets[group]:
        among = pool.candidates
        if pool.floor > 0:
            among = pool.masked
            for other in range(low, low + pool.span):
                above = pool.layer_counts[other // pool.experts] > pool.floor
                among[other] = pool.candidates[other] if above else 0
        out = victim(policy, among, low, low + pool.span, table)
        if out < 0 or (pool.bypass and not asked and table[PRIORITY, key] < table[PRIORITY, out]):
            return False
        asked = True
        evict(policy, out, scalars, table, resident, pool.span)
        pool.candidates[out] = 0
        pool.used[group] -= pool.sizes[out // pool.experts]
        pool.layer_counts[out // pool.experts] -= 1
    return True


@merged
def replay_event(policy, keys, tokens, next_use, fetched, scalars, table, resident, pool):
    """One event: count its uses, mark in `fetched` what was not resident, admit what fits."""
    tick(policy, scalars, table)
    for i in range(keys.shape[0]):
        use(policy, keys[i], tokens[i], scalars, table, pool.span)
        pool.candidates[keys[i]] = 0
        if policy == BELADY:
            table[PRIORITY, keys[i]] = -np.float64(next_use[i])
    for i in range(keys.shape[0]):
        key = keys[i]
        fetched[i] = 0 if resident[key] else 1
        if fetched[i] and make_room(policy, key, scalars, table, resident, pool):
            admit(policy, key, scalars, table, resident, pool.span)
            group = key // pool.span
            pool.used[group] += pool.sizes[key // pool.experts]
            pool.peak[group] = max(pool.peak[group], pool.used[group])
            pool.layer_counts[key // pool.experts] += 1
    for i in range(keys.shape[0]):
        pool.candidates[keys[i]] = resident[keys[i]]


@kernel
def replay(policy, starts, keys, tokens, next_use, fetched, scalars, table, resident, pool):
    """Replay all events.

    starts: int64 (events + 1,), where each event's part of the rest begins; keys: int32 (n,), distinct in an
    event; tokens: float32 (n,) that use the key; next_use: int64 (n,), the next event with that key (BELADY
    alone reads it); fetched: uint8 (n,) becomes 1 where the key was not resident.
    """
    for event in range(starts.shape[0] - 1):
        a, b = starts[event], starts[event + 1]
        replay_event(
            policy, keys[a:b], tokens[a:b], next_use[a:b], fetched[a:b], scalars, table, resident, pool
        )


@merged
def prefer_residents(chosen, scores, others, other_scores, limit, keep, base, resident):
    """Swap ranks >= keep of one token for resident runner-ups within `limit` of score; how many.

    chosen: int32 (k,) best first; others: int32 (k,), the ranks after them, best first; -1 is none.
    """
    swapped, other = 0, 0
    for rank in range(chosen.shape[0] - 1, keep - 1, -1):
        if chosen[rank] < 0 or resident[base + chosen[rank]]:
            continue
        while other < others.shape[0] and (others[other] < 0 or not resident[base + others[other]]):
            other += 1
        if other == others.shape[0] or not scores[rank] - other_scores[other] <= limit:
            break  # the ranks above lose more
        chosen[rank] = others[other]
        other += 1
        swapped += 1
    return swapped


class PriorEvents(NamedTuple):
    """Events whose routing may prefer what is resident."""

    rows: NDArray[np.int64]
    """(events + 1,): the first token of each event."""
    layers: NDArray[np.int32]
    """(events,)"""
    may_swap: NDArray[np.uint8]
    """(tokens,)"""
    experts: NDArray[np.int32]
    """(tokens, k): ranks 0..k-1, -1 for none; becomes what was used."""
    scores: NDArray[np.float32]
    """(tokens, k)"""
    others: NDArray[np.int32]
    """(tokens, k): ranks k..2k-1, -1 for none."""
    other_scores: NDArray[np.float32]
    """(tokens, k)"""
    limits: NDArray[np.float32]
    """(tokens,): the largest loss of score."""


class EventScratch(NamedTuple):
    """Room for the largest event."""

    seen: NDArray[np.int32]
    """(keys,) of -1"""
    keys: NDArray[np.int32]
    tokens: NDArray[np.float32]
    fetched: NDArray[np.uint8]


@kernel
def replay_with_prior(policy, events, keep, scratch, scalars, table, resident, pool, out):
    """Replay `events`, a PriorEvents, with routing that prefers what is resident.

    As docs/expert-memory.md has it, without its budget. keep: ranks that are never swapped; scratch: an
    EventScratch; out: int64 (events, 3) becomes distinct experts, fetched ones and swapped slots.
    """
    seen, keys, tokens, fetched = scratch.seen, scratch.keys, scratch.tokens, scratch.fetched
    for event in range(events.rows.shape[0] - 1):
        base, n, swapped = events.layers[event] * pool.experts, 0, 0
        for row in range(events.rows[event], events.rows[event + 1]):
            experts = events.experts[row]
            if events.may_swap[row]:
                swapped += prefer_residents(
                    experts, events.scores[row], events.others[row], events.other_scores[row],
                    events.limits[row], keep, base, resident,
                )  # fmt: skip
            for rank in range(experts.shape[0]):
                if experts[rank] < 0:
                    continue
                key = base + experts[rank]
                if seen[key] < 0:
                    seen[key] = n
                    keys[n] = key
                    tokens[n] = 0.0
                    n += 1
                tokens[seen[key]] += 1.0
        replay_event(policy, keys[:n], tokens[:n], keys[:n], fetched[:n], scalars, table, resident, pool)
        out[event, 0], out[event, 1], out[event, 2] = n, 0, swapped
        for i in range(n):
            out[event, 1] += fetched[i]
            seen[keys[i]] = -1
