"""Attention over a paged cache: absorbed MLA, where one latent row serves all heads, and grouped queries.

Queries and softmax weights are rounded to float16 where the cache holds that: llama.cpp does so too, and near
ties between experts then fall the same way. A cache of float32 rounds nothing.

Each token reads the positions 0..p of its own stream (or the last of them, in a window) in order, so that
its bits do not depend on who else is in the batch, how its prompt was cut into chunks or how many threads
there are. Four heads at a time share each row that is read.

Called in every layer, with flat arguments: see `kernel.kernel`.
"""

from __future__ import annotations

import numpy as np
from numba import types

from ..calls import borrower, lend
from ..crew import ARGUMENTS, run, threads_for
from ..kernel import kernel
from ..scratch import HEADS
from ..simd.mathematics import exp_f32
from ..simd.ops import (
    add_f32,
    fma_f32,
    largest_f32,
    load_f32,
    max_f32,
    mul_f32,
    splat_f32,
    store_f32,
    sub_f32,
    sum_f32,
    zero_f32,
)
from .kv_values import as_cached, load_cached, value_nbytes

# Positions whose values are summed for all columns before the next ones are read: they then come from the
# cache. Rows of a power of two bytes would otherwise push each other out of it.
_SPAN = 128
_bytes = borrower(types.Array(types.uint8, 1, "C"))
_floats = borrower(types.Array(types.float32, 1, "C"))
_rows = borrower(types.Array(types.float32, 2, "C"))
_tables = borrower(types.Array(types.int32, 2, "C"))
_numbers = borrower(types.Array(types.int32, 1, "C"))
_offsets = borrower(types.Array(types.int64, 2, "C"))
_scale = borrower(types.float32)


@kernel
def softmax(scores, at, count, sink, cache):
    """Turn scores[at : at + count] into weights of the cache's type; pads to a multiple of 16 with zeros.

    sink: one more score, that takes its share of the sum of 1 and has no value; -inf: none.
    """
    padded = (count + 15) // 16 * 16
    for i in range(count, padded):
        scores[at + i] = scores[at]
    top = load_f32(scores, 4 * at)
    for i in range(16, padded, 16):
        top = max_f32(load_f32(scores, 4 * (at + i)), top)
    largest = largest_f32(top)
    if sink > largest:
        largest = sink
    peak = splat_f32(largest)
    for i in range(0, padded, 16):
        store_f32(scores, 4 * (at + i), exp_f32(sub_f32(load_f32(scores, 4 * (at + i)), peak)))
    for i in range(count, padded):
        scores[at + i] = np.float32(0.0)
    total = zero_f32()
    for i in range(0, padded, 16):
        total = add_f32(total, load_f32(scores, 4 * (at + i)))
    # Without a sink this adds 1e-38 to a sum of at least 1: nothing.
    extra = largest_f32(exp_f32(sub_f32(splat_f32(sink), peak)))
    inverse = splat_f32(np.float32(1.0) / (sum_f32(total) + extra))
    for i in range(0, padded, 16):
        v = mul_f32(load_f32(scores, 4 * (at + i)), inverse)
        store_f32(scores, 4 * (at + i), as_cached(cache, v))


@kernel
def _scores(q, width, cache, offsets, shift, length, scale, scores, step):
    """scores[j * step + p] = scale * (row j of `q` . key p) for four rows and p < length.

    q: float32 scratch, four rows of `width` rounded to float16; key p at byte offsets[p] + shift.
    """
    for p in range(length):
        a, b, c, d = zero_f32(), zero_f32(), zero_f32(), zero_f32()
        for i in range(0, width, 16):
            v = load_cached(cache, offsets[p] + shift + value_nbytes(cache) * i)
            a = fma_f32(v, load_f32(q, 4 * i), a)
            b = fma_f32(v, load_f32(q, 4 * (i + width)), b)
            c = fma_f32(v, load_f32(q, 4 * (i + 2 * width)), c)
            d = fma_f32(v, load_f32(q, 4 * (i + 3 * width)), d)
        scores[p] = sum_f32(a) * scale
        scores[step + p] = sum_f32(b) * scale
        scores[2 * step + p] = sum_f32(c) * scale
        scores[3 * step + p] = sum_f32(d) * scale


@kernel
def _weigh(scores, step, cache, offsets, shift, length, out, out_at, out_step):
    """Add sixteen columns of the values with four heads' weights; head j's are at out_at + j * out_step."""
    a, b = load_f32(out, 4 * out_at), load_f32(out, 4 * (out_at + out_step))
    c, d = load_f32(out, 4 * (out_at + 2 * out_step)), load_f32(out, 4 * (out_at + 3 * out_step))
    for p in range(length):
        v = load_cached(cache, offsets[p] + shift)
        a = fma_f32(v, splat_f32(scores[p]), a)
        b = fma_f32(v, splat_f32(scores[step + p]), b)
        c = fma_f32(v, splat_f32(scores[2 * step + p]), c)
        d = fma_f32(v, splat_f32(scores[3 * step + p]), d)
    store_f32(out, 4 * out_at, a)
    store_f32(out, 4 * (out_at + out_step), b)
    store_f32(out, 4 * (out_at + 2 * out_step), c)
    store_f32(out, 4 * (out_at + 3 * out_step), d)


