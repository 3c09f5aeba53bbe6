"""Top-k selection that prefers resident experts, the experts to page in for it, and their activity.

Not in here: gating functions and mixing weights (top_k.py), which must come from the scores as they are.
"""

from __future__ import annotations

import numpy as np

from ..kernel import kernel, merged
from .activity import NUM_RATES, mark_token

# Positions in the settings, float32, behind the rates of activity.py.
BONUS, KEEP_TOP, MEMORY_AWARE, COMPAT = NUM_RATES, NUM_RATES + 1, NUM_RATES + 2, NUM_RATES + 3
_HIGH, _LOW = NUM_RATES + 4, NUM_RATES + 5  # scratch

# Rows of a router's state, int64 (STATE_ROWS, max(experts, LEAST_WIDTH)). One array, because each argument
# costs a call from Python 0.1 us.
#   SETTINGS  float32
#   WORDS     uint64, bit e of the whole set if expert e is resident
#   WANTED    ids to page in
#   _KEYS, _FLOATS, _FLAGS  scratch of one token: keys of the scores without and with the bonus; the latter
#             scores and the residents as floats; flags and the experts' ids
SETTINGS, WORDS, WANTED, _KEYS, _FLOATS, _FLAGS = range(6)
STATE_ROWS, LEAST_WIDTH = 6, 16

# Keys are int32 that order as the floats do: an integer maximum is found 8 experts at a time, a float
# maximum, without fast-math, one by one.
_NONE, _MOST = np.int32(-(2**31)), np.int32(2**31 - 1)
_EXPONENT = np.int32(0x7F800000)
_LARGEST = np.float32(3.4028234663852886e38)


@merged
def _key(bits):
    """Return the key of the float32 of `bits`; the same turns a key into the bits."""
    return bits ^ ((bits >> np.int32(31)) & _MOST)


@merged
def _best(keys, ids):
    """Return the expert of the highest key, the lowest of several, or -1 if all are _NONE."""
    best, where = _NONE, _MOST
    for e in range(keys.shape[0]):
        best = max(best, keys[e])
    if best == _NONE:
        return np.int32(-1)
    for e in range(keys.shape[0]):
        where = min(where, ids[e] if keys[e] == best else _MOST)
    return where


@merged
def _bias(logits, t, settings, cell, adjusted, bits, resident, raw, keys):
    """Fill the keys of token t by the corrected rule: residents gain a share of the scores' spread.

    The loops are apart because merged ones LLVM does not vectorise: 190 ns a token instead of 140.
    """
    experts = raw.shape[0]
    for e in range(experts):
        adjusted[e] = logits[t, e] + np.float32(0)  # a negative zero becomes a zero: they are alike
    for e in range(experts):
        finite = (bits[e] & _EXPONENT) != _EXPONENT
        raw[e] = _key(bits[e]) if finite else _NONE
        keys[e] = _key(bits[e]) if finite else _MOST
    top, bottom = _NONE, _MOST
    for e in range(experts):
        top = max(top, raw[e])
    for e in range(experts):
        bottom = min(bottom, keys[e])
    lift = np.float32(0)
    if top != _NONE:
        cell[_HIGH], cell[_LOW] = _key(top), _key(bottom)  # only through memory do bits become a float
        lift = settings[BONUS] * settings[MEMORY_AWARE] * min(settings[_HIGH] - settings[_LOW], _LARGEST)
    for e in range(experts):
        adjusted[e] += lift * resident[e]
    for e in range(experts):
        keys[e] = _key(bits[e]) if raw[e] != _NONE else _NONE


@merged
def _bias_compat(logits, t, settings, adjusted, bits, resident, keys):
    """Fill the keys of token t as ruvllm (ADR-092) does: its bonus on raw scores, its rule for NaN."""
    experts = keys.shape[0]
    aware = settings[MEMORY_AWARE] != 0
    for e in range(experts):
        score = logits[t, e]
        if not np.isfinite(score):
            score = np.float32(0) if aware else np.float32(-np.inf)
        elif aware:
            score += settings[BONUS] * resident[e]
        adjusted[e] = score + np.float32(0) if np.isfinite(score) else np.float32(-np.inf)
    for e in range(experts):
        keys[e] = _key(bits[e])


@merged
def _select(t, settings, raw, keys, ids, selected):
    """Select for token t by its keys, best first, the true best ones before any bonus; -1 for none."""
    for rank in range(selected.shape[1]):
        best = _best(raw if np.float32(rank) < settings[KEEP_TOP] else keys, ids)
        selected[t, rank] = best
        if best >= 0:
            raw[best] = _NONE
            keys[best] = _NONE


@merged
def _expand(words, resident):
    """Make 1 or 0 of each bit; by word, which LLVM vectorises."""
    experts = resident.shape[0]
    for first in range(0, experts, 64):
        word = words[first >> 6]
        part = resident[first : min(first + 64, experts)]
        for j in range(part.shape[0]):
            part[j] = np.float32(1) if (word >> np.uint64(j)) & np.uint64(1) else np.float32(0)


@kernel
def route_residents(logits, scores, totals, state, selected):
    """Select experts for all tokens with a bonus for residents; return (hits, misses, page-ins).

    logits: float32 (tokens, experts), C order; scores float32, totals int64 (experts,): activity, marked
    token by token; state: see above, its row WANTED becomes the ids to page in, once each, in the order of
    need; selected: int32 (tokens, k) becomes the ids best first, -1 where finite scores run out. Hits and
    misses count (token, rank) pairs.
    """
    experts = logits.shape[1]
    # All views are made here: one made per token costs a count of references, an atomic operation.
    settings, cell, wanted = state[SETTINGS].view(np.float32), state[SETTINGS].view(np.int32), state[WANTED]
    both, flags = state[_KEYS].view(np.int32), state[_FLAGS].view(np.int32)
    floats, bits = state[_FLOATS].view(np.float32), state[_FLOATS].view(np.int32)
    raw, keys = both[:experts], both[experts : 2 * experts]
    adjusted, resident = floats[:experts], floats[experts : 2 * experts]
    asked, ids = flags[:experts], flags[experts : 2 * experts]
    _expand(state[WORDS].view(np.uint64), resident)
    for e in range(experts):
        asked[e] = 0
        ids[e] = e
    compat = settings[COMPAT] != 0
    hits, misses, number = 0, 0, 0
    for t in range(logits.shape[0]):
        if compat:
            _bias_compat(logits, t, settings, adjusted, bits, resident, keys)
        else:
            _bias(logits, t, settings, cell, adjusted, bits, resident, raw, keys)
        _select(t, settings, raw, keys, ids, selected)
        if compat and selected.shape[1] == 2:
            # ruvllm's scan for two maxima: what it did not find is expert 0, even twice.
            for rank in range(2):
                if adjusted[selected[t, rank]] == -np.inf:
                    selected[t, rank] = 0
        for rank in range(selected.shape[1]):
            e = selected[t, rank]
            if e < 0:
                break
            if resident[e] != 0:
                hits += 1
                continue
            misses += 1
            if asked[e] == 0:
                asked[e] = 1
                wanted[number] = e
                number += 1
        mark_token(scores, totals, selected, t, settings)
    return hits, misses, number
