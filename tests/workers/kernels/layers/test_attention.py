"""Latent and grouped attention over a paged cache against float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from sterna.scheduler.decoder.crew import Crew
from sterna.workers.kernels.crew import job_address
from sterna.workers.kernels.layers.attention import (
    grouped_attention,
    grouped_chunk,
    latent_attention,
    latent_chunk,
)
from sterna.workers.kernels.scratch import attention_shapes

from .... import oracles
from ..packed import F32, same_bits

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
        scratch, offsets = attention_shapes(crew.threads, max(positions) + 1, RANK, WIDTH)
        latent_attention(
            crew.board, job_address(latent_chunk), q_latent, q.reshape(-1), HEAD - ROPE, HEADS * HEAD,
            HEAD, HEADS, RANK, WIDTH, np.float32(SCALE), self.memory, LAYER_AT, self.tables,
            np.array(streams, np.int32), np.array(positions, np.int32), BLOCK, count,
            np.full(scratch, np.nan, np.float32), np.full(offsets, -1, np.int64), out,
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


@dataclass
class Grouped:
    """Four streams whose rows are scattered over blocks; all else in the cache is NaN."""

    heads: int
    shared: int
    width: int
    positions: tuple[int, ...]
    window: int = 0
    sinks: F32 = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.heads)
        streams, blocks = len(self.positions), max(self.positions) // BLOCK + 1
        self.tables = rng.permutation(streams * blocks).astype(np.int32).reshape(streams, blocks)
        cells = np.full((streams * blocks, BLOCK, 2, self.shared, self.width), np.nan, np.float16)
        self.rows = [
            rng.standard_normal((p + 1, 2, self.shared, self.width)).astype(np.float16)
            for p in self.positions
        ]
        for table, mine in zip(self.tables, self.rows, strict=True):
            for position in range(self.first(len(mine) - 1), len(mine)):
                cells[table[position // BLOCK], position % BLOCK] = mine[position]
        self.memory = np.concatenate((np.full(LAYER_AT, 0xFF, np.uint8), cells.view(np.uint8).reshape(-1)))
        self.q = rng.standard_normal((streams, self.heads * self.width)).astype(np.float32)

    def first(self, position: int) -> int:
        return max(0, position - self.window + 1) if self.window else 0

    def attend(self, streams: list[int], threads: int = 1) -> F32:
        """Run the kernel for the last position of each of `streams`."""
        count = len(streams)
        out = np.full((count + 1, self.heads * self.width), np.float32(7.0))
        crew = Crew(threads, least_work=0)
        longest = max(self.positions) + 1
        context = min(longest, self.window or longest)
        scratch, offsets = attention_shapes(threads, context, self.width, self.width)
        try:
            grouped_attention(
                crew.board, job_address(grouped_chunk), self.q[streams], self.heads, self.shared, self.width,
                np.float32(SCALE), self.window, self.sinks, self.memory, LAYER_AT, self.tables,
                np.array(streams, np.int32), np.array(self.positions, np.int32)[streams], BLOCK, count,
                np.full(scratch, np.nan, np.float32), np.full(offsets, -1, np.int64), out,
            )  # fmt: skip
        finally:
            crew.close()
        assert (out[count] == 7.0).all()
        return out[:count]

    def check(self, found: F32) -> None:
        """Compare with float64."""
        for t, mine in enumerate(self.rows):
            seen = mine[self.first(len(mine) - 1) :]
            q = self.q[t].reshape(self.heads, self.width)
            true = oracles.grouped_attention(q, seen[:, 0], seen[:, 1], SCALE, self.sinks)
            off = np.abs(found[t] - true.reshape(-1))
            # A float32 score near the middle between two float16 weights may round to the other one.
            assert off.max() < 2e-3
            assert off.mean() < 2e-5


SHAPES = [(1, 1, 32), (4, 4, 16), (6, 2, 128), (12, 2, 64), (16, 1, 32), (4, 2, 80), (14, 2, 64), (7, 7, 32)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("heads", "shared", "width"), SHAPES)
def test_grouped_queries_agree_with_float64(heads: int, shared: int, width: int, threads: int) -> None:
    """Each key and value serves heads / shared queries; positions beyond a token's own are NaN."""
    made = Grouped(heads, shared, width, (44, 0, 16, 31))
    made.check(made.attend([0, 1, 2, 3], threads))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 32, 45, 46])
def test_a_window_sees_its_positions_and_no_more(window: int, sinks: bool) -> None:
    """Positions before the window are NaN, as are those behind the token; a window begins anywhere."""
    extra = np.linspace(-4, 4, 8, dtype=np.float32) if sinks else np.zeros(0, np.float32)
    made = Grouped(8, 2, 32, (44, 0, 45, 15, 16, 31, 46), window, extra)
    made.check(made.attend(list(range(7))))


def test_grouped_bits_do_not_depend_on_batch_or_threads() -> None:
    made = Grouped(14, 2, 64, (44, 3, 150, 31, 32), 40, np.linspace(-2, 2, 14, dtype=np.float32))
    together = made.attend(list(range(5)))
    for threads in (2, 3, 7):
        assert same_bits(made.attend(list(range(5)), threads), together)
    for stream in range(5):
        assert same_bits(made.attend([stream])[0], together[stream])


@pytest.mark.parametrize("width", [16, 80, 128])
@pytest.mark.parametrize("shared", [4, 2])
def test_heads_with_keys_of_their_own_give_the_bits_of_shared_ones(shared: int, width: int) -> None:
    """One or two heads of a key are computed one by one, four together: the result does not show it."""
    rng, length = np.random.default_rng(width), 75
    one = Grouped(4, 1, width, (length - 1,))
    each = Grouped(4, shared, width, (length - 1,))
    cells = each.memory[LAYER_AT:].view(np.float16).reshape(-1, BLOCK, 2, shared, width)
    lone = one.memory[LAYER_AT:].view(np.float16).reshape(-1, BLOCK, 2, 1, width)
    rows = rng.standard_normal((len(lone), BLOCK, 2, 1, width)).astype(np.float16)
    each.tables[:] = one.tables
    lone[:], cells[:] = rows, rows
    each.q[:] = one.q
    assert same_bits(each.attend([0]), one.attend([0]))


def test_a_window_as_long_as_the_context_is_none() -> None:
    bounded, free = (Grouped(8, 2, 32, (44, 0, 130), window) for window in (131, 0))
    assert same_bits(bounded.attend([0, 1, 2]), free.attend([0, 1, 2]))


@pytest.mark.parametrize(("sink", "share"), [(-1e30, 1.0), (np.log(64.0), 0.5), (500.0, 0.0)])
def test_a_sink_takes_its_share(sink: float, share: float) -> None:
    """64 equal scores of 0: the sink's weight is exp(sink) / (64 + exp(sink))."""
    made = Grouped(4, 4, 16, (63,), 0, np.full(4, sink, np.float32))
    made.memory[LAYER_AT:].view(np.float16)[:] = 1.0
    made.q[:] = 0.0
    np.testing.assert_allclose(made.attend([0]), share, rtol=1e-3, atol=0)


def test_a_nan_sink_surfaces_in_its_head() -> None:
    sinks = np.zeros(4, np.float32)
    sinks[2] = np.nan
    found = Grouped(4, 4, 16, (20,), 0, sinks).attend([0]).reshape(4, 16)
    assert np.isnan(found[2]).all()
    assert np.isfinite(found[[0, 1, 3]]).all()


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
