"""The state machine, rule by rule; random runs are in test_state_fuzz."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec

from sterna.scheduler import state as st
from sterna.scheduler.messages import Sampling, Submit

BLOCK_SIZE = 16
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def make(
    *,
    workers: Sequence[int] = (0,),
    tokens: int = 32,
    blocks: int = 64,
    joined: bool = True,
    held: dict[int, tuple[int, ...]] | None = None,
) -> st.SchedulerState:
    state = st.SchedulerState(
        num_blocks=blocks, block_size=BLOCK_SIZE, max_batch_tokens=tokens, workers=workers, held=held
    )
    if joined:
        for worker in workers:
            assert handle(state, st.WorkerJoined(worker=worker)) == []
    return state


def submitted(
    stream: int, prompt: int, *, serial: int = 1, committed: int | None = None, computed: int = 0,
    max_length: int = 1000, stop: Sequence[int] = (),
) -> st.Submitted:  # fmt: skip
    request = Submit(
        stream=stream, serial=serial, prompt_length=prompt, committed=committed or prompt, computed=computed,
        max_length=max_length, sampling=GREEDY, stop_ids=list(stop), logprobs=None, prompt_logprobs=False,
    )  # fmt: skip
    return st.Submitted(request=request)


def handle(state: st.SchedulerState, event: st.Event) -> list[st.Instruction]:
    instructions = state.handle(event)
    state.validate()
    return instructions


def step(instructions: Sequence[st.Instruction]) -> tuple[st.Segment, ...]:
    """Return the segments of the one step among `instructions`."""
    (run,) = (each for each in instructions if isinstance(each, st.RunStep))
    return run.segments


def brief(segments: Sequence[st.Segment]) -> list[tuple[int, int, int, bool]]:
    return [(s.stream, s.start, s.count, s.sample) for s in segments]


def done(state: st.SchedulerState, **sampled: int) -> list[st.Instruction]:
    """End the step; `s3=7` says that stream 3 sampled token 7."""
    return handle(state, st.StepDone(sampled={int(name[1:]): token for name, token in sampled.items()}))


def lost(state: st.SchedulerState) -> list[st.Instruction]:
    return handle(state, st.StepFailed(code="worker_lost", text="worker 0 died"))


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


def test_work_leaves_out_what_was_cancelled() -> None:
    state = make()
    (*_, run) = handle(state, submitted(0, 4))
    assert isinstance(run, st.RunStep)
    (work,) = state.work(run.segments)
    assert (work.segment, work.request.stream) == (run.segments[0], 0)
    handle(state, st.CancelAsked(stream=0, serial=1))
    assert state.work(run.segments) == []


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