@kernel
def _scores_alone(q, at, width, cache, offsets, shift, length, scale, scores, to):
    """As _scores for the row at element `at` of q alone: scores[to + p], four positions at a time."""
    fours = length // 4 * 4
    for p in range(0, fours, 4):
        a, b, c, d = zero_f32(), zero_f32(), zero_f32(), zero_f32()
        for i in range(0, width, 16):
            v, byte = load_f32(q, 4 * (at + i)), shift + value_nbytes(cache) * i
            a = fma_f32(load_cached(cache, offsets[p] + byte), v, a)
            b = fma_f32(load_cached(cache, offsets[p + 1] + byte), v, b)
            c = fma_f32(load_cached(cache, offsets[p + 2] + byte), v, c)
            d = fma_f32(load_cached(cache, offsets[p + 3] + byte), v, d)
        scores[to + p] = sum_f32(a) * scale
        scores[to + p + 1] = sum_f32(b) * scale
        scores[to + p + 2] = sum_f32(c) * scale
        scores[to + p + 3] = sum_f32(d) * scale
    for p in range(fours, length):
        a = zero_f32()
        for i in range(0, width, 16):
            a = fma_f32(
                load_cached(cache, offsets[p] + shift + value_nbytes(cache) * i), load_f32(q, 4 * (at + i)), a
            )
        scores[to + p] = sum_f32(a) * scale


@kernel
def _weigh_alone(scores, at, rank, cache, offsets, shift, length, out, out_at):
    """As _weigh for one head's weights from scores[at] on: all `rank` columns, 64 at a time."""
    whole, size = rank // 64 * 64, value_nbytes(cache)
    for i in range(0, whole, 64):
        first = 4 * (out_at + i)
        a, b = load_f32(out, first), load_f32(out, first + 64)
        c, d = load_f32(out, first + 128), load_f32(out, first + 192)
        for p in range(length):
            weight, value_at = splat_f32(scores[at + p]), offsets[p] + shift + value_nbytes(cache) * i
            a = fma_f32(load_cached(cache, value_at), weight, a)
            b = fma_f32(load_cached(cache, value_at + 16 * size), weight, b)
            c = fma_f32(load_cached(cache, value_at + 32 * size), weight, c)
            d = fma_f32(load_cached(cache, value_at + 48 * size), weight, d)
        store_f32(out, first, a)
        store_f32(out, first + 64, b)
        store_f32(out, first + 128, c)
        store_f32(out, first + 192, d)
    for i in range(whole, rank, 16):
        a = load_f32(out, 4 * (out_at + i))
        for p in range(length):
            a = fma_f32(
                load_cached(cache, offsets[p] + shift + value_nbytes(cache) * i), splat_f32(scores[at + p]), a
            )
        store_f32(out, 4 * (out_at + i), a)


@kernel
def _tile(q, q_more, more_at, more_step, heads, first, last, rank, width, scale, sinks, cache, offsets, keys,
          values, length, scratch, context, out, t):  # fmt: skip
    """Compute up to four heads of token t, from `first` on and not beyond `last`.

    A query is `rank` elements of q and `width` - `rank` of q_more, head h at more_at + h * more_step; a key
    lies at byte offsets[p] + keys, a value of `rank` elements at offsets[p] + values. sinks: empty, or one
    for each head. One or two heads are computed one by one; three are computed as four, the last one twice.
    """
    here = min(last - first + 1, HEADS)
    together = here > 2
    for j in range(HEADS if together else here):
        h = min(first + j, last)
        for i in range(0, rank, 16):
            v = as_cached(cache, load_f32(q, 4 * ((t * heads + h) * rank + i)))
            store_f32(scratch, 4 * (j * width + i), v)
        for i in range(0, width - rank, 16):
            v = as_cached(cache, load_f32(q_more, 4 * (more_at + h * more_step + i)))
            store_f32(scratch, 4 * (j * width + rank + i), v)
    scores = scratch[HEADS * width :]
    sums = scores[HEADS * context :]
    if together:
        _scores(scratch, width, cache, offsets, keys, length, scale, scores, context)
    else:
        for j in range(here):
            _scores_alone(scratch, j * width, width, cache, offsets, keys, length, scale, scores, j * context)
    for j in range(HEADS if together else here):
        h = min(first + j, last)
        softmax(scores, j * context, length, sinks[h] if len(sinks) else np.float32(-np.inf), cache)
    for i in range(0, HEADS * rank, 16):
        store_f32(sums, 4 * i, zero_f32())
    for start in range(0, length, _SPAN):
        # Sliced: an index that counts from 0 needs no test for below 0, which cost a quarter of the time.
        weights, rows, size = scores[start:], offsets[start:], min(_SPAN, length - start)
        if together:
            for i in range(0, rank, 16):
                at = values + value_nbytes(cache) * i
                _weigh(weights, context, cache, rows, at, size, sums, i, rank)
        else:
            for j in range(here):
                _weigh_alone(weights, j * context, rank, cache, rows, values, size, sums, j * rank)
    for j in range(here):
        for i in range(0, rank, 16):
            store_f32(out, 4 * ((t * heads + first + j) * rank + i), load_f32(sums, 4 * (j * rank + i)))


