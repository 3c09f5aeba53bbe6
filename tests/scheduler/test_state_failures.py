"""The state machine when something is lost: a step, a worker, an expert, the scheduler before it."""

from __future__ import annotations

import itertools

from sterna.scheduler import state as st

from .state_events import brief, done, handle, lost, make, step, submitted


def test_a_failed_step_is_repeated_when_a_worker_was_lost() -> None:
    state = make()
    planned = step(handle(state, submitted(0, 4)))
    assert step(lost(state)) == planned
    assert step(lost(state)) == planned
    assert brief(step(done(state, s0=1))) == [(0, 4, 1, True)]


def test_the_third_loss_in_a_row_ends_the_streams_of_that_step_only() -> None:
    state = make(tokens=8)
    handle(state, submitted(0, 8))
    handle(state, submitted(1, 5, serial=2))
    lost(state)
    lost(state)
    following = lost(state)
    assert following[0] == st.Fail(streams=((0, 1),), code="worker_lost", text="worker 0 died")
    assert step(following) == (st.Segment(stream=1, serial=2, start=0, count=5, sample=True),)


def test_a_step_that_worked_makes_earlier_losses_forgotten() -> None:
    state = make()
    handle(state, submitted(0, 4))
    for _ in range(4):
        lost(state)
        lost(state)
        done(state, s0=1)
    assert state.num_streams == 1


def test_after_streams_were_given_up_the_count_begins_anew() -> None:
    state = make()
    handle(state, submitted(0, 4))
    lost(state)
    lost(state)
    lost(state)
    assert brief(step(handle(state, submitted(1, 4)))) == [(1, 0, 4, True)]
    assert brief(step(lost(state))) == [(1, 0, 4, True)]
    assert state.num_streams == 1


def test_any_other_failure_ends_the_streams_at_once() -> None:
    state = make()
    handle(state, submitted(0, 4))
    handle(state, submitted(1, 4))
    following = handle(state, st.StepFailed(code="internal", text="not finite"))
    assert following[0] == st.Fail(streams=((0, 1),), code="internal", text="not finite")
    assert brief(step(following)) == [(1, 0, 4, True)]
    assert state.blocks.held(0) == []


def test_a_stream_cancelled_during_a_failing_step_is_not_failed_too() -> None:
    state = make(tokens=8)
    handle(state, submitted(9, 1))
    handle(state, submitted(0, 3))
    handle(state, submitted(1, 3))
    done(state, s9=1)
    handle(state, st.CancelAsked(stream=0, serial=1))
    following = handle(state, st.StepFailed(code="internal", text="x"))
    assert following == [st.Fail(streams=((9, 1), (1, 1)), code="internal", text="x")]


def test_a_failure_that_concerns_nobody_says_nothing() -> None:
    state = make()
    handle(state, submitted(0, 3))
    handle(state, st.CancelAsked(stream=0, serial=1))
    assert handle(state, st.StepFailed(code="internal", text="x")) == []


def test_no_step_without_all_workers() -> None:
    state = make(workers=(0, 1, 2), joined=False)
    assert handle(state, submitted(0, 4)) == []
    assert handle(state, st.WorkerJoined(worker=2)) == []
    assert handle(state, st.WorkerJoined(worker=0)) == []
    assert state.workers == [0, 2]
    assert brief(step(handle(state, st.WorkerJoined(worker=1)))) == [(0, 0, 4, True)]


def test_a_lost_worker_holds_the_next_step_until_its_successor_joins() -> None:
    state = make(workers=(0, 1))
    handle(state, submitted(0, 4))
    assert handle(state, st.WorkerLeft(worker=1)) == []
    assert lost(state) == []
    assert not state.busy
    assert handle(state, submitted(1, 2)) == []
    assert brief(step(handle(state, st.WorkerJoined(worker=1)))) == [(0, 0, 4, True), (1, 0, 2, True)]


def test_a_step_that_survives_the_loss_counts() -> None:
    """The answer of the dead worker may have arrived before."""
    state = make(workers=(0, 1))
    handle(state, submitted(0, 4))
    handle(state, st.WorkerLeft(worker=1))
    assert done(state, s0=1) == []
    assert brief(step(handle(state, st.WorkerJoined(worker=1)))) == [(0, 4, 1, True)]


def test_what_cannot_be_read_ends_only_who_needs_it() -> None:
    state = make()
    handle(state, submitted(0, 4))
    done(state, s0=1)
    handle(state, submitted(1, 4, serial=2))
    done(state, s0=1)  # both run now
    broken = st.StepFailed(code="model_read", text="for a test", streams=frozenset({1}))
    failure, *following = handle(state, broken)
    assert isinstance(failure, st.Fail)
    assert (failure.streams, failure.code, failure.text) == (((1, 2),), "model_read", "for a test")
    assert [segment.stream for segment in step(following)] == [0]


def test_a_failure_of_a_stream_that_was_cancelled_meanwhile_ends_nobody() -> None:
    state = make()
    handle(state, submitted(0, 4))
    done(state, s0=1)
    handle(state, submitted(1, 4, serial=2))
    done(state, s0=1)
    handle(state, st.CancelAsked(stream=1, serial=2))
    broken = st.StepFailed(code="model_read", text="for a test", streams=frozenset({1}))
    assert [segment.stream for segment in step(handle(state, broken))] == [0]


def test_a_stream_taken_over_goes_on_where_its_kv_ends() -> None:
    state = make(held={2: (5, 9)})
    following = handle(state, submitted(2, 20, serial=4, committed=30, computed=29))
    assert following == [
        st.RunStep(segments=(st.Segment(stream=2, serial=4, start=29, count=1, sample=True),))
    ]
    assert state.blocks.held(2) == [5, 9]
    done(state, s2=1)
    done(state, s2=1)
    assert state.blocks.held(2) == [5, 9]
    assert st.GrantBlocks(stream=2, first=2, blocks=(0,)) in done(state, s2=1)


def test_a_stream_taken_over_within_its_prompt_computes_the_rest() -> None:
    state = make(tokens=32, held={0: (1, 0)})
    following = handle(state, submitted(0, 100, computed=32))
    assert following[0] == st.GrantBlocks(stream=0, first=2, blocks=(2, 3))
    assert brief(step(following)) == [(0, 32, 32, False)]


TAKEN_OVER = {
    "a prompt nobody began": submitted(0, 20),
    "a prompt half computed": submitted(1, 100, computed=32),
    "an answer at the end of its block": submitted(2, 10, committed=17, computed=16),
    "an answer amid its block": submitted(3, 10, committed=20, computed=19),
}


HELD = {1: (4, 5), 2: (1,), 3: (0, 2)}


def test_streams_taken_over_keep_their_blocks_whoever_comes_first() -> None:
    """A successor hears of the streams one after the other; none may be given another's KV."""
    doubled = []
    for order in itertools.permutations(TAKEN_OVER):
        state = make(held=HELD)
        for name in order:
            state.handle(TAKEN_OVER[name])
        held = [block for event in TAKEN_OVER.values() for block in state.blocks.held(event.request.stream)]
        if len(held) != len(set(held)):
            doubled.append(order)
    assert doubled == []


def test_blocks_of_a_stream_that_nobody_wants_any_more_are_free_again() -> None:
    """Cancelled between two schedulers; its record is then used for a new request."""
    state = make(blocks=2, held={0: (0, 1)})
    assert st.GrantBlocks(stream=0, first=0, blocks=(0, 1)) in handle(state, submitted(0, 20, serial=7))
