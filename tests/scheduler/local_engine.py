"""A whole engine in one process: real plan, arenas, workers and state machine, no sockets."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from sterna.runtime.config import embedded_model
from sterna.runtime.memory.budget import spread
from sterna.scheduler import state as st
from sterna.scheduler.assembly import EngineArenas, EngineSettings, assemble
from sterna.scheduler.decoder.crew import Crew
from sterna.scheduler.experts.routing_log import RoutingLog
from sterna.scheduler.lane.interface import Computed, Loaded, WorkerBatch
from sterna.scheduler.lane.local import LocalLane, local_workers
from sterna.scheduler.messages import Pooling, RoutingReport, Sampling, Submit
from sterna.scheduler.model.plan import ModelPlan
from sterna.scheduler.model.planner import read_plan
from sterna.shm.slots import SlotTable
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.held.formats import DEFAULT_STORAGE, Storage
from sterna.workers.checkpoint.held.precisions import FILE_PRECISION
from sterna.workers.messages import Configure, ExpertPage
from sterna.workers.serve import ExpertWorker

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


class CountingLane(LocalLane):
    """Counts what it carried; answers come in a random order with `shuffle`."""

    def __init__(self, workers: Sequence[ExpertWorker]) -> None:
        super().__init__(workers)
        self.workers = workers
        self.batches = 0
        self.pages = 0
        self.shuffle: np.random.Generator | None = None

    def compute(self, batch: WorkerBatch) -> int:
        self.batches += 1
        return super().compute(batch)

    def page_in(self, worker: int, page: ExpertPage, *, urgent: bool) -> int:
        self.pages += 1
        return super().page_in(worker, page, urgent=urgent)

    def collect(self, computing: Collection[int], loading: Collection[int], what: str) -> Computed | Loaded:
        if self.shuffle is not None:
            at = int(self.shuffle.integers(len(self._answers)))
            self._answers.insert(0, self._answers.pop(at))
        return super().collect(computing, loading, what)


@dataclass
class Generated:
    """What one stream gave."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    reason: str | None = None
    routing: list[RoutingReport] = field(default_factory=list)
    pooled: list[bytes] = field(default_factory=list)


class LocalEngine:
    """Loads a model and runs streams to their end."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        workers: int = 1,
        streams: int = 8,
        context: int = 512,
        max_batch_tokens: int = 512,
        crew: Crew | None = None,
        storage: Storage = DEFAULT_STORAGE,
        resident: int = 0,
        prefetch: str = "off",
        log: Callable[[ModelPlan], RoutingLog] | None = None,
        precisions: tuple[str, ...] = (FILE_PRECISION,),
        assignment: Sequence[int] = (),
        value_nbytes: int = 2,
    ) -> None:
        """`resident`: how many experts have a slot, 0 for all; `assignment`: each one's of `precisions`."""
        self.file = GgufFile.open(path or embedded_model())
        self.plan = plan = read_plan(self.file, storage, precisions).assigned(assignment)
        classes = plan.all_slots()
        if resident:
            counts = spread(plan, classes, resident) if assignment else [resident]
            classes = [(count, nbytes) for count, (_, nbytes) in zip(counts, classes, strict=True)]
        settings = EngineSettings(
            classes=classes,
            workers=workers,
            streams=streams,
            context=context,
            max_batch_tokens=max_batch_tokens,
            value_nbytes=value_nbytes,
            prefetch=prefetch,
        )
        arenas = EngineArenas.private(plan, settings)
        pool = local_workers(
            lambda slots: ExpertWorker(slots, self.file.fds),
            SlotTable(arenas.weights, classes),
            Configure(layers=plan.layer_shapes()),
            workers,
        )
        self.dense = arenas.dense
        self.lane = CountingLane(pool)
        self.log = None if log is None else log(plan)
        make_crew = (lambda dense: Crew(1)) if crew is None else (lambda dense: crew)
        made = assemble(plan, self.file, arenas, self.lane, settings, make_crew=make_crew, log=self.log)
        self.slots, self.memory, self.runner = made.slots, made.memory, made.runner
        self.streams, self.engine, self.dense = made.streams, made.engine, arenas.dense
        for key in self.memory.missing(range(plan.num_experts)):
            slot = self.memory.free_slot(key)
            assert slot is not None
            self.runner.read(key, slot, urgent=True)
            self.runner.take_loaded(self.lane.collect((), (), ""))  # type: ignore[arg-type]
        shape = self.streams.shape
        self.state = st.SchedulerState(
            num_blocks=shape.num_blocks,
            block_size=shape.block_size,
            max_batch_tokens=max_batch_tokens,
            workers=range(workers),
        )
        for index in range(workers):
            self.state.handle(st.WorkerJoined(worker=index))
        self.steps = 0

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        sampling: Sequence[Sampling] | None = None,
        stop_ids: Sequence[int] = (),
        stepped_from: int | None = None,
        epsilon: float = 0.0,
        pooling: Sequence[Pooling | None] = (),
    ) -> list[Generated]:
        """Generate for all prompts at once; greedy unless told otherwise, and but for those to be pooled."""
        todo: list[st.Instruction] = []
        results = [Generated() for _ in prompts]
        for number, prompt in enumerate(prompts):
            self.streams.tokens[number, : len(prompt)] = prompt
            request = Submit(
                stream=number,
                serial=number,
                prompt_length=len(prompt),
                committed=len(prompt),
                computed=0,
                max_length=len(prompt) + max_tokens,
                sampling=sampling[number] if sampling else GREEDY,
                stop_ids=list(stop_ids),
                logprobs=0,
                prompt_logprobs=not pooling,
                pooling=pooling[number] if pooling else None,
                stepped_from=stepped_from,
                epsilon=epsilon,
                lossy_from=len(prompt) if stepped_from is None else stepped_from,
            )
            self.engine.admit(request)
            todo += self.state.handle(st.Submitted(request=request))
        while todo:
            todo += self._carry_out(todo.pop(0), results)
        return results

    def _carry_out(self, instruction: st.Instruction, results: list[Generated]) -> list[st.Instruction]:
        match instruction:
            case st.GrantBlocks(stream=stream, first=first, blocks=blocks):
                self.streams.tables[stream, first : first + len(blocks)] = blocks
            case st.Finish(stream=stream, reason=reason):
                results[stream].reason = reason
            case st.RunStep(segments=segments):
                self.steps += 1
                sampled = {}
                for part in self.engine.step(self.state.work(segments)):
                    result = results[part.stream]
                    if part.routing is not None:
                        result.routing.append(part.routing)
                    result.prompt_logprobs += part.prompt_logprobs or []
                    result.pooled += [] if part.pooled is None else [part.pooled]
                    if part.token is not None and part.score is not None:
                        sampled[part.stream] = part.token
                        result.tokens.append(part.token)
                        result.logprobs.append(part.score.logprob)
                following = self.state.handle(st.StepDone(sampled=sampled))
                self.state.validate()
                return following
            case st.Fail(text=text):
                raise AssertionError(text)
        return []
