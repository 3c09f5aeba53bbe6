"""Stream memory: its sizes and arrays, and the pool of cache blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sterna.scheduler.kv import RECORD, BlockPool, StreamMemory, StreamShape

SHAPE = StreamShape(layers=3, width=48, streams=4, context=100, block_size=16)


def test_sizes() -> None:
    assert SHAPE.blocks_per_stream == 7
    assert SHAPE.num_blocks == 28
    assert SHAPE.layer_nbytes == 28 * 16 * 48 * 2
    exact = StreamShape(layers=1, width=16, streams=1, context=32)
    assert (exact.blocks_per_stream, exact.block_size) == (2, 16)
    assert StreamShape(layers=1, width=16, streams=1, context=33).blocks_per_stream == 3


def test_glm_needs_what_the_specification_says() -> None:
    """54,144 bytes per token: 576 float16 values in each of 47 layers."""
    shape = StreamShape(layers=47, width=576, streams=1, context=4096)
    assert shape.layers * shape.layer_nbytes == 54_144 * 4096


def test_arrays_have_their_shapes_and_lie_apart() -> None:
    layout = SHAPE.layout()
    memory = np.zeros(layout.nbytes, np.uint8)
    streams = StreamMemory(SHAPE, memory)
    assert streams.records.shape == (4,)
    assert streams.records.dtype == RECORD
    assert (streams.tables.shape, streams.tables.dtype) == ((4, 7), np.int32)
    assert (streams.tokens.shape, streams.tokens.dtype) == ((4, 100), np.int32)
    assert (streams.kv.shape, streams.kv.dtype) == ((3 * SHAPE.layer_nbytes,), np.uint8)
    streams.tables[:] = -1
    streams.tokens[:] = -2
    streams.kv[:] = 3
    streams.records["committed"] = 5
    assert (streams.tables == -1).all()
    assert (streams.tokens == -2).all()
    assert (streams.kv == 3).all()
    assert (streams.records["committed"] == 5).all()
    assert (streams.records["active"] == 0).all()


def test_both_sides_see_the_same() -> None:
    memory = np.zeros(SHAPE.layout().nbytes, np.uint8)
    daemon, scheduler = StreamMemory(SHAPE, memory), StreamMemory(SHAPE, memory)
    daemon.tokens[2, :5] = [1, 2, 3, 4, 5]
    scheduler.tables[3, 6] = 27
    scheduler.kv[-1] = 9
    assert scheduler.tokens[2, 4] == 5
    assert daemon.tables[3, 6] == 27
    assert daemon.kv[-1] == 9


def test_a_record_is_one_cache_line() -> None:
    assert RECORD.itemsize == 64


def test_the_lowest_free_blocks_are_given_first() -> None:
    pool = BlockPool(6)
    assert pool.grow(0, 2) == [0, 1]
    assert pool.grow(1, 1) == [2]
    assert pool.grow(0, 3) == [3]
    assert pool.grow(0, 3) == []
    assert pool.grow(0, 1) == []
    pool.release(0)
    assert pool.num_free == 5
    assert pool.grow(2, 2) == [0, 1]
    assert pool.held(2) == [0, 1]


def test_blocks_keep_the_order_of_positions() -> None:
    pool = BlockPool(6)
    pool.grow(0, 1)
    pool.grow(1, 2)
    pool.release(0)
    assert pool.grow(1, 4) == [0, 3]
    assert pool.held(1) == [1, 2, 0, 3]


def test_adopted_blocks_are_no_longer_free() -> None:
    pool = BlockPool(6)
    pool.adopt(3, [4, 1])
    assert pool.num_free == 4
    assert pool.grow(0, 3) == [0, 2, 3]
    assert pool.grow(3, 3) == [5]
    assert pool.held(3) == [4, 1, 5]
    pool.release(3)
    assert pool.grow(9, 3) == [1, 4, 5]


def test_releasing_what_holds_nothing_changes_nothing() -> None:
    pool = BlockPool(3)
    pool.release(7)
    assert pool.num_free == 3
    assert pool.held(7) == []


class Pool(RuleBasedStateMachine):
    """Random use of a pool that is large enough; the twin is a set of free blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(40)
        self.twin: dict[int, list[int]] = {}

    @rule(stream=st.integers(0, 4), blocks=st.integers(0, 8))
    def grow(self, stream: int, blocks: int) -> None:
        mine = self.twin.setdefault(stream, [])
        free = sorted(set(range(40)) - {b for held in self.twin.values() for b in held})
        expected = free[: max(0, blocks - len(mine))]
        assert self.pool.grow(stream, blocks) == expected
        mine.extend(expected)

    @rule(stream=st.integers(0, 4))
    def release(self, stream: int) -> None:
        self.pool.release(stream)
        self.twin.pop(stream, None)

    @rule(stream=st.integers(0, 4), data=st.data())
    def adopt(self, stream: int, data: st.DataObject) -> None:
        self.release(stream)
        free = sorted(set(range(40)) - {b for held in self.twin.values() for b in held})
        taken = data.draw(st.lists(st.sampled_from(free), unique=True, max_size=8))
        self.pool.adopt(stream, taken)
        self.twin[stream] = list(taken)

    @invariant()
    def every_block_is_free_or_held_once(self) -> None:
        held = [b for stream in range(5) for b in self.pool.held(stream)]
        assert len(held) == len(set(held))
        assert self.pool.num_free + len(held) == 40
        assert all(self.pool.held(stream) == mine for stream, mine in self.twin.items())


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


@pytest.mark.parametrize("blocks", [1, 28])
def test_a_pool_gives_exactly_what_it_has(blocks: int) -> None:
    pool = BlockPool(blocks)
    assert pool.grow(0, blocks) == list(range(blocks))
    assert pool.num_free == 0
