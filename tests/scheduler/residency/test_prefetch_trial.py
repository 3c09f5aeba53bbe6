"""PrefetchTrial: prefetching stays on only where it makes steps shorter."""

from __future__ import annotations

from sterna.scheduler.residency.prefetch_trial import PHASE, PrefetchTrial


def run(trial: PrefetchTrial, steps: int, without_ns: int, with_ns: int) -> int:
    """Return the number of steps in which prefetching was allowed."""
    allowed = 0
    for _ in range(steps):
        on = trial.allowed
        allowed += on
        trial.step(with_ns if on else without_ns)
    return allowed


def test_it_stays_on_where_it_helps() -> None:
    assert run(PrefetchTrial(), 40 * PHASE, without_ns=100, with_ns=60) > 0.8 * 40 * PHASE


def test_it_stays_off_where_it_does_not() -> None:
    for with_ns in (100, 140):
        assert 0 < run(PrefetchTrial(), 100 * PHASE, without_ns=100, with_ns=with_ns) < 0.15 * 100 * PHASE


def test_it_notices_when_that_changes() -> None:
    trial = PrefetchTrial()
    run(trial, 10 * PHASE, without_ns=100, with_ns=140)
    assert run(trial, 100 * PHASE, without_ns=100, with_ns=50) > 0.5 * 100 * PHASE
