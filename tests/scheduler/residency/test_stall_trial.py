"""StallTrial: prefetching stays on only where it makes the wait shorter."""

from __future__ import annotations

from sterna.scheduler.residency.stall_trial import PHASE, StallTrial


def run(trial: StallTrial, events: int, without_ns: int, with_ns: int, waited_ns: int) -> tuple[int, int]:
    """Return the events in which prefetching was allowed, and the wait at the end."""
    allowed = 0
    for _ in range(events):
        on = trial.allowed
        allowed += on
        waited_ns += with_ns if on else without_ns
        trial.event(waited_ns)
    return allowed, waited_ns


def test_it_stays_on_where_it_helps() -> None:
    trial = StallTrial()
    allowed, _ = run(trial, 40 * PHASE, without_ns=100, with_ns=60, waited_ns=0)
    assert allowed > 0.8 * 40 * PHASE


def test_it_stays_off_where_it_does_not() -> None:
    for with_ns in (100, 140):
        trial = StallTrial()
        allowed, _ = run(trial, 100 * PHASE, without_ns=100, with_ns=with_ns, waited_ns=0)
        assert 0 < allowed < 0.15 * 100 * PHASE


def test_it_notices_when_that_changes() -> None:
    trial = StallTrial()
    _, waited_ns = run(trial, 10 * PHASE, without_ns=100, with_ns=140, waited_ns=0)
    allowed, _ = run(trial, 100 * PHASE, without_ns=100, with_ns=50, waited_ns=waited_ns)
    assert allowed > 0.5 * 100 * PHASE
