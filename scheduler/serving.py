"""What the scheduler does between and with messages: workers join, experts are read, steps run.

Feeds events to the state machine and carries its instructions out. No socket, and the clock is an argument:
`process` waits, and hands over what has come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from ..shm.errors import StartFailed, SternaError
from . import messages as wire
from . import state as st
from .assembly import Assembly
from .experts.figures import expert_stats
from .experts.routing_log import RoutingLog
from .experts.runner import SpoiledExpert, UnreadableExpert
from .filling import SlotFiller
from .lane.interface import Loaded, ServedLane
from .lane.roster import AnswersOverdue, Change, FillSlots, Join, Leave, SlotsFilled
from .residency.saved_counts import SavedCounts

log = logging.getLogger("sterna.scheduler")

SAVE_S = 60.0
PROGRESS_S = 0.1

Send = Callable[[wire.ToDaemon], None]
ClockNs = Callable[[], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """How long things may take, and who is expected."""

    workers: int
    max_batch_tokens: int
    step_timeout_s: float
    """For an answer of a worker that is waited for."""
    start_timeout_s: float
    """For all workers to say hello, once the scheduler listens to them."""
    strict: bool
    """Whether an expert that cannot be read at the start ends it: a successor goes on without."""


class Serving:
    """One scheduler at work. `clock_ns` is monotonic; `send` is called with messages to the daemon."""

    def __init__(
        self,
        made: Assembly,
        lane: ServedLane,
        limits: ServingLimits,
        *,
        send: Send,
        clock_ns: ClockNs,
        began_ns: int,
        counts: SavedCounts,
        routing_log: RoutingLog | None = None,
    ) -> None:
        self._made = made
        self._lane = lane
        self._limits = limits
        self._send = send
        self._clock_ns = clock_ns
        self._began_ns = began_ns
        self._listening_ns = clock_ns()
        self._counts = counts
        self._routing_log = routing_log
        self._engine = made.engine
        shape = made.streams.shape
        self._state = st.SchedulerState(
            num_blocks=shape.num_blocks,
            block_size=shape.block_size,
            max_batch_tokens=limits.max_batch_tokens,
            workers=range(limits.workers),
            held=_held_blocks(made),
        )
        self._filler = SlotFiller(made.runner, made.order)
        self._heard: set[int] = set()  # workers that have said hello at least once
        self._filling_since_ns = 0  # the last answer to what fills slots, or the first request
        self._next: tuple[st.Segment, ...] = ()
        self._steps = 0
        self._ready = False
        self._reported_ns = 0
        self._saved_ns = 0
        self._saved_events = 0
        self._prefetching = True

    @property
    def has_step(self) -> bool:
        """Whether a step is planned."""
        return bool(self._next)

    @property
    def ready(self) -> bool:
        """Whether all workers have been there, with what could be read for them."""
        return self._ready

    # ---- workers and experts ----

    def settle(self) -> None:
        """Handle all that the lane has met, also inside a step, until nothing is left of it.

        Raises StartFailed when workers do not come in time, and, before the engine was ready for the first
        time, what reading an expert met.
        """
        self._check_times()
        while self._settle_part():
            pass
        # A dense model has no workers to wait for.
        if not self._ready and len(self._state.workers) == self._limits.workers:
            self._announce()
        if self._made.resizer is not None and (resized := self._made.resizer.advance()) is not None:
            log.info(
                "slots.resized resident=%d freed_bytes=%d error=%r",
                resized.resident_experts, resized.freed_bytes, resized.error or "",
            )  # fmt: skip
            self._send(resized)

    def _settle_part(self) -> bool:
        reads, changes = self._lane.reads(), self._lane.changes()
        for answer in reads:
            self._read(answer)
        for change in changes:
            self._change(change)
        asked = self._filler.advance()
        if peers := self._filler.filled():
            self._lane.tell(SlotsFilled(peers=peers))
        return bool(reads or changes or asked or peers)

    def _read(self, answer: Loaded) -> None:
        self._made.runner.take_loaded(answer)
        if not self._filler.answered(answer.seq):
            return
        self._filling_since_ns = self._clock_ns()
        if answer.error is not None and self._limits.strict and not self._ready:
            raise answer.error
        self._progress()

    def _change(self, change: Change) -> None:
        match change:
            case FillSlots(worker=worker, peer=peer):
                self._filling_since_ns = self._clock_ns()
                self._heard.add(worker)
                self._filler.begin(worker, peer)
                log.debug("worker.filling index=%d experts=%d", worker, self._filler.total)
            case Join(worker=worker):
                log.info("worker.joined index=%d resident=%d", worker, self._made.memory.num_resident)
                self._send(wire.WorkerReady(index=worker))
                self._handle(st.WorkerJoined(worker=worker))
            case Leave(worker=worker):
                log.warning("worker.lost index=%d reading=%d", worker, self._made.memory.num_loading)
                self._made.memory.worker_lost(worker)
                self._filler.left(worker)
                self._handle(st.WorkerLeft(worker=worker))

    def _announce(self) -> None:
        self._ready = True
        crew = self._made.crew
        seconds = (self._clock_ns() - self._began_ns) / 1e9
        log.info("scheduler.ready seconds=%.2f experts=%d", seconds, self._made.memory.num_resident)
        self._send(
            wire.Ready(seconds=seconds, threads=crew.threads, streaming_threads=crew.streaming_threads)
        )

    def _check_times(self) -> None:
        now_ns = self._clock_ns()
        requests = self._filler.requests
        if requests and now_ns - self._filling_since_ns > self._limits.step_timeout_s * 1e9:
            self._filling_since_ns = now_ns
            self._lane.tell(AnswersOverdue(requests=requests))
        if self._ready or now_ns - self._listening_ns <= self._limits.start_timeout_s * 1e9:
            return
        waiting = sorted(set(range(self._limits.workers)) - self._heard)
        if waiting:
            missing = ", ".join(map(str, waiting))
            raise StartFailed(f"worker {missing} not there after {self._limits.start_timeout_s:.0f} s")

    def _progress(self) -> None:
        """Report how much is read, at the start only."""
        now_ns, filler = self._clock_ns(), self._filler
        if not self._ready and (filler.done == filler.total or now_ns - self._reported_ns > PROGRESS_S * 1e9):
            self._reported_ns = now_ns
            self._send(wire.Loading(what="experts", done=filler.done, total=filler.total))

    # ---- messages ----

    def take(self, message: wire.ToScheduler) -> None:
        """Do what the daemon says."""
        match message:
            case wire.Submit():
                self._engine.admit(message)
                self._handle(st.Submitted(request=message))
            case wire.Cancel():
                self._handle(st.CancelAsked(stream=message.stream, serial=message.serial))
            case wire.Resize():
                self._resize(message)
            case wire.Query():
                self._send(self._stats(message.nonce))

    def _resize(self, message: wire.Resize) -> None:
        if self._made.resizer is not None:
            log.debug("slots.asked limits=%r", message.limits)
            self._made.resizer.ask(message)

    def _stats(self, nonce: int) -> wire.Stats:
        made = self._made
        return wire.Stats(
            nonce=nonce,
            steps=self._steps,
            running=self._state.num_streams,
            free_blocks=self._state.blocks.num_free,
            workers=self._state.workers,
            resident_experts=made.memory.num_resident,
            experts=expert_stats(made.runner, self._engine.foresight, self._limits.workers),
        )

    # ---- steps ----

    def step(self) -> None:
        """Run the planned step, if there is one."""
        segments, self._next = self._next, ()
        if not segments:
            return
        work = self._state.work(segments)
        if not work:  # all cancelled since: its end is an event all the same
            self._handle(st.StepDone(sampled={}))
            return
        begin_ns = self._clock_ns()
        try:
            results = self._engine.step(work)
        except SternaError as error:
            self._failed(work, error)
            return
        self._steps += 1
        sampled = {result.stream: result.token for result in results if result.token is not None}
        instructions = self._state.handle(st.StepDone(sampled=sampled))
        ended = {i.stream: i.reason for i in instructions if isinstance(i, st.Finish)}
        streams = [msgspec.structs.replace(r, finish=ended.get(r.stream)) for r in results]
        busy_ns = self._clock_ns() - begin_ns
        self._watch_prefetching(sum(w.segment.count for w in work), busy_ns)
        self._send(wire.Step(number=self._steps, busy_ns=busy_ns, streams=streams))
        self._carry_out(instructions)

    def _failed(self, work: Sequence[st.Work], error: SternaError) -> None:
        """Say that a step broke off; who left in it is no longer there when the next one is planned."""
        hit = None
        if isinstance(error, (UnreadableExpert, SpoiledExpert)):
            of_row = np.repeat([w.segment.stream for w in work], [w.segment.count for w in work])
            hit = frozenset(of_row[error.rows].tolist())
        self._lane.receive()
        self.settle()
        instructions = self._state.handle(st.StepFailed(code=error.code, text=str(error), streams=hit))
        failed = sum(len(each.streams) for each in instructions if isinstance(each, st.Fail))
        if failed:
            log.warning("step.failed code=%s streams=%d error=%r", error.code, failed, str(error))
        else:
            log.warning("step.retried code=%s streams=%d error=%r", error.code, len(work), str(error))
        self._carry_out(instructions)

    def _watch_prefetching(self, tokens: int, busy_ns: int) -> None:
        foresight = self._engine.foresight
        foresight.step_took(tokens, busy_ns)
        allowed = foresight.meter.allowed
        if allowed != self._prefetching:
            self._prefetching = allowed
            if allowed:
                log.info("prefetch.on")
            else:
                meter = foresight.meter
                log.info("prefetch.off issued=%d used=%d late=%d", meter.issued, meter.useful, meter.late)

    def _handle(self, event: st.Event) -> None:
        self._carry_out(self._state.handle(event))

    def _carry_out(self, instructions: Sequence[st.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case st.GrantBlocks(stream=stream, first=first, blocks=blocks):
                    self._made.streams.tables[stream, first : first + len(blocks)] = blocks
                case st.RunStep(segments=segments):
                    self._next = segments
                case st.Fail(streams=streams, code=code, text=text):
                    self._send(wire.StreamsFailed(streams=list(streams), code=code, text=text))
                case st.Finish():
                    pass  # travels with its step

    # ---- keeping ----

    def keep(self) -> None:
        """Keep what was used, when there is nothing else to do or a minute after the last time."""
        if self._routing_log is not None and not self._next:
            self._routing_log.flush()
        used = self._made.runner.counts.events
        policy = self._made.memory.policy
        if policy is None or used == self._saved_events:
            return
        now_ns = self._clock_ns()
        if now_ns - self._saved_ns > (SAVE_S if self._next else 1.0) * 1e9:
            self._saved_ns, self._saved_events = now_ns, used
            self._counts.save(policy)


def _held_blocks(made: Assembly) -> dict[int, list[int]]:
    """Return the blocks with KV of all running streams: none for the first scheduler."""
    records, size = made.streams.records, made.streams.shape.block_size
    return {
        int(stream): made.streams.tables[stream, : -(-records["computed"][stream] // size)].tolist()
        for stream in records["active"].nonzero()[0]
    }
