"""The state machine, rule by rule: what a step computes, and how streams end.

Losses and failures are in test_state_failures, random runs in test_state_fuzz.
"""

from __future__ import annotations

import msgspec

from sterna.scheduler import state as st

from .state_events import brief, done, handle, lost, make, step, submitted


def test_a_prompt_is_one_step_and_then_tokens_follow_one_by_one() -> None:
    state = make()
    first = handle(state, submitted(3, 20))
    assert first == [
        st.GrantBlocks(stream=3, first=0, blocks=(0, 1)),
        st.RunStep(segments=(st.Segment(stream=3, serial=1, start=0, count=20, sample=True),)),
    ]
    assert state.busy
    assert brief(step(done(state, s3=5))) == [(3, 20, 1, True)]
    assert brief(step(done(state, s3=6))) == [(3, 21, 1, True)]


def test_blocks_are_granted_when_a_position_needs_them() -> None:
    state = make()
    assert st.GrantBlocks(stream=0, first=0, blocks=(0,)) in handle(state, submitted(0, 15))
    assert not any(isinstance(i, st.GrantBlocks) for i in done(state, s0=1))  # position 15
    assert st.GrantBlocks(stream=0, first=1, blocks=(1,)) in done(state, s0=1)  # position 16


def test_a_long_prompt_comes_in_chunks_and_only_the_last_is_sampled() -> None:
    state = make(tokens=32)
    assert brief(step(handle(state, submitted(0, 70)))) == [(0, 0, 32, False)]
    assert brief(step(done(state))) == [(0, 32, 32, False)]
    assert brief(step(done(state))) == [(0, 64, 6, True)]
    assert brief(step(done(state, s0=9))) == [(0, 70, 1, True)]


def test_decoding_streams_come_before_prompts_that_arrived_earlier() -> None:
    state = make(tokens=32)
    handle(state, submitted(0, 100))
    handle(state, submitted(1, 4))
    assert brief(step(done(state))) == [(0, 32, 32, False)]
    assert brief(step(done(state))) == [(0, 64, 32, False)]
    assert brief(step(done(state))) == [(0, 96, 4, True), (1, 0, 4, True)]
    handle(state, submitted(2, 100))
    assert brief(step(done(state, s0=1, s1=1))) == [(0, 100, 1, True), (1, 4, 1, True), (2, 0, 30, False)]
    assert brief(step(done(state, s0=1, s1=1))) == [(0, 101, 1, True), (1, 5, 1, True), (2, 30, 30, False)]


def test_an_answer_taken_over_comes_before_a_prompt_that_was_there_first() -> None:
    state = make(tokens=32, held={1: (60, 61)})
    handle(state, submitted(0, 100))
    handle(state, submitted(1, 10, committed=20, computed=19))
    assert brief(step(done(state))) == [(1, 19, 1, True), (0, 32, 31, False)]


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    state = make(tokens=32)
    handle(state, submitted(9, 1))
    for stream, prompt in ((4, 10), (2, 10), (7, 30)):
        assert handle(state, submitted(stream, prompt)) == []
    assert brief(step(done(state, s9=1))) == [
        (9, 1, 1, True),
        (4, 0, 10, True),
        (2, 0, 10, True),
        (7, 0, 11, False),
    ]


def test_a_prompt_of_one_token_counts_as_a_prompt() -> None:
    state = make(tokens=1)
    handle(state, submitted(0, 1))
    assert handle(state, submitted(1, 1)) == []
    # Stream 0 decodes from now on and goes first whenever it can.
    assert brief(step(done(state, s0=3))) == [(0, 1, 1, True)]


def test_no_step_holds_more_tokens_than_allowed() -> None:
    state = make(tokens=3)
    for stream in range(5):
        handle(state, submitted(stream, 1))
    following = done(state, s0=1)
    for _ in range(6):
        segments = step(following)
        assert sum(s.count for s in segments) <= 3
        following = handle(state, st.StepDone(sampled={s.stream: 1 for s in segments if s.sample}))


def test_nothing_is_planned_while_a_step_runs() -> None:
    state = make()
    handle(state, submitted(0, 4))
    assert handle(state, submitted(1, 4)) == []
    assert handle(state, st.WorkerJoined(worker=0)) == []


