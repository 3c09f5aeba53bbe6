"""Latent attention over a paged cache against float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from sterna.scheduler.crew import Crew
from sterna.workers.kernels.attention import (
    grouped_attention,
    grouped_chunk,
    latent_attention,
    latent_chunk,
    scratch_shapes,
)
from sterna.workers.kernels.crew import job_address

from ... import oracles
from .packed import F32, same_bits

HEADS, RANK, ROPE, BLOCK, LAYER_AT = 3, 64, 16, 16, 128
WIDTH, HEAD = RANK + ROPE, 48  # a head's query: 32 values that are none of the kernel's business, then ROPE
SCALE = 0.2
ALONE = Crew(1)


@dataclass
class Cache:
    """Streams whose positions are scattered over blocks, and the same rows in order."""

    memory: npt.NDArray[np.uint8]
    tables: npt.NDArray[np.int32]
    rows: list[npt.NDArray[np.float16]]

    @classmethod
    def scattered(cls, lengths: list[int], seed: int) -> Cache:
        rng = np.random.default_rng(seed)
        per_stream = -(-max(lengths) // BLOCK)
        blocks = rng.permutation(per_stream * len(lengths) + 3).astype(np.int32)
        tables = blocks[: per_stream * len(lengths)].reshape(len(lengths), per_stream)
        cells = np.full((len(blocks), BLOCK, WIDTH), np.nan, np.float16)  # what nobody may read
        rows = [rng.standard_normal((length, WIDTH)).astype(np.float16) for length in lengths]
        for table, mine in zip(tables, rows, strict=True):
            for position, row in enumerate(mine):
                cells[table[position // BLOCK], position % BLOCK] = row
        memory = np.concatenate((np.full(LAYER_AT, 0xFF, np.uint8), cells.view(np.uint8).reshape(-1)))
        return cls(memory, tables, rows)

    def attend(
        self, q_latent: F32, q: F32, streams: list[int], positions: list[int], crew: Crew = ALONE
    ) -> F32:
        """Run the kernel for rows of q_latent (T, HEADS * RANK) and q (T, HEADS * HEAD)."""
        count = len(streams)
        out = np.full((count + 1, HEADS * RANK), np.float32(7.0))
        scratch, places = scratch_shapes(crew.threads, max(positions) + 1, RANK, WIDTH)
        latent_attention(
            crew.board, job_address(latent_chunk), q_latent, q.reshape(-1), HEAD - ROPE, HEADS * HEAD,
            HEAD, HEADS, RANK, WIDTH, np.float32(SCALE), self.memory, LAYER_AT, self.tables,
            np.array(streams, np.int32), np.array(positions, np.int32), BLOCK, count,
            np.full(scratch, np.nan, np.float32), np.full(places, -1, np.int64), out,
        )  # fmt: skip
        assert (out[count] == 7.0).all()
        return out[:count]


def queries(count: int, seed: int) -> tuple[F32, F32]:
    rng = np.random.default_rng(seed)
    q_latent = rng.standard_normal((count, HEADS * RANK)).astype(np.float32)
    return q_latent, rng.standard_normal((count, HEADS * HEAD)).astype(np.float32)


def expected(cache: Cache, q_latent: F32, q: F32, t: int, stream: int, position: int) -> oracles.F64:
    return oracles.latent_attention(
        q_latent[t].reshape(HEADS, RANK),
        q[t].reshape(HEADS, HEAD)[:, HEAD - ROPE :],
        cache.rows[stream][: position + 1],
        SCALE,
    ).reshape(-1)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 33, 100, 300])
def test_every_length_agrees_with_float64(length: int) -> None:
    cache = Cache.scattered([length, length], length)
    q_latent, q = queries(2, length)
    found = cache.attend(q_latent, q, [1, 0], [length - 1, length - 1])
    for t, stream in enumerate((1, 0)):
        off = np.abs(found[t] - expected(cache, q_latent, q, t, stream, length - 1))
        # A float32 score near the middle between two float16 weights may round to the other one.
        assert off.max() < 2e-3
        assert off.mean() < 2e-5


def test_a_token_sees_its_own_stream_up_to_its_own_position() -> None:
    """Whatever lies behind a position, or belongs to somebody else, is NaN in this cache."""
    cache = Cache.scattered([40, 23, 60], 5)
    streams, positions = [0, 0, 2, 1, 2], [0, 39, 59, 22, 17]
    q_latent, q = queries(5, 6)
    found = cache.attend(q_latent, q, streams, positions)
    for t, (stream, position) in enumerate(zip(streams, positions, strict=True)):
        np.testing.assert_allclose(
            found[t], expected(cache, q_latent, q, t, stream, position), atol=2e-3, rtol=0
        )


def test_bits_do_not_depend_on_the_batch_or_on_where_blocks_lie() -> None:
    cache = Cache.scattered([70, 41], 7)
    q_latent, q = queries(6, 8)
    streams, positions = [0, 1, 0, 1, 0, 0], [69, 40, 3, 12, 33, 16]
    together = cache.attend(q_latent, q, streams, positions)
    elsewhere = Cache.scattered([70, 41], 99)
    elsewhere.rows = cache.rows
    cells = elsewhere.memory[LAYER_AT:].view(np.float16).reshape(-1, BLOCK, WIDTH)
    for table, mine in zip(elsewhere.tables, cache.rows, strict=True):
        for position, row in enumerate(mine):
            cells[table[position // BLOCK], position % BLOCK] = row
    for t in range(6):
        one = slice(t, t + 1)
        alone = elsewhere.attend(q_latent[one], q[one], streams[one], positions[one])
        assert same_bits(alone[0], together[t])


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    cache = Cache.scattered([70, 41], 7)
    q_latent, q = queries(6, 8)
    streams, positions = [0, 1, 0, 1, 0, 0], [69, 40, 3, 12, 33, 16]
    crew = Crew(threads, least_work=0)
    try:
        shared = cache.attend(q_latent, q, streams, positions, crew)
    finally:
        crew.close()
    assert same_bits(shared, cache.attend(q_latent, q, streams, positions))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (4, 4), (6, 2), (12, 2), (16, 1)])
def test_grouped_queries_agree_with_float64(heads: int, shared: int, threads: int) -> None:
    """Each key and value serves heads / shared queries; positions beyond a token's own are NaN."""
    width, positions = 32, [44, 0, 16, 31]
    rng = np.random.default_rng(heads)
    tables = rng.permutation(12).astype(np.int32).reshape(4, 3)
    cells = np.full((12, BLOCK, 2, shared, width), np.nan, np.float16)
    rows = [rng.standard_normal((p + 1, 2, shared, width)).astype(np.float16) for p in positions]
    for table, mine in zip(tables, rows, strict=True):
        for position, row in enumerate(mine):
            cells[table[position // BLOCK], position % BLOCK] = row
    memory = np.concatenate((np.full(LAYER_AT, 0xFF, np.uint8), cells.view(np.uint8).reshape(-1)))
    q = rng.standard_normal((4, heads * width)).astype(np.float32)
    out = np.full((5, heads * width), np.float32(7.0))
    crew = Crew(threads, least_work=0)
    scratch, places = scratch_shapes(threads, 48, width, width)
    try:
        grouped_attention(
            crew.board, job_address(grouped_chunk), q, heads, shared, width, np.float32(SCALE), memory,
            LAYER_AT, tables, np.arange(4, dtype=np.int32), np.array(positions, np.int32), BLOCK, 4,
            np.full(scratch, np.nan, np.float32), np.full(places, -1, np.int64), out,
        )  # fmt: skip
    finally:
        crew.close()
    assert (out[4] == 7.0).all()
    for t, mine in enumerate(rows):
        for h in range(heads):
            keys, values = (mine[:, part, h * shared // heads].astype(np.float64) for part in (0, 1))
            query = q[t, h * width : (h + 1) * width].astype(np.float16).astype(np.float64)
            weights = oracles.softmax(keys @ query * SCALE).astype(np.float16).astype(np.float64)
            off = np.abs(out[t, h * width : (h + 1) * width] - weights @ values)
            assert off.max() < 2e-3
            assert off.mean() < 2e-5


def test_equal_keys_are_averaged() -> None:
    cache = Cache.scattered([64], 9)
    cache.memory[LAYER_AT:].view(np.float16).reshape(-1, WIDTH)[:] = np.arange(WIDTH)
    q_latent, q = queries(1, 10)
    found = cache.attend(q_latent, q, [0], [63]).reshape(HEADS, RANK)
    assert (found == np.arange(RANK)).all()  # 64 weights of 1/64, exact in float16


def test_very_different_scores_neither_overflow_nor_vanish() -> None:
    cache = Cache.scattered([33], 11)
    cells = cache.memory[LAYER_AT:].view(np.float16).reshape(-1, BLOCK, WIDTH)
    cells[cache.tables[0]] = 0.0
    cells[cache.tables[0][1], 3, 0] = 1000.0
    q_latent, q = np.zeros((1, HEADS * RANK), np.float32), np.zeros((1, HEADS * HEAD), np.float32)
    q_latent[0, ::RANK] = 60000.0
    found = cache.attend(q_latent, q, [0], [32]).reshape(HEADS, RANK)
    assert (found[:, 0] == 1000.0).all()
    assert (found[:, 1:] == 0.0).all()
    q_latent[0, ::RANK] = -60000.0
    assert (cache.attend(q_latent, q, [0], [32]) == 0.0).all()


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_nan_in_the_cache_surfaces(where: str) -> None:
    cache = Cache.scattered([40, 40], 12)
    position = {"first": 0, "middle": 20, "last": 39}[where]
    cells = cache.memory[LAYER_AT:].view(np.float16).reshape(-1, BLOCK, WIDTH)
    cells[cache.tables[0][position // BLOCK], position % BLOCK, 5] = np.nan
    q_latent, q = queries(2, 13)
    found = cache.attend(q_latent, q, [0, 1], [39, 39])
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()
