"""The scheduler's state machine: events in, instructions out. No clock, no socket, no kernel.

Continuous batching in one rule: a stream has `known` tokens of which `computed` have their KV. A step
gives every stream the tokens in between, decoding streams first, up to the batch limit; a stream
whose last known token is computed gets the next one sampled. Prefill, chunked prefill and decode
are the same case. A stream whose prompt is pooled has no token sampled: it ends when all are computed.

A step that failed changed nothing here, so it is simply planned again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .kv import BlockPool
from .messages import Submit

MAX_FAILED_STEPS = 3


# ---- events ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A new stream, or one that a predecessor had: then `held` named its blocks at the start."""

    request: Submit


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAsked:
    """The daemon no longer wants the stream."""

    stream: int
    serial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """The running step ended; `sampled` maps streams to their new tokens."""

    sampled: dict[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """The running step broke off; nothing of it counts."""

    code: str
    text: str
    streams: frozenset[int] | None = None
    """Those that the step failed for, None for all; the others can be computed again without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLeft:
    """A worker is gone."""

    worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """A worker can be given work."""

    worker: int


Event = Submitted | CancelAsked | StepDone | StepFailed | WorkerLeft | WorkerJoined


# ---- instructions ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens start..start+count of one stream in a step; `sample`: choose the token that follows."""

    stream: int
    serial: int
    start: int
    count: int
    sample: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one step does for one sequence: `segment`, of what `request` asked for."""

    segment: Segment
    request: Submit


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantBlocks:
    """Write these blocks into the stream's table from entry `first` on."""

    stream: int
    first: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep:
    """Compute these segments as one batch."""

    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The stream's answer is complete; `reason` is "stop" or "length"."""

    stream: int
    serial: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """These (stream, serial) end with an error."""

    streams: tuple[tuple[int, int], ...]
    code: str
    text: str


Instruction = GrantBlocks | RunStep | Finish | Fail


@dataclass(slots=True)
class _Running:
    request: Submit
    known: int
    computed: int

    @property
    def stride(self) -> int:
        """Tokens that the next step may compute at most."""
        stepped = self.request.stepped_from
        if stepped is None:
            return self.known
        return 1 if self.computed >= stepped else stepped - self.computed

    @property
    def pooled(self) -> bool:
        return self.request.pooling is not None

    @property
    def decoding(self) -> bool:
        return self.known - self.computed == 1 and self.known > 1


class SchedulerState:
    """All streams, their blocks, and which workers are there."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_batch_tokens: int,
        workers: Sequence[int],
        held: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Start empty; `held`: blocks with KV that streams had under a predecessor.

        Those are kept for them until they are submitted again: no other stream may write there.
        """
        self._block_size = block_size
        self._max_batch_tokens = max_batch_tokens
        self._expected = frozenset(workers)
        self._present: set[int] = set()
        self._streams: dict[int, _Running] = {}  # in order of arrival
        self._running: tuple[Segment, ...] = ()
        self._failed_steps = 0
        self.blocks = BlockPool(num_blocks)
        for stream, blocks in (held or {}).items():
            self.blocks.adopt(stream, list(blocks))

    @property
    def num_streams(self) -> int:
        """Streams that are not finished."""
        return len(self._streams)

    @property
    def busy(self) -> bool:
        """Whether a step runs."""
        return bool(self._running)

    @property
    def workers(self) -> list[int]:
        """Workers that are there, in order."""
        return sorted(self._present)

    def request(self, stream: int) -> Submit:
        """Return what was submitted as `stream`."""
        return self._streams[stream].request

    def work(self, segments: Sequence[Segment]) -> list[Work]:
        """Return the step of `segments` without what was cancelled since it was planned."""
        alive = [s for s in segments if self.live(s.stream, s.serial)]
        return [Work(segment=s, request=self._streams[s.stream].request) for s in alive]

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event and return what is to be done, in order."""
        match event:
            case Submitted():
                return self._submit(event)
            case CancelAsked(stream=stream, serial=serial):
                return self._cancel(stream, serial)
            case StepDone(sampled=sampled):
                return self._step_done(sampled)
            case StepFailed():
                return self._step_failed(event)
            case WorkerLeft(worker=worker):
                self._present.discard(worker)
                return []
            case WorkerJoined(worker=worker):
                self._present.add(worker)
                return self._plan()

    def validate(self) -> None:
        """Raise AssertionError when an invariant is broken; tests call it after every event."""
        held = [block for stream in self._streams for block in self.blocks.held(stream)]
        assert len(held) == len(set(held)), "a block has two owners"  # noqa: S101
        for number, stream in self._streams.items():
            assert 0 <= stream.computed <= stream.known, f"stream {number}: computed beyond known"  # noqa: S101
            capacity = len(self.blocks.held(number)) * self._block_size
            assert capacity >= stream.computed, f"stream {number}: KV without a block"  # noqa: S101

    def _submit(self, event: Submitted) -> list[Instruction]:
        request = event.request
        if request.stream in self._streams:
            self._remove(request.stream)
        self._streams[request.stream] = _Running(request, known=request.committed, computed=request.computed)
        if not request.computed:
            self.blocks.release(request.stream)  # of a stream that was cancelled meanwhile
        return self._plan()

    def _cancel(self, stream: int, serial: int) -> list[Instruction]:
        # A running step may still write to the blocks: nobody reads them before writing them again.
        if self.live(stream, serial):
            self._remove(stream)
        return []

    def live(self, stream: int, serial: int) -> bool:
        """Return whether the stream is still that submission."""
        known = self._streams.get(stream)
        return known is not None and known.request.serial == serial

    def _step_done(self, sampled: dict[int, int]) -> list[Instruction]:
        segments, self._running = self._running, ()
        self._failed_steps = 0
        done: list[Instruction] = []
        for segment in segments:
            if not self.live(segment.stream, segment.serial):
                continue
            stream = self._streams[segment.stream]
            stream.computed = segment.start + segment.count
            if segment.sample:
                stream.known += 1
                reason = self._finished(stream, sampled[segment.stream])
            else:
                reason = "stop" if stream.pooled and stream.computed == stream.known else None
            if reason:
                self._remove(segment.stream)
                done.append(Finish(stream=segment.stream, serial=stream.request.serial, reason=reason))
        return done + self._plan()

    def _finished(self, stream: _Running, token: int) -> str | None:
        if token in stream.request.stop_ids:
            return "stop"
        return "length" if stream.known >= stream.request.max_length else None

    def _step_failed(self, event: StepFailed) -> list[Instruction]:
        segments, self._running = self._running, ()
        self._failed_steps += 1
        if event.code == "worker_lost" and self._failed_steps < MAX_FAILED_STEPS:
            return self._plan()
        self._failed_steps = 0
        hit = event.streams
        keys = tuple(
            (s.stream, s.serial)
            for s in segments
            if (hit is None or s.stream in hit) and self.live(s.stream, s.serial)
        )
        for stream, _ in keys:
            self._remove(stream)
        if not keys:
            return self._plan()
        return [Fail(streams=keys, code=event.code, text=event.text), *self._plan()]

    def _remove(self, stream: int) -> None:
        del self._streams[stream]
        self.blocks.release(stream)

    def _plan(self) -> list[Instruction]:
        """Return the next step, or nothing while one runs or a worker is missing."""
        if self._running or self._present != self._expected:
            return []
        budget = self._max_batch_tokens
        segments: list[Segment] = []
        grants: list[Instruction] = []
        # Decoding streams first: a long prompt must not stall a running answer.
        for stream, state in sorted(self._streams.items(), key=lambda item: not item[1].decoding):
            count = min(state.known - state.computed, budget, state.stride)
            if count == 0:
                continue
            budget -= count
            end = state.computed + count
            segments.append(
                Segment(
                    stream=stream,
                    serial=state.request.serial,
                    start=state.computed,
                    count=count,
                    sample=end == state.known and not state.pooled,
                )
            )
            first = len(self.blocks.held(stream))
            new = self.blocks.grow(stream, -(-end // self._block_size))
            if new:
                grants.append(GrantBlocks(stream=stream, first=first, blocks=tuple(new)))
        self._running = tuple(segments)
        return [*grants, RunStep(segments=self._running)] if segments else []