@kernel
def _find_rows(tables, slot, block, first, length, cache_at, row_nbytes, offsets):
    """Write where the rows of `length` positions from `first` on lie in the cache."""
    for p in range(length):
        position = first + p
        row_index = np.int64(tables[slot, position // block]) * block + position % block
        offsets[p] = cache_at + row_index * row_nbytes


@kernel
def _latent_chunk(board, chunk, thread, cache):
    q_latent, q_rope = _rows(board, ARGUMENTS), _floats(board, ARGUMENTS + 1)
    tables = _tables(board, ARGUMENTS + 3)
    slots, positions = _numbers(board, ARGUMENTS + 4), _numbers(board, ARGUMENTS + 5)
    out, scale = _rows(board, ARGUMENTS + 6), _scale(board, ARGUMENTS + 7)
    scratch, offsets = _rows(board, ARGUMENTS + 8)[thread], _offsets(board, ARGUMENTS + 9)[thread]
    n = board[ARGUMENTS + 10 :]
    rope_at, rope_step, rope_head_step, heads, rank, width = n[0], n[1], n[2], n[3], n[4], n[5]
    cache_at, block, count, chunks, context = n[6], n[7], n[8], n[9], n[10]
    tiles = (heads + HEADS - 1) // HEADS
    known = -1
    length = 0
    for item in range(count * tiles * chunk // chunks, count * tiles * (chunk + 1) // chunks):
        t, first = item // tiles, item % tiles * HEADS
        if t != known:
            known = t
            length = positions[t] + 1
            _find_rows(tables, slots[t], block, 0, length, cache_at, width * value_nbytes(cache), offsets)
        _tile(
            q_latent, q_rope, rope_at + t * rope_step, rope_head_step, heads, first, heads - 1, rank, width,
            scale, scratch[:0], cache, offsets, 0, 0, length, scratch, context, out, t,
        )  # fmt: skip


@kernel
def latent_chunk(board, chunk, thread):
    """Compute one chunk of `latent_attention`, whose arguments lie on the board."""
    _latent_chunk(board, chunk, thread, _bytes(board, ARGUMENTS + 2))


@kernel
def latent_chunk_f32(board, chunk, thread):
    """As latent_chunk where the cache is float32."""
    _latent_chunk(board, chunk, thread, _floats(board, ARGUMENTS + 2))


@kernel
def latent_attention(
    board, job, q_latent, q_rope, rope_at, rope_step, rope_head_step, heads, rank, width, scale,
    cache, cache_at, tables, slots, positions, block, count, scratch, offsets, out,
):  # fmt: skip
    """out[t, h] = softmax(scale * (q_latent[t, h] . c + q_rope[t, h] . k)) @ c over positions 0..p.

    board, job: as dense.multiply_heads, the job being latent_chunk, or latent_chunk_f32 for a float32 cache;
    q_latent, out: float32, head h of token t at element (t * heads + h) * rank; q_rope: float32 flat, head h
    of row t at rope_at + t * rope_step + h * rope_head_step; cache: see `cached`, rows of `width` = rank +
    rope, this layer from byte cache_at; tables: int32 (slots, blocks) block tables; slots, positions: int32
    (count,); scratch, offsets: see `scratch.attention_shapes`. rank % 16 == 0, rope % 16 == 0.
    """
    total = 0
    for t in range(count):
        total += positions[t] + 1
    tiles = (heads + HEADS - 1) // HEADS
    threads = threads_for(board, total * heads * (width + rank) * 4, 2)
    chunks = min(threads * 4, count * tiles) if threads > 1 else 1
    lend(board, ARGUMENTS, q_latent)
    lend(board, ARGUMENTS + 1, q_rope)
    lend(board, ARGUMENTS + 2, cache)
    lend(board, ARGUMENTS + 3, tables)
    lend(board, ARGUMENTS + 4, slots)
    lend(board, ARGUMENTS + 5, positions)
    lend(board, ARGUMENTS + 6, out)
    lend(board, ARGUMENTS + 7, scale)
    lend(board, ARGUMENTS + 8, scratch)
    lend(board, ARGUMENTS + 9, offsets)
    n = board[ARGUMENTS + 10 :]
    n[0], n[1], n[2], n[3], n[4], n[5] = rope_at, rope_step, rope_head_step, heads, rank, width
    n[6], n[7], n[8], n[9] = cache_at, block, count, chunks
    n[10] = offsets.shape[1]
    run(board, job, chunks, threads)


@kernel
def _seen(position, window):
    """Return how many positions up to `position` are looked at; window 0: all."""
    return min(position + 1, window) if window else position + 1


@kernel
def _grouped_chunk(board, chunk, thread, cache):
    q, size = _rows(board, ARGUMENTS), value_nbytes(cache)
    tables, slots = _tables(board, ARGUMENTS + 2), _numbers(board, ARGUMENTS + 3)
    positions, out = _numbers(board, ARGUMENTS + 4), _rows(board, ARGUMENTS + 5)
    scale, sinks = _scale(board, ARGUMENTS + 6), _floats(board, ARGUMENTS + 7)
    scratch, offsets = _rows(board, ARGUMENTS + 8)[thread], _offsets(board, ARGUMENTS + 9)[thread]
    n = board[ARGUMENTS + 10 :]
    heads, shared, width, cache_at, block = n[0], n[1], n[2], n[3], n[4]
    count, chunks, context, window = n[5], n[6], n[7], n[8]
    group = heads // shared
    tiles = (group + HEADS - 1) // HEADS
    items = count * shared * tiles
    flat = q.reshape(q.size)
    known = -1
    length = 0
    for item in range(items * chunk // chunks, items * (chunk + 1) // chunks):
        t, head, tile = item // (shared * tiles), item // tiles % shared, item % tiles
        if t != known:
            known = t
            length = _seen(positions[t], window)
            start = positions[t] + 1 - length
            _find_rows(tables, slots[t], block, start, length, cache_at, 2 * size * shared * width, offsets)
        first = head * group + tile * HEADS
        _tile(
            q, flat, 0, 0, heads, first, head * group + group - 1, width, width, scale, sinks, cache, offsets,
            size * head * width, size * (shared + head) * width, length, scratch, context, out, t,
        )  # fmt: skip


@kernel
def grouped_chunk(board, chunk, thread):
    """Compute one chunk of `grouped_attention`, whose arguments lie on the board."""
    _grouped_chunk(board, chunk, thread, _bytes(board, ARGUMENTS + 1))


@kernel
def grouped_chunk_f32(board, chunk, thread):
    """As grouped_chunk where the cache is float32."""
    _grouped_chunk(board, chunk, thread, _floats(board, ARGUMENTS + 1))


@kernel
def grouped_attention(
    board, job, q, heads, shared, width, scale, window, sinks, cache, cache_at, tables, slots, positions,
    block, count, scratch, offsets, out,
):  # fmt: skip
    """out[t, h] = softmax(scale * q[t, h] . k) @ v over positions 0..p: `heads` queries, `shared` keys.

    Grouped-query attention: heads / shared queries read the same key and value. board, job: as
    dense.multiply_heads, the job being grouped_chunk, or grouped_chunk_f32 for a float32 cache; q, out:
    float32 (count, heads * width); window: 0, or how many positions a token sees, its own the last:
    max(0, p - window + 1)..p; sinks: float32 (heads,), one more score of each head that takes part in the
    softmax and has no value (gpt-oss; not scaled), or (0,); cache: see `cached`, rows of all keys, then all
    values of a position, 2 * shared * width elements, this layer from byte cache_at; the rest as
    latent_attention. width % 16 == 0, heads % shared == 0.
    """
    total = 0
    for t in range(count):
        total += _seen(positions[t], window)
    tiles = (heads // shared + HEADS - 1) // HEADS
    threads = threads_for(board, total * heads * width * 8, 2)
    chunks = min(threads * 4, count * shared * tiles) if threads > 1 else 1
    lend(board, ARGUMENTS, q)
    lend(board, ARGUMENTS + 1, cache)
    lend(board, ARGUMENTS + 2, tables)
    lend(board, ARGUMENTS + 3, slots)
    lend(board, ARGUMENTS + 4, positions)
    lend(board, ARGUMENTS + 5, out)
    lend(board, ARGUMENTS + 6, scale)
    lend(board, ARGUMENTS + 7, sinks)
    lend(board, ARGUMENTS + 8, scratch)
    lend(board, ARGUMENTS + 9, offsets)
    n = board[ARGUMENTS + 10 :]
    n[0], n[1], n[2], n[3], n[4], n[5], n[6] = heads, shared, width, cache_at, block, count, chunks
    n[7], n[8] = offsets.shape[1], window
    run(board, job, chunks, threads)
