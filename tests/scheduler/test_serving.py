"""The scheduler's work with workers that die and come back at any moment, and with experts that go bad.

Real model, memory, kernels, roster and state machine; only processes and sockets are played.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.runtime.config import embedded_model
from sterna.scheduler import messages as wire
from sterna.scheduler.assembly import EngineArenas, EngineSettings, assemble
from sterna.scheduler.lane.local import local_workers
from sterna.scheduler.model.planner import read_plan
from sterna.scheduler.residency.saved_counts import SavedCounts
from sterna.scheduler.serving import Serving, ServingLimits
from sterna.shm.errors import ModelFileError, ModelReadError, StartFailed, SternaError
from sterna.shm.slots import SlotTable
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.messages import Configure
from sterna.workers.serve import ExpertWorker

from .flaky_lane import FlakyLane

GREEDY = wire.Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
PROMPTS = ([1, 400, 500], [1, 1200, 900, 77])
TOKENS = 5
SECOND_NS = 10**9


class Stage:
    """Half of the embedded model's experts in memory, two workers, and a scheduler over them."""

    def __init__(self, resident: int = 40, *, strict: bool = False) -> None:
        self.file = GgufFile.open(embedded_model())
        self.plan = read_plan(self.file)
        self.strict = strict
        self.settings = EngineSettings(
            classes=[(resident, nbytes) for _, nbytes in self.plan.all_slots()],
            workers=2, streams=2, context=64, max_batch_tokens=64,
        )  # fmt: skip
        self.arenas = EngineArenas.private(self.plan, self.settings)
        self.begin()

    def begin(self) -> None:
        """Start a scheduler over the same memory, as if the one before had died."""
        slots = SlotTable(self.arenas.weights, self.settings.classes)
        self.lane = FlakyLane(
            local_workers(
                lambda table: ExpertWorker(table, self.file.fds), slots,
                Configure(layers=self.plan.layer_shapes()), 2,
            )
        )  # fmt: skip
        self.made = assemble(self.plan, self.file, self.arenas, self.lane, self.settings)
        self.sent: list[wire.ToDaemon] = []
        self.now_ns = 0
        self.idle = 0
        limits = ServingLimits(
            workers=2, max_batch_tokens=64, step_timeout_s=60.0, start_timeout_s=5.0, strict=self.strict
        )
        self.serving = Serving(
            self.made, self.lane, limits, send=self.sent.append, clock_ns=lambda: self.now_ns, began_ns=0,
            counts=SavedCounts("", (0, 0, 0, 0)),
        )  # fmt: skip

    def submit(self, stream: int, prompt: Sequence[int]) -> None:
        self.made.streams.tokens[stream, : len(prompt)] = prompt
        self.serving.take(
            wire.Submit(
                stream=stream, serial=1, prompt_length=len(prompt), committed=len(prompt), computed=0,
                max_length=len(prompt) + TOKENS, sampling=GREEDY, stop_ids=[], logprobs=0,
                prompt_logprobs=False,
            )
        )  # fmt: skip

    def turn(self) -> bool:
        """Go once round the process's loop; return False where it would wait for ever."""
        self.serving.settle()
        if not self.serving.has_step:
            assert not self.lane._changes, "it waits, though it has not handled what it knows"
            self.idle += 1
            if not self._something_comes():
                return False
        self.lane.receive()
        self.serving.settle()
        self.serving.step()
        return True

    def _something_comes(self) -> bool:
        """Do what wakes a waiting scheduler: a death is noticed, or the daemon has started another worker."""
        here = self.lane.peers
        if self.lane.hellos or any(self.lane._roster.peer_of(worker) in self.lane.dead for worker in here):
            return True
        gone = [worker for worker in here if here[worker] in self.lane.dead]
        if gone:
            self.lane.say_hello(gone[0])
        return bool(gone)

    def run(self) -> None:
        """Go round until there is nothing left to wait for."""
        for _ in range(2000):
            if not self.turn():
                return
        raise AssertionError("it never comes to rest")

    def tokens(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for step in self.sent:
            if isinstance(step, wire.Step):
                for part in step.streams:
                    if part.token is not None:
                        found.setdefault(part.stream, []).append(part.token)
        return found

    def failures(self) -> list[wire.StreamsFailed]:
        return [each for each in self.sent if isinstance(each, wire.StreamsFailed)]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.file.close()


@pytest.fixture(scope="module")
def expected(stage: Stage) -> dict[int, list[int]]:
    stage.begin()
    for stream, prompt in enumerate(PROMPTS):
        stage.submit(stream, prompt)
    stage.run()
    assert stage.serving.ready
    assert [len(tokens) for tokens in stage.tokens().values()] == [TOKENS, TOKENS]
    return stage.tokens()


BLOWS = st.lists(
    st.tuples(st.integers(1, 60), st.sampled_from([(0,), (1,), (0, 1), (1, 0)]), st.integers(0, 12)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(blows=BLOWS)
def test_whoever_dies_whenever_every_answer_is_the_same(
    stage: Stage, expected: dict[int, list[int]], blows: list[tuple[int, tuple[int, ...], int]]
) -> None:
    """At the n-th message workers die, one or both, and their successors say hello some messages later.

    While slots are filled at the start, in a step, and while they are filled for a successor.
    """
    for header in stage.made.slots.headers:
        header["state"] = 0  # all is to be read again
    stage.begin()
    due: dict[int, list[tuple[str, int]]] = {}
    for when, workers, later in blows:
        due.setdefault(when, []).extend(("die", worker) for worker in workers)
        due.setdefault(when + later, []).extend(("hello", worker) for worker in workers)
    count = 0

    def strike() -> None:
        nonlocal count
        count += 1
        for what, worker in due.pop(count, ()):
            if what == "die":
                stage.lane.die(worker)
            elif stage.lane.peers[worker] in stage.lane.dead:
                stage.lane.say_hello(worker)

    stage.lane.at = strike
    for stream, prompt in enumerate(PROMPTS):
        stage.submit(stream, prompt)
    stage.run()
    assert stage.serving.ready
    failed = {stream for each in stage.failures() for stream, _ in each.streams}
    # Three steps in a row without a worker end an answer, and say so: that is no hang.
    assert {each.code for each in stage.failures()} <= {"worker_lost"}
    for stream, tokens in expected.items():
        assert stream in failed or stage.tokens()[stream] == tokens


def test_what_was_met_inside_a_step_is_handled_before_the_next_wait(
    stage: Stage, expected: dict[int, list[int]]
) -> None:
    """A death and the successor's hello in the same step: one kill in five cost a second for it."""
    stage.begin()
    stage.run()
    assert stage.serving.ready
    struck = []

    def strike() -> None:
        if not struck:
            struck.append(1)
            stage.lane.die(0)
            stage.lane.say_hello(0)

    for stream, prompt in enumerate(PROMPTS):
        stage.submit(stream, prompt)
    stage.lane.at = strike
    idle = stage.idle
    while len(stage.tokens().get(0, [])) < TOKENS:
        stage.turn()
        assert stage.idle == idle, "it waited though the successor had already come"
    assert stage.tokens() == expected


@pytest.mark.parametrize("met", [ModelReadError("for a test"), ModelFileError("for a test")])
def test_an_expert_that_cannot_be_read_ends_only_who_needs_it(
    stage: Stage, expected: object, met: SternaError
) -> None:
    used: list[set[tuple[int, int]]] = []
    for prompt in PROMPTS:
        stage.begin()
        stage.submit(0, prompt)
        stage.run()
        used.append(set(stage.lane.computed))
    bad = min(used[1] - used[0])
    for slot in range(stage.made.slots.num_slots):
        if stage.made.slots.holds(slot, *bad):
            stage.made.slots.clear(slot)
    stage.begin()
    stage.lane.unreadable.add(bad)
    stage.lane.met = met
    for stream, prompt in enumerate(PROMPTS):
        stage.submit(stream, prompt)
    stage.run()
    (failure,) = stage.failures()
    assert (failure.streams, failure.code, failure.text) == ([(1, 1)], met.code, "for a test")
    assert isinstance(expected, dict)
    assert stage.tokens()[0] == expected[0]
    stage.lane.unreadable.clear()  # the card is back
    stage.sent.clear()
    stage.submit(1, PROMPTS[1])
    stage.run()
    assert stage.tokens() == {1: expected[1]}


def test_a_successor_joins_though_nothing_can_be_read_any_more(stage: Stage) -> None:
    """The service goes on for what is in memory, and says of the rest why not: it hung for ever once."""
    stage.begin()
    stage.run()
    every = {(layer, expert) for layer in stage.plan.hyper.moe_layers for expert in range(16)}
    for slot in range(0, stage.made.slots.num_slots, 2):
        stage.made.slots.clear(slot)
    stage.begin()
    stage.lane.unreadable = every
    stage.run()
    assert stage.serving.ready
    for worker in (0, 1):
        stage.lane.die(worker)
        stage.lane.say_hello(worker)
    stage.run()
    assert stage.lane._roster.joined == [0, 1]
    stage.submit(0, PROMPTS[0])
    stage.run()
    assert [each.code for each in stage.failures()] == ["model_read"]
    assert stage.serving.ready


def test_the_first_start_ends_with_what_reading_met() -> None:
    stage = Stage(strict=True)
    stage.lane.unreadable.add((2, 3))
    with pytest.raises(ModelReadError, match="for a test"):
        stage.run()
    stage.file.close()


def test_workers_that_never_come_end_the_start(stage: Stage) -> None:
    stage.begin()
    stage.lane.die(1)
    stage.lane._changes = [change for change in stage.lane._changes if change.worker == 0]
    stage.serving.settle()
    stage.now_ns = 6 * SECOND_NS
    with pytest.raises(StartFailed, match="worker 1 not there after 5 s"):
        stage.serving.settle()


def test_a_worker_that_never_answers_what_fills_slots_is_killed(stage: Stage) -> None:
    for slot in range(stage.made.slots.num_slots):
        stage.made.slots.clear(slot)
    stage.begin()
    stage.lane.dead.add(1)  # it takes messages and says nothing; nobody notices
    stage.serving.settle()
    assert not stage.serving.ready
    stage.now_ns = 59 * SECOND_NS
    stage.serving.settle()
    assert stage.lane._roster.peer_of(1) == 1
    stage.now_ns = 61 * SECOND_NS
    stage.serving.settle()
    assert stage.lane._roster.peer_of(1) is None
    assert stage.lane._roster.joined == [0]
    stage.lane.say_hello(1)
    stage.run()
    assert stage.serving.ready
