"""Random events against a twin of the state machine's promises; every stream must come to an end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sterna.scheduler import state as machine
from sterna.scheduler.messages import Sampling, Submit
from sterna.scheduler.state import MAX_FAILED_STEPS, SchedulerState

STREAMS, CONTEXT, BLOCK_SIZE, STOP = 5, 60, 8, 3
PER_STREAM = -(-CONTEXT // BLOCK_SIZE)
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


@dataclass
class Twin:
    """What is known of a stream from the events alone."""

    serial: int
    known: int
    computed: int
    max_length: int


class Fuzz(RuleBasedStateMachine):
    """Plays daemon and engine at random."""

    workers: frozenset[int] = frozenset()  # none before `start`

    @initialize(tokens=st.integers(1, 40), workers=st.integers(1, 3))
    def start(self, tokens: int, workers: int) -> None:
        self.tokens = tokens
        self.workers = frozenset(range(workers))
        self.present: set[int] = set()
        self.state = SchedulerState(
            num_blocks=PER_STREAM * STREAMS,
            block_size=BLOCK_SIZE,
            max_batch_tokens=tokens,
            workers=range(workers),
        )
        self.live: dict[int, Twin] = {}
        self.granted: dict[int, list[int]] = {}
        self.running: tuple[machine.Segment, ...] = ()
        self.serial = 0
        self.losses = 0
        for worker in range(workers):
            self.join(worker)

    # ---- what the machine says ----

    def feed(self, event: machine.Event) -> list[machine.Instruction]:
        instructions = self.state.handle(event)
        self.state.validate()
        for instruction in instructions:
            match instruction:
                case machine.GrantBlocks(stream=stream, first=first, blocks=blocks):
                    held = self.granted.setdefault(stream, [])
                    assert first == len(held)
                    held.extend(blocks)
                case machine.RunStep(segments=segments):
                    self.check_step(segments)
                    self.running = segments
                case machine.Finish(stream=stream, serial=serial, reason=reason):
                    twin = self.live.pop(stream)
                    assert twin.serial == serial
                    assert reason in ("stop", "length")
                    self.granted.pop(stream, None)
                case machine.Fail(streams=streams):
                    for stream, serial in streams:
                        if stream in self.live and self.live[stream].serial == serial:
                            del self.live[stream]
                            self.granted.pop(stream, None)
        return instructions

    def check_step(self, segments: Sequence[machine.Segment]) -> None:
        assert not self.running, "a step was planned while one runs"
        assert self.present == self.workers, "a step was planned without all workers"
        assert 0 < sum(s.count for s in segments) <= self.tokens
        assert len({s.stream for s in segments}) == len(segments)
        for s in segments:
            twin = self.live[s.stream]
            assert s.serial == twin.serial
            assert s.start == twin.computed
            assert s.count > 0
            assert s.start + s.count <= twin.known
            assert s.sample == (s.start + s.count == twin.known)
            assert len(self.granted[s.stream]) * BLOCK_SIZE >= s.start + s.count
            assert self.granted[s.stream] == self.state.blocks.held(s.stream)
        waiting = [n for n, t in self.live.items() if t.known - t.computed == 1 < t.known]
        if len(waiting) <= self.tokens:
            assert set(waiting) <= {s.stream for s in segments}, "an answer was stalled by a prompt"

    # ---- what happens ----

    @rule(stream=st.integers(0, STREAMS - 1), prompt=st.integers(1, CONTEXT - 1), answer=st.integers(1, 12))
    def submit(self, stream: int, prompt: int, answer: int) -> None:
        self.serial += 1
        limit = min(prompt + answer, CONTEXT)
        request = Submit(
            stream=stream, serial=self.serial, prompt_length=prompt, committed=prompt, computed=0,
            max_length=limit, sampling=GREEDY, stop_ids=[STOP], logprobs=None, prompt_logprobs=False,
        )  # fmt: skip
        self.granted.pop(stream, None)
        self.live[stream] = Twin(self.serial, prompt, 0, limit)
        instructions = self.feed(machine.Submitted(request=request))
        assert not [i for i in instructions if isinstance(i, machine.Fail)]

    @rule(stream=st.integers(0, STREAMS - 1), stale=st.booleans())
    def cancel(self, stream: int, stale: bool) -> None:
        serial = self.live[stream].serial if stream in self.live else 0
        if not stale:
            self.live.pop(stream, None)
            self.granted.pop(stream, None)
        assert self.feed(machine.CancelAsked(stream=stream, serial=serial - stale)) == []

    @precondition(lambda self: self.running)
    @rule(token=st.integers(0, STOP))
    def end_step(self, token: int) -> None:
        segments, self.running, self.losses = self.running, (), 0
        expected = {}
        for s in segments:
            twin = self.live.get(s.stream)
            if twin is None or twin.serial != s.serial:
                continue
            twin.computed += s.count
            if s.sample:
                twin.known += 1
                if token == STOP or twin.known == twin.max_length:
                    expected[s.stream] = "stop" if token == STOP else "length"
        sampled = {s.stream: token for s in segments if s.sample}
        instructions = self.feed(machine.StepDone(sampled=sampled))
        assert {i.stream: i.reason for i in instructions if isinstance(i, machine.Finish)} == expected

    @precondition(lambda self: self.running)
    @rule(
        code=st.sampled_from(["worker_lost", "worker_lost", "internal", "model_read"]),
        streams=st.frozensets(st.integers(0, STREAMS - 1), min_size=1),
    )
    def fail_step(self, code: str, streams: frozenset[int]) -> None:
        segments, self.running = self.running, ()
        self.losses += 1
        only = streams if code == "model_read" else None
        hit = {(s.stream, s.serial) for s in segments if only is None or s.stream in only}
        hit &= {(stream, twin.serial) for stream, twin in self.live.items()}
        instructions = self.feed(machine.StepFailed(code=code, text="x", streams=only))
        failed = {key for i in instructions if isinstance(i, machine.Fail) for key in i.streams}
        given_up = code != "worker_lost" or self.losses == MAX_FAILED_STEPS
        assert failed == (hit if given_up else set())
        if given_up:
            self.losses = 0

    @rule(worker=st.integers(0, 2))
    def lose(self, worker: int) -> None:
        if worker in self.workers:
            self.present.discard(worker)
            assert self.feed(machine.WorkerLeft(worker=worker)) == []

    @rule(worker=st.integers(0, 2))
    def join(self, worker: int) -> None:
        if worker in self.workers:
            self.present.add(worker)
            self.feed(machine.WorkerJoined(worker=worker))

    # ---- what always holds ----

    @invariant()
    def blocks_are_neither_lost_nor_doubled(self) -> None:
        held = sum(len(self.state.blocks.held(stream)) for stream in range(STREAMS))
        assert self.state.blocks.num_free + held == PER_STREAM * STREAMS
        assert self.state.num_streams == len(self.live)
        assert self.state.busy == bool(self.running)

    @invariant()
    def nobody_waits_without_a_reason(self) -> None:
        if self.present == self.workers and not self.running:
            assert not self.live, "streams wait, all workers are there, and no step runs"

    def teardown(self) -> None:
        """With all workers there and steps that work, every stream ends in a bounded number of them."""
        if not self.workers:
            return
        for worker in self.workers:
            self.join(worker)
        left = sum(CONTEXT - twin.computed for twin in self.live.values())
        for _ in range(left + 1):
            if self.running:
                self.end_step(0)
        assert not self.live
        assert not self.running
        assert self.state.blocks.num_free == PER_STREAM * STREAMS


TestFuzz = Fuzz.TestCase
TestFuzz.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, derandomize=True)
