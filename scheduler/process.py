"""The scheduler process: loads the model, then feeds events to the state machine and runs its steps.

One thread, one loop. Control messages are taken between steps; a step blocks in the lane, whose
waits are bounded. It ends by SIGTERM's default action: what must survive lies in shared memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from ..shm.arena import Arena
from ..shm.errors import ModelFileError, StartFailed, SternaError, WorkerLost
from ..shm.slots import SlotTable
from ..workers.checkpoint.file.gguf import GgufFile
from ..workers.kernels.measure import bandwidth
from ..workers.messages import Configure
from ..workers.ownership import owners
from ..workers.pinned import cpus_by_core
from . import messages as wire
from . import state as st
from .decoder.crew import Crew, usable_cores
from .decoder.dense import fill_dense
from .engine import Engine
from .experts.figures import expert_stats
from .experts.routing_log import RoutingLog
from .experts.runner import ExpertRunner
from .kv import StreamMemory, StreamShape
from .lane.interface import Loaded
from .lane.zeromq import ZmqLane
from .model.planner import read_plan
from .residency.expert_memory import ExpertMemory
from .residency.policies import Policy, new_policy
from .residency.resizer import Resizer
from .residency.saved_counts import SavedCounts, reading_order
from .spec import SchedulerSpec, model_id

IDLE_MS = 1000
PROGRESS_S = 0.1
PROBE_S = 0.2
SAVE_S = 60.0
FILLING = 16  # experts that each worker is asked for at a time


def run(spec: Mapping[str, object], fds: Mapping[str, int]) -> int:
    """Serve one daemon until killed; `fds`: "weights", "dense", "streams".

    Called by the nursery in the forked child. Returns an exit code when loading failed, after telling
    the daemon why.
    """
    scheduler = _Scheduler(msgspec.convert(dict(spec), SchedulerSpec), fds)
    try:
        scheduler.load()
        scheduler.serve()
    except SternaError as error:
        scheduler.send(wire.Trouble(code=error.code, text=str(error)))
        scheduler.close()
        return error.exit_code
    return 0


class _Scheduler:
    def __init__(self, spec: SchedulerSpec, fds: Mapping[str, int]) -> None:
        self._spec = spec
        self._fds = fds
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._control = self._context.socket(zmq.DEALER)
        self._control.setsockopt(zmq.ROUTING_ID, f"s{spec.generation}".encode())
        self._control.setsockopt(zmq.SNDTIMEO, int(spec.step_timeout_s * 1000))
        self._control.setsockopt(zmq.LINGER, 1000)
        self._control.connect(spec.control_url)
        self._next: tuple[st.Segment, ...] = ()
        self._steps = 0
        self._reported = 0.0
        self._saved_s = 0.0
        self._saved_events = 0

    def send(self, message: wire.ToDaemon) -> None:
        """Send to the daemon; a daemon that takes nothing for a whole step time-out ends this process."""
        self._control.send(wire.encode(message))

    def close(self) -> None:
        """Close the sockets, giving the last message a second to leave."""
        self._control.close()
        self._context.term()

    # ---- loading ----

    def load(self) -> None:
        """Bring dense weights and experts into the arenas, as far as no predecessor did.

        Raises ModelFileError, ModelReadError, or StartFailed when workers do not come.
        """
        begin = time.monotonic()
        spec = self._spec
        self._file = GgufFile.open(spec.model_path)
        if model_id(spec.model_path) != spec.model_id:
            raise ModelFileError(f"{spec.model_path}: the file was changed while it was loaded")
        plan = read_plan(self._file, spec.storage, tuple(spec.precisions))
        self._plan = plan = plan.assigned(spec.assignment)
        dense = Arena.attach("dense", self._fds["dense"]).bytes
        with GgufFile.open(spec.model_path) as file:  # a mapping that goes, and all pages read through it
            fill_dense(plan, file, dense, lambda done, total: self._progress("weights", done, total))
        weights = Arena.attach("weights", self._fds["weights"])
        slots = SlotTable(weights.bytes, spec.slots)
        shape = StreamShape(
            layers=plan.hyper.layers,
            width=plan.hyper.cache_width,
            streams=spec.streams,
            context=spec.context,
            value_nbytes=spec.value_nbytes,
        )
        self._streams = StreamMemory(shape, Arena.attach("streams", self._fds["streams"]).bytes)
        owned = owners(plan.hyper.moe_layers, plan.hyper.experts, [1.0] * spec.workers)
        layers = len(plan.hyper.moe_layers)
        policy: Policy | None = None
        self._counts = SavedCounts(spec.cache_dir, spec.model_id)
        # With precisions also to count what is used, for the assignment of the next start.
        if sum(spec.limits) < plan.num_experts or plan.assignment:
            policy = new_policy(plan.num_experts, layers)
            self._counts.load(policy)
        self._memory = ExpertMemory(plan, slots, spec.slots, owned, policy)
        self._order = reading_order(policy, layers, plan.hyper.experts).tolist()
        self._resizer = Resizer(self._memory, slots, weights, spec.slots, spec.limits)
        configure = Configure(layers=plan.layer_shapes())
        self._lane = ZmqLane(spec.lane_url, configure, plan.hyper.d_model, spec.step_timeout_s)
        threads = spec.threads or usable_cores()
        streaming = _streaming_threads(dense, threads)
        crew = Crew(threads, streaming)
        self._runner = ExpertRunner(plan, self._file, self._lane, self._memory)
        self._log = self._open_log()
        self._engine = Engine(
            plan, dense, self._streams, self._runner, spec.max_batch_tokens, crew, spec.prefetch, self._log
        )
        self._state = st.SchedulerState(
            num_blocks=shape.num_blocks,
            block_size=shape.block_size,
            max_batch_tokens=spec.max_batch_tokens,
            workers=range(spec.workers),
            held=self._held_blocks(),
        )
        self._await_workers()
        self.send(wire.Ready(seconds=time.monotonic() - begin, threads=threads, streaming_threads=streaming))

    def _open_log(self) -> RoutingLog | None:
        """Return the trace that was asked for; a successor's has its number behind the name."""
        if not self._spec.trace:
            return None
        generation = self._spec.generation
        path = Path(self._spec.trace if generation == 1 else f"{self._spec.trace}.{generation}")
        return RoutingLog(path, self._plan, Path(self._spec.model_path).stem)

    def _await_workers(self) -> None:
        deadline = time.monotonic() + self._spec.start_timeout_s
        waiting = set(range(self._spec.workers))
        while waiting:
            if time.monotonic() > deadline:
                missing = ", ".join(str(index) for index in sorted(waiting))
                raise StartFailed(f"worker {missing} not there after {self._spec.start_timeout_s:.0f} s")
            self._lane.socket.poll(IDLE_MS, zmq.POLLIN)
            waiting -= set(self._lane.poll_hello())
        self._fill()
        for index in range(self._spec.workers):
            self._handle(st.WorkerJoined(worker=index))

    def _fill(self) -> None:
        """Read experts into the slots that are free; raises WorkerLost, or what reading met."""
        left = self._memory.missing(self._order)
        total, reading = len(left), set[int]()
        while left or reading:
            while left and len(reading) < FILLING * self._spec.workers:
                key = left.pop(0)
                if (slot := self._memory.free_slot(key)) is not None:
                    reading.add(self._runner.read(key, slot, urgent=True))
            if reading:
                answer = self._lane.collect((), reading, "reading experts")
                if isinstance(answer, Loaded):
                    reading.discard(answer.seq)
                    self._runner.take_loaded(answer)
                    if answer.error is not None:
                        raise answer.error
            self._progress("experts", total - len(left) - len(reading), total)

    def _progress(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._reported > PROGRESS_S:
            self._reported = now
            self.send(wire.Loading(what=what, done=done, total=total))

    # ---- serving ----

    def serve(self) -> None:
        """Take events and run steps, for ever."""
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        poller.register(self._lane.socket, zmq.POLLIN)
        while True:
            watched = self._lane.pidfds() if not self._next else []
            for pidfd in watched:
                poller.register(pidfd, zmq.POLLIN)
            self._save_counts()
            if self._log is not None and not self._next:
                self._log.flush()
            poller.poll(0 if self._next else IDLE_MS)
            for pidfd in watched:
                poller.unregister(pidfd)
            self._take_control()
            self._take_workers()
            if (resized := self._resizer.advance()) is not None:
                self.send(resized)
            if self._next:
                self._run_step()

    def _save_counts(self) -> None:
        """Keep what was used, when there is nothing else to do or a minute after the last time."""
        used = self._runner.counts.events
        policy = self._memory.policy
        if policy is None or used == self._saved_events:
            return
        now = time.monotonic()
        if now - self._saved_s > (SAVE_S if self._next else 1.0):
            self._saved_s, self._saved_events = now, used
            self._counts.save(policy)

    def _take_control(self) -> None:
        while self._control.poll(0, zmq.POLLIN):
            message = wire.decode_for_scheduler(self._control.recv())
            match message:
                case wire.Submit():
                    self._engine.admit(message)
                    self._handle(st.Submitted(request=message))
                case wire.Cancel():
                    self._handle(st.Cancelled(stream=message.stream, serial=message.serial))
                case wire.Drain():
                    self._handle(st.DrainAsked())
                case wire.Resize():
                    self._resizer.ask(message)
                case wire.Query():
                    self.send(self._stats(message.nonce))

    def _held_blocks(self) -> dict[int, list[int]]:
        """Return the blocks with KV of all running streams: none for the first scheduler."""
        records, size = self._streams.records, self._streams.shape.block_size
        return {
            int(stream): self._streams.tables[stream, : -(-records["computed"][stream] // size)].tolist()
            for stream in records["active"].nonzero()[0]
        }

    def _take_workers(self) -> None:
        joined = self._lane.poll_hello()
        self._take_lost()
        for answer in self._lane.poll_loaded():
            self._runner.take_loaded(answer)
        for index in joined:
            try:
                self._fill()
            except WorkerLost:
                continue  # the next incarnation will bring in what is missing
            self._handle(st.WorkerJoined(worker=index))

    def _take_lost(self) -> None:
        for index in self._lane.poll_lost():
            self._memory.worker_lost(index)
            self._handle(st.WorkerLost(worker=index))

    def _run_step(self) -> None:
        # What was cancelled since the step was planned is left out; its end is an event all the same.
        segments = [s for s in self._next if self._state.live(s.stream, s.serial)]
        self._next = ()
        if not segments:
            self._handle(st.StepDone(sampled={}))
            return
        begin_ns = time.perf_counter_ns()
        try:
            results = self._engine.step(segments, [self._state.request(s.stream) for s in segments])
        except SternaError as error:
            self._take_lost()
            self._handle(st.StepFailed(code=error.code, text=str(error)))
            return
        self._steps += 1
        sampled = {result.stream: result.token for result in results if result.token is not None}
        instructions = self._state.handle(st.StepDone(sampled=sampled))
        ended = {i.stream: i.reason for i in instructions if isinstance(i, st.Finish)}
        streams = [msgspec.structs.replace(r, finish=ended.get(r.stream)) for r in results]
        busy_ns = time.perf_counter_ns() - begin_ns
        self._engine.foresight.step_took(sum(segment.count for segment in segments), busy_ns)
        self.send(wire.Step(number=self._steps, busy_ns=busy_ns, streams=streams))
        self._carry_out(instructions)

    def _handle(self, event: st.Event) -> None:
        if isinstance(event, st.WorkerJoined):
            self.send(wire.WorkerReady(index=event.worker))
        self._carry_out(self._state.handle(event))

    def _carry_out(self, instructions: Sequence[st.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case st.GrantBlocks(stream=stream, first=first, blocks=blocks):
                    self._streams.tables[stream, first : first + len(blocks)] = blocks
                case st.RunStep(segments=segments):
                    self._next = segments
                case st.Fail(streams=streams, code=code, text=text):
                    self.send(wire.StreamsFailed(streams=list(streams), code=code, text=text))
                case st.Finish():
                    pass  # travels with its step

    def _stats(self, nonce: int) -> wire.Stats:
        return wire.Stats(
            nonce=nonce,
            steps=self._steps,
            running=self._state.num_streams,
            free_blocks=self._state.blocks.num_free,
            workers=self._state.workers,
            resident_experts=self._memory.num_resident,
            experts=expert_stats(self._runner, self._engine.foresight, self._spec.workers),
        )


def _streaming_threads(dense: npt.NDArray[np.uint8], threads: int) -> int:
    """Return with how many of `threads` threads to read weights for one token: on some boards two are best.

    Measured over the dense weights themselves, unless a cache holds them and nothing streams.
    """
    cache = bandwidth.cache_nbytes(cpus_by_core())
    if threads < 2 or dense.size <= cache:
        return threads
    probed = dense[: bandwidth.buffer_nbytes(cache)]
    measured = bandwidth.measure(time.perf_counter, seconds=PROBE_S, max_threads=threads, buffer=probed)
    return measured.streaming_threads()
