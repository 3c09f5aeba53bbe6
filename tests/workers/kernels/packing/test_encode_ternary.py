"""Scales of ternary blocks against each rule written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.workers.checkpoint.held.encode import SCALE_RULES, Encoder
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME, ternary_codes

from . import encoding as twin

RULES = tuple(SCALE_RULES)


def fit(
    rule: str, values: twin.F32, weights: twin.F32 | None = None, name: str = "TQ2_0"
) -> tuple[twin.F64, twin.F64]:
    """Return codes -1..1 (blocks, 256) and scales (blocks,)."""
    file_type = TYPES_BY_NAME[name]
    out = np.zeros(file_type.nbytes(values.shape), np.uint8)
    Encoder().encode(values, file_type, out, weights, scales=rule)
    codes, scales = ternary_codes(file_type, out, values.shape)
    return codes.reshape(-1, 256).astype(np.float64) - 1, scales.reshape(-1).astype(np.float64)


def expected(rule: str, values: twin.F32, weights: twin.F32) -> tuple[twin.F64, twin.F64]:
    """ABSMEAN and LEAST_SQUARES as their definitions say, in float64."""
    blocks = values.reshape(-1, 256).astype(np.float64)
    wide = np.broadcast_to(weights, values.shape).reshape(-1, 256).astype(np.float64)
    gamma = (wide * np.abs(blocks)).sum(axis=1) / wide.sum(axis=1) + 1e-8
    codes = np.sign(blocks) * (np.abs(blocks) >= gamma[:, None] / 2)
    if rule == "absmean":
        return codes, gamma
    return codes, (wide * codes * blocks).sum(axis=1) / (wide * codes**2).sum(axis=1)


@pytest.mark.parametrize("rule", ["absmean", "least-squares"])
@pytest.mark.parametrize("weighted", [False, True])
def test_rules_with_a_formula(rule: str, weighted: bool) -> None:
    values = twin.rows("heavy", 16, 768)
    weights = np.random.default_rng(1).uniform(0.1, 30, 768).astype(np.float32)
    codes, scales = fit(rule, values, weights if weighted else None)
    wanted, best = expected(rule, values, weights if weighted else np.ones(768, np.float32))
    # A value that lies on the threshold but for rounding may fall on either side.
    assert (codes != wanted).sum() <= 1
    np.testing.assert_allclose(scales, best, rtol=2e-3)


def test_a_value_just_on_the_threshold_counts() -> None:
    """The rule's source rounds |x| / mean half away from zero; sums here are exact."""
    values = np.zeros((1, 256), np.float32)
    values[0, :128], values[0, 128:] = 1.5, 0.5  # the mean is 1, but for the 1e-8 that float32 drops
    codes, _ = fit("absmean", values)
    assert (codes == 1).all()
    values[0, 128:] = np.nextafter(np.float32(0.5), np.float32(0))
    codes, _ = fit("absmean", values)
    assert codes.sum() == 128


@pytest.mark.parametrize("distribution", ["gaussian", "heavy"])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_rule_loses_less_than_the_simpler_one(distribution: str, weighted: bool) -> None:
    values = twin.rows(distribution, 32, 1024)
    weights = np.random.default_rng(3).uniform(0.1, 10, 1024).astype(np.float32)
    wide = np.broadcast_to(weights if weighted else np.float32(1), values.shape).reshape(-1, 256)
    losses = []
    for rule in RULES:
        codes, scales = fit(rule, values, weights if weighted else None)
        losses.append(float((wide * (codes * scales[:, None] - values.reshape(-1, 256)) ** 2).sum()))
    print(
        f"{distribution}: "
        + ", ".join(f"{rule} {loss / losses[-1]:.3f}" for rule, loss in zip(RULES, losses, strict=True))
    )
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("rule", RULES)
def test_both_packings_hold_the_same(rule: str) -> None:
    values = twin.rows("gaussian", 5, 512)
    two, one = (fit(rule, values, name=name) for name in ("TQ2_0", "TQ1_0"))
    assert (two[0] == one[0]).all()
    assert (two[1] == one[1]).all()


def test_only_absmean_shrinks_what_is_ternary_already() -> None:
    values = np.zeros((1, 256), np.float32)
    values[0, ::2] = 0.25
    assert [fit(rule, values)[1][0] for rule in RULES] == [0.25, 0.25, 0.125]
