"""Eviction: what uses do to the priorities of experts, and which expert goes first.

A key is layer * experts + expert; an event is what one MoE layer needs at once. The lowest priority goes
first, ties to the least recently used, then to the lower key. A priority changes only when its key is used
or admitted: instead of all of LRFU's scores falling, the unit of a new use grows.

Not in here: who calls (`scheduler/residency/policies.py`), whole replays (`replay.py`).
"""

from __future__ import annotations

import math

import numpy as np

from ..kernel import kernel, merged

# BELADY's priorities are written by the replay, which knows the future.
LRU, LFU, ADAPTIVE, LRFU, LFUDA, BELADY = range(6)

# A policy's state is three arrays. `scalars`, float64 (4 + groups,): events so far; LRFU's unit, what a use
# adds now, and by what it grows per event; LFUDA's cap of the count; then for each `span` keys the priority
# of the last victim. `table`, float64 (3, keys): clock of the last use; uses (after an eviction a ghost, kept
# or halved); priority. `resident`, uint8 (keys,).
# Kernels hand these over as they are: tuples of arrays are counted at every use, 400 ns for an access.
CLOCK, UNIT, GROWTH, CAP, AGE = range(5)
LAST, COUNT, PRIORITY = range(3)
LARGEST_UNIT = 2.0**512  # a power of two: dividing by it rounds nothing

# One cache that is filled key by key: `listed`, int32 (cap,), in order of insertion with swap-removal;
# `position`, int32 (keys,), index in it or -1; `prefetched`, uint8 (keys,), admitted by a prefetch and not
# used since; `pinned`, uint8 (keys,), never a victim; `totals`, int64 (5,).
HITS, MISSES, EVICTIONS, PREFETCH_HITS, SIZE = range(5)


@merged
def tick(policy, scalars, table):
    """Begin an event."""
    scalars[CLOCK] += 1.0
    if policy == LRFU:
        scalars[UNIT] *= scalars[GROWTH]
        if scalars[UNIT] > LARGEST_UNIT:
            scalars[UNIT] /= LARGEST_UNIT
            for key in range(table.shape[1]):
                table[PRIORITY, key] /= LARGEST_UNIT