def test_a_stop_id_ends_the_stream_and_frees_its_blocks() -> None:
    state = make()
    handle(state, submitted(0, 20, stop=(7, 8)))
    done(state, s0=6)
    assert done(state, s0=8) == [st.Finish(stream=0, serial=1, reason="stop")]
    assert state.num_streams == 0
    assert not state.busy
    assert state.blocks.num_free == 64


def test_the_length_limit_counts_prompt_and_answer() -> None:
    state = make()
    handle(state, submitted(0, 5, max_length=7, stop=(9,)))
    done(state, s0=1)
    assert done(state, s0=1) == [st.Finish(stream=0, serial=1, reason="length")]


def test_a_stop_id_at_the_limit_is_a_stop() -> None:
    state = make()
    handle(state, submitted(0, 5, max_length=6, stop=(9,)))
    assert done(state, s0=9) == [st.Finish(stream=0, serial=1, reason="stop")]


def test_one_stream_ends_and_the_others_go_on() -> None:
    state = make()
    handle(state, submitted(0, 2, stop=(9,)))
    handle(state, submitted(1, 3))
    following = done(state, s0=9)
    assert following[0] == st.Finish(stream=0, serial=1, reason="stop")
    assert brief(step(following)) == [(1, 0, 3, True)]


def test_cancelling_a_waiting_stream_forgets_it() -> None:
    state = make()
    handle(state, submitted(0, 4))
    handle(state, submitted(1, 4))
    assert handle(state, st.CancelAsked(stream=1, serial=1)) == []
    assert brief(step(done(state, s0=1))) == [(0, 4, 1, True)]


def test_cancelling_a_running_stream_discards_its_part_of_the_step() -> None:
    state = make()
    handle(state, submitted(0, 4))
    assert handle(state, st.CancelAsked(stream=0, serial=1)) == []
    assert state.num_streams == 0
    assert state.blocks.num_free == 64
    assert state.busy  # the step itself goes on
    assert done(state, s0=1) == []


def test_cancelling_names_a_submission_and_not_just_a_record() -> None:
    state = make()
    handle(state, submitted(0, 4, serial=5))
    handle(state, st.CancelAsked(stream=0, serial=4))
    handle(state, st.CancelAsked(stream=3, serial=5))
    assert brief(step(done(state, s0=1))) == [(0, 4, 1, True)]


def test_a_record_used_again_while_its_old_step_runs_starts_from_nothing() -> None:
    state = make()
    handle(state, submitted(0, 40, serial=1))
    handle(state, st.CancelAsked(stream=0, serial=1))
    assert handle(state, submitted(0, 6, serial=2)) == []
    following = done(state, s0=1)  # of serial 1
    assert step(following) == (st.Segment(stream=0, serial=2, start=0, count=6, sample=True),)


def test_work_leaves_out_what_was_cancelled() -> None:
    state = make()
    (*_, run) = handle(state, submitted(0, 4))
    assert isinstance(run, st.RunStep)
    (work,) = state.work(run.segments)
    assert (work.segment, work.request.stream) == (run.segments[0], 0)
    handle(state, st.CancelAsked(stream=0, serial=1))
    assert state.work(run.segments) == []


def test_a_resubmission_replaces_the_stream() -> None:
    state = make()
    handle(state, submitted(0, 40, serial=1))
    handle(state, submitted(0, 5, serial=2))
    assert state.num_streams == 1
    assert state.request(0).serial == 2
    assert brief(step(done(state, s0=3))) == [(0, 0, 5, True)]


def test_a_pooled_prompt_ends_when_it_is_computed_and_samples_nothing() -> None:
    state = make(tokens=20)
    plain = submitted(3, 30)
    pooled = st.Submitted(request=msgspec.structs.replace(plain.request, pooling="mean"))
    assert brief(step(handle(state, pooled))) == [(3, 0, 20, False)]
    handle(state, submitted(4, 5))
    # As after a lost worker: the same again, with the rest of the step for who came meanwhile.
    assert brief(step(lost(state))) == [(3, 0, 20, False)]
    after = done(state)
    assert brief(step(after)) == [(3, 20, 10, False), (4, 0, 5, True)]
    ended = done(state, s4=7)
    assert st.Finish(stream=3, serial=1, reason="stop") in ended
    assert brief(step(ended)) == [(4, 5, 1, True)]
