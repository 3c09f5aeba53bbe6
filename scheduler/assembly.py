"""Putting an engine together: the one place that does, for serving, for measuring and for tests.

Who calls brings the memory, the lane and the file; `assemble` fills the dense weights and returns the engine
with everything around it. Reading the experts is not done here: they come as workers join (`filling`), or as
they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..shm.arena import Arena
from ..shm.slots import SlotClasses, SlotTable, arena_nbytes
from ..workers.checkpoint.file.gguf import GgufFile
from ..workers.ownership import owners
from .decoder.crew import Crew
from .decoder.dense import DenseWeights, Observer, fill_dense
from .engine import Engine
from .experts.routing_log import RoutingLog
from .experts.runner import ExpertRunner
from .kv import StreamMemory, StreamShape
from .lane.interface import Lane
from .model.plan import ModelPlan
from .residency.expert_memory import ExpertMemory
from .residency.policies import Policy, new_policy
from .residency.resizer import Resizer
from .residency.saved_counts import SavedCounts, reading_order

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]
"""Called with what is loaded, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How an engine is cut to size."""

    classes: SlotClasses
    """The slots of the weights arena."""
    limits: Sequence[int] | None = None
    """How many slots of each class may be used; None for all."""
    workers: int = 1
    streams: int
    """Sequences at a time."""
    context: int
    """Tokens of each, at most."""
    max_batch_tokens: int
    """Tokens of a step, at most."""
    value_nbytes: int = 2
    """Of a value in the cache of keys and values: 2 is float16, 4 float32."""
    prefetch: str = "off"
    """"auto", "on" or "off", see `experts.foresight`."""

    def stream_shape(self, plan: ModelPlan) -> StreamShape:
        """Return the shape of the stream memory."""
        return StreamShape(
            layers=plan.hyper.layers,
            width=plan.hyper.cache_width,
            streams=self.streams,
            context=self.context,
            value_nbytes=self.value_nbytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArenas:
    """The memory that an engine lies in; it belongs to whoever made it."""

    weights: Bytes
    dense: Bytes
    streams: Bytes
    resizable: Arena | None = None
    """The arena of `weights`, if pages of it can be given back."""

    @classmethod
    def private(cls, plan: ModelPlan, settings: EngineSettings) -> EngineArenas:
        """Return zeroed memory of this process."""
        return cls(
            weights=np.zeros(arena_nbytes(settings.classes), np.uint8),
            dense=np.zeros(plan.dense_arena_nbytes, np.uint8),
            streams=np.zeros(settings.stream_shape(plan).layout().nbytes, np.uint8),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """An engine and what it is made of."""

    plan: ModelPlan
    lane: Lane
    slots: SlotTable
    streams: StreamMemory
    memory: ExpertMemory
    runner: ExpertRunner
    engine: Engine
    crew: Crew
    resizer: Resizer | None
    """None where the memory cannot be given back."""
    order: list[int]
    """All experts by key, those first that are to be read first."""


def assemble(
    plan: ModelPlan,
    file: GgufFile,
    arenas: EngineArenas,
    lane: Lane,
    settings: EngineSettings,
    *,
    make_crew: Callable[[Bytes], Crew] = lambda dense: Crew(1),
    counts: SavedCounts | None = None,
    log: RoutingLog | None = None,
    observer: Observer | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Assembly:
    """Return an engine for `plan` over `arenas`, whose workers are behind `lane`.

    What a predecessor left in the arenas is taken over. `make_crew` is called with the filled dense weights;
    `counts` is what was used at an earlier start. Raises ModelFileError or ModelReadError.
    """
    with GgufFile.open(file.path) as own:  # a mapping that goes, and all pages read through it
        fill_dense(plan, own, arenas.dense, lambda done, total: progress("weights", done, total))
    slots = SlotTable(arenas.weights, settings.classes)
    h = plan.hyper
    limits = settings.limits or [count for count, _ in settings.classes]
    policy = _policy(plan, limits, counts)
    owned = owners(h.moe_layers, h.experts, [1.0] * settings.workers)
    memory = ExpertMemory(plan, slots, settings.classes, owned, policy)
    resizer = None
    if arenas.resizable is not None:
        resizer = Resizer(memory, slots, arenas.resizable, settings.classes, limits)
    streams = StreamMemory(settings.stream_shape(plan), arenas.streams)
    runner = ExpertRunner(plan, file, lane, memory)
    crew = make_crew(arenas.dense)
    weights = DenseWeights(plan, arenas.dense, crew, observer)
    return Assembly(
        plan=plan,
        lane=lane,
        slots=slots,
        streams=streams,
        memory=memory,
        runner=runner,
        engine=Engine(plan, weights, streams, runner, settings.max_batch_tokens, settings.prefetch, log),
        crew=crew,
        resizer=resizer,
        order=reading_order(policy, len(h.moe_layers), h.experts).tolist(),
    )


def _policy(plan: ModelPlan, limits: Sequence[int], counts: SavedCounts | None) -> Policy | None:
    """Return who decides who gives way, None while there is a slot for every expert.

    With precisions there is one in any case: what is used decides about the assignment of the next start.
    """
    if sum(limits) >= plan.num_experts and not plan.assignment:
        return None
    policy = new_policy(plan.num_experts, len(plan.hyper.moe_layers))
    if counts is not None:
        counts.load(policy)
    return policy
