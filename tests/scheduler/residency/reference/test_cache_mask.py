"""CacheMask: bits of any number of experts."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.scheduler.residency.reference.cache_mask import CacheMask


@pytest.mark.parametrize(("n", "ids"), [(64, [0, 31, 63]), (128, [0, 63, 64, 127])], ids=["R14", "R15"])
def test_pinned_counts(n: int, ids: list[int]) -> None:
    mask = CacheMask.of(n, ids)
    assert mask.count() == len(ids)
    assert mask.ids() == ids


@pytest.mark.parametrize("n", [0, 1, 7, 63, 64, 65, 300])
def test_behaves_as_a_set(n: int) -> None:
    rng = np.random.default_rng(n)
    mask, expected = CacheMask(n), set()
    words = mask.words
    for expert_id, resident in zip(rng.integers(-3, n + 3, 500).tolist(), rng.random(500) < 0.6, strict=True):
        mask.set(expert_id, bool(resident))
        if 0 <= expert_id < n:
            (expected.add if resident else expected.discard)(expert_id)
    assert mask.ids() == sorted(expected)
    assert [e for e in range(-70, n + 70) if mask.is_set(e)] == sorted(expected)
    other = CacheMask.of(n, range(n))
    other.replace_flags(mask.flags())
    assert other.words.tobytes() == words.tobytes()
    mask.clear()
    assert mask.count() == 0
    assert mask.words is words
