"""Which worker owns an expert: the same everywhere, in proportion, and moved as little as possible."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from sterna.workers.ownership import owner, owners

KEYS = [(layer, expert) for layer in range(100) for expert in range(100)]


def shares(weights: list[float]) -> dict[tuple[int, int], int]:
    return {key: owner(*key, weights) for key in KEYS}


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0], [1.0] * 7, [1.0, 2.0], [4.0, 1.0, 3.0], [0.001, 0.002], [1e6, 1e6, 2e6]]
)
def test_shares_are_in_proportion_to_the_weights(weights: list[float]) -> None:
    counted = Counter(shares(weights).values())
    for index, weight in enumerate(weights):
        share = weight / sum(weights)
        # Six standard deviations of a binomial draw.
        assert abs(counted[index] - len(KEYS) * share) <= 6 * (len(KEYS) * share * (1 - share)) ** 0.5


def test_a_worker_that_is_added_takes_its_share_and_nothing_else_moves() -> None:
    before, after = shares([1.0, 1.0, 1.0]), shares([1.0, 1.0, 1.0, 1.0])
    moved = {key for key in KEYS if before[key] != after[key]}
    assert {after[key] for key in moved} == {3}
    assert abs(len(moved) - len(KEYS) / 4) < 6 * (len(KEYS) * 3 / 16) ** 0.5


def test_a_worker_that_leaves_from_the_end_gives_only_its_own_away() -> None:
    before, after = shares([2.0, 1.0, 1.0]), shares([2.0, 1.0])
    assert all(before[key] == after[key] for key in KEYS if before[key] != 2)


def test_a_heavier_worker_only_gains() -> None:
    before, after = shares([1.0, 1.0, 1.0]), shares([1.0, 2.0, 1.0])
    assert all(after[key] == 1 for key in KEYS if before[key] != after[key])
    assert any(before[key] != after[key] for key in KEYS)


def test_only_the_ratio_of_weights_counts() -> None:
    assert shares([1.0, 3.0]) == shares([0.5, 1.5])


def test_layers_are_spread_independently() -> None:
    """The experts of one layer must not all lie with one worker."""
    of_layer = Counter(owner(5, expert, [1.0, 1.0]) for expert in range(64))
    assert min(of_layer[0], of_layer[1]) > 10
    patterns = {tuple(owner(layer, expert, [1.0, 1.0]) for expert in range(16)) for layer in range(50)}
    assert len(patterns) > 45


def test_owners_lists_every_expert() -> None:
    found = owners(range(1, 6), 16, [1.0, 1.0])
    assert list(found) == [(layer, expert) for layer in range(1, 6) for expert in range(16)]
    assert all(worker == owner(*key, [1.0, 1.0]) for key, worker in found.items())


def test_every_process_computes_the_same_owner() -> None:
    """Python's own hash is salted per process: these must not depend on it."""
    code = (
        "from sterna.workers.ownership import owner;print([owner(3, e, [1.0, 2.0, 1.5]) for e in range(64)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert outputs == {str([owner(3, e, [1.0, 2.0, 1.5]) for e in range(64)])}


def test_owners_are_those_of_the_first_release() -> None:
    """A change moves experts between workers of one cluster that run different versions."""
    found = "".join(str(owner(7, expert, [1.0, 1.0, 2.0])) for expert in range(48))
    assert found == "011120022020002222220022211012112022210222200212"