@merged
def score(policy, key, weight, scalars, table, span):
    """Set the priority of `key` after a use of `weight`, or (0) when it is admitted without one."""
    if policy == LRFU:
        if weight > 0.0:
            table[PRIORITY, key] += weight * scalars[UNIT]
        else:
            table[PRIORITY, key] = max(table[PRIORITY, key], scalars[UNIT])
    elif policy == LFUDA:
        table[PRIORITY, key] = scalars[AGE + key // span] + min(max(table[COUNT, key], 1.0), scalars[CAP])
    elif policy == LFU:
        table[PRIORITY, key] = table[COUNT, key]
    elif policy != BELADY:
        table[PRIORITY, key] = scalars[CLOCK]


@merged
def use(policy, key, tokens, scalars, table, span):
    """Count a use of `key` by `tokens` tokens in the event that the clock shows."""
    # Uses in one event are one burst: on the Qwen3 trace their root predicts best
    # (scheduler/residency/policies.py).
    weight = math.sqrt(tokens) if policy >= LRFU else 1.0
    table[LAST, key] = scalars[CLOCK]
    table[COUNT, key] += weight
    score(policy, key, weight, scalars, table, span)


@merged
def admit(policy, key, scalars, table, resident, span):
    """Note that `key` is resident; one that was not just used starts as if used now, uncounted."""
    resident[key] = 1
    # LFUDA's age may have grown since the use.
    if policy == LFUDA or table[LAST, key] != scalars[CLOCK]:
        table[LAST, key] = scalars[CLOCK]
        score(policy, key, 0.0, scalars, table, span)


@merged
def evict(policy, key, scalars, table, resident, span):
    """Note that `key` is gone."""
    resident[key] = 0
    if policy == LFUDA:
        group = AGE + key // span
        scalars[group] = max(scalars[group], table[PRIORITY, key])
        table[COUNT, key] = np.floor(table[COUNT, key] * 0.5)


@merged
def victim(policy, candidates, low, high, table):
    """Return the candidate of lowest priority in [low, high), or -1; ADAPTIVE judges by the candidates."""
    among, last, row = candidates[low:high], table[LAST, low:high], PRIORITY
    if policy == ADAPTIVE:
        count = table[COUNT, low:high]
        least, most = np.inf, -1.0
        for i in range(among.shape[0]):
            if among[i]:
                least = min(least, count[i])
                most = max(most, count[i])
        if least > 0.0 and most >= 3.0 * least:
            row = COUNT
    values = table[row, low:high]
    # Two passes, the first without branches: which key is a candidate is hard to guess.
    lowest = np.inf
    for i in range(among.shape[0]):
        value = values[i]
        value = value if among[i] else np.inf
        lowest = value if value < lowest else lowest
    best = -1
    for i in range(among.shape[0]):
        if values[i] == lowest and among[i] and (best < 0 or last[i] < last[best]):
            best = i
    return best if best < 0 else low + best


@kernel
def touch(policy, keys, tokens, scalars, table, resident, span):
    """Count one event: the clock advances once, `keys` int32 (n,) are used by `tokens` float32 (n,).

    Returns the first index whose key or number of tokens is out of range, then nothing is counted; else -1.
    """
    for i in range(keys.shape[0]):
        if not (0 <= keys[i] < resident.shape[0] and tokens[i] >= 1.0):
            return i
    tick(policy, scalars, table)
    for i in range(keys.shape[0]):
        use(policy, keys[i], tokens[i], scalars, table, span)
    return -1


@kernel
def find_victim(policy, candidates, table):
    """Return the key of lowest priority where `candidates`, uint8 (keys,), is set, or -1."""
    return victim(policy, candidates, 0, candidates.shape[0], table)


@kernel
def note_admitted(policy, key, scalars, table, resident, span):
    """Note that `key` is resident."""
    admit(policy, key, scalars, table, resident, span)


@kernel
def note_evicted(policy, key, scalars, table, resident, span):
    """Note that `key` is gone."""
    evict(policy, key, scalars, table, resident, span)


@kernel
def with_floor(resident, layer_counts, floor, layer_of_key, out):
    """Set `out` where `resident` is and the key's layer holds more than `floor` experts.

    resident, out: uint8 (keys,); layer_counts: int64 (layers,); layer_of_key: int32 (keys,).
    """
    for key in range(resident.shape[0]):
        out[key] = resident[key] if layer_counts[layer_of_key[key]] > floor else 0


@merged
def coldest(policy, compat, table, listed, pinned, size):
    """Return the hot key that leaves first, or -1 if all are pinned; `compat`: ties to the first listed."""
    row = PRIORITY
    if policy == ADAPTIVE:
        least, most = np.inf, -1.0
        for i in range(size):
            least = min(least, table[COUNT, listed[i]])
            most = max(most, table[COUNT, listed[i]])
        if least > 0.0 and most >= 3.0 * least:
            row = COUNT
    best, best_value, best_last = -1, np.inf, 0.0
    for i in range(size):
        key = listed[i]
        value = table[row, key]
        if value > best_value or pinned[key]:
            continue
        last = table[LAST, key]
        if best >= 0 and value == best_value and (compat or last > best_last):
            continue
        if best < 0 or value < best_value or last < best_last or key < best:
            best, best_value, best_last = key, value, last
    return best


@merged
def unlist(compat, key, listed, position, prefetched, totals):
    """Take the hot `key` off the list; the last listed takes its position."""
    end = totals[SIZE] - 1
    moved = listed[end]
    listed[position[key]] = moved
    position[moved] = position[key]
    position[key] = -1
    totals[SIZE] = end
    if not compat:
        prefetched[key] = 0


@merged
def enlist(key, listed, position, totals):
    """Put `key` at the end of the list."""
    end = totals[SIZE]
    listed[end] = key
    position[key] = end
    totals[SIZE] = end + 1


@kernel
def access_batch(
    policy, compat, bypass, keys, hits, scalars, table, resident, span,
    listed, position, prefetched, pinned, totals,
):  # fmt: skip
    """Use `keys`, int32 (n,), one after the other, each an event; `hits`, uint8 (n,), says which were hot.

    `bypass` does not admit what is worth less than its victim. Returns the first index whose key is out of
    range, then nothing is done; else -1.
    """
    for i in range(keys.shape[0]):
        if not 0 <= keys[i] < resident.shape[0]:
            return i
    for i in range(keys.shape[0]):
        key = keys[i]
        tick(policy, scalars, table)
        use(policy, key, 1.0, scalars, table, span)
        hits[i] = position[key] >= 0
        if hits[i]:
            totals[HITS] += 1
            totals[PREFETCH_HITS] += prefetched[key]
            prefetched[key] = 0
            continue
        totals[MISSES] += 1
        if totals[SIZE] >= listed.shape[0]:
            out = coldest(policy, compat, table, listed, pinned, totals[SIZE])
            if out < 0 or (bypass and table[PRIORITY, key] < table[PRIORITY, out]):
                continue
            unlist(compat, out, listed, position, prefetched, totals)
            evict(policy, out, scalars, table, resident, span)
            totals[EVICTIONS] += 1
        enlist(key, listed, position, totals)
        admit(policy, key, scalars, table, resident, span)
    return -1


@kernel
def cache_admit(
    policy, compat, key, scalars, table, resident, span, listed, position, prefetched, pinned, totals
):  # fmt: skip
    """Make `key` hot without a use; return whether it is hot now."""
    if position[key] >= 0:
        return True
    if totals[SIZE] >= listed.shape[0]:
        out = coldest(policy, compat, table, listed, pinned, totals[SIZE])
        if out < 0:
            return False
        unlist(compat, out, listed, position, prefetched, totals)
        evict(policy, out, scalars, table, resident, span)
        totals[EVICTIONS] += 1
    enlist(key, listed, position, totals)
    admit(policy, key, scalars, table, resident, span)
    return True


@kernel
def cache_evict(policy, compat, key, scalars, table, resident, span, listed, position, prefetched, totals):
    """Remove `key`, which is hot."""
    unlist(compat, key, listed, position, prefetched, totals)
    evict(policy, key, scalars, table, resident, span)


@kernel
def cache_coldest(policy, compat, table, listed, pinned, totals):
    """Return the key that would leave first, or -1."""
    return coldest(policy, compat, table, listed, pinned, totals[SIZE])
