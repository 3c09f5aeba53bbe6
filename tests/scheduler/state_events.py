"""Events for the state machine's tests, and its instructions in short."""

from __future__ import annotations

from collections.abc import Sequence

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
