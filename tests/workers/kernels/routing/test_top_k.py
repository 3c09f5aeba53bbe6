"""Grouping of tokens by expert, scattering and reducing their outputs. Selection: see the router."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.workers.kernels.routing.top_k import all_below, combine, group_by_expert, scatter_pairs

from .... import oracles
from ..packed import same_bits


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    experts=st.integers(1, 70), k=st.integers(1, 6), count=st.integers(0, 60), seed=st.integers(0, 2**32 - 1)
)
def test_pairs_are_sorted_by_expert_and_stable(experts: int, k: int, count: int, seed: int) -> None:
    selected = np.random.default_rng(seed).integers(0, experts, (count + 2, k)).astype(np.int32)
    ends = np.full(experts + 1, -7, np.int32)
    tokens, ranks = np.full(count * k + 1, -7, np.int32), np.full(count * k + 1, -7, np.int32)
    group_by_expert(selected, count, ends, tokens, ranks)
    groups = oracles.group_by_expert(selected[:count].tolist())
    assert ends.tolist() == np.cumsum([0] + [len(groups.get(e, [])) for e in range(experts)]).tolist()
    pairs = [pair for group in groups.values() for pair in group]
    assert list(zip(tokens[:-1].tolist(), ranks[:-1].tolist(), strict=True)) == pairs
    assert (tokens[-1], ranks[-1]) == (-7, -7)


def test_outputs_go_to_their_token_and_rank() -> None:
    outputs = np.random.default_rng(1).standard_normal((3, 20)).astype(np.float32)
    tokens, ranks = np.array([9, 2, 0, 2, 9], np.int32), np.array([9, 1, 0, 0, 9], np.int32)
    y = np.full((3, 2, 20), np.float32(7.0))
    scatter_pairs(np.frombuffer(outputs.tobytes(), np.float32).reshape(3, 20), tokens, ranks, 1, 3, y)
    assert same_bits(np.stack((y[2, 1], y[0, 0], y[2, 0])), outputs)
    assert (y[[0, 1, 1], [1, 0, 1]] == 7.0).all()


@pytest.mark.parametrize(("ranks", "width"), [(1, 16), (2, 256), (4, 48), (8, 100)])
def test_outputs_are_summed_in_rank_order(ranks: int, width: int) -> None:
    rng = np.random.default_rng(ranks)
    x, shared = rng.standard_normal((2, 5, width)).astype(np.float32)
    y = rng.standard_normal((5, ranks, width)).astype(np.float32)
    weights = rng.random((5, ranks)).astype(np.float32)
    before = x.copy()
    combine(x, y, weights, shared, 4)
    assert same_bits(x[:4], oracles.combine(before[:4], y[:4], weights[:4], shared[:4]))
    assert same_bits(x[4], before[4])


@pytest.mark.parametrize(
    ("values", "limit", "inside"),
    [
        ([], 0, True),
        ([0, 3], 4, True),
        ([0, 4], 4, False),
        ([-1, 0], 4, False),
        ([0], 0, False),
        ([2**31 - 1], 2**31, True),
    ],
)
def test_bounds_are_checked(values: list[int], limit: int, inside: bool) -> None:
    assert all_below(np.frombuffer(np.array(values, np.int32).tobytes(), np.int32), limit) is inside
