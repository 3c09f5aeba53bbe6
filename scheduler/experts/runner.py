"""Carries one layer's batch of experts out: computes what is in memory, and the rest as it is read.

What is here is sent first, so that it is computed while the rest is read. When a batch needs more
experts than there are slots (a long prompt), it goes in waves: each expert is read once, computed, and
gives its slot to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...shm.errors import InternalError, ModelFileError, ModelReadError, SternaError
from ...workers.checkpoint.file.gguf import GgufFile
from ...workers.checkpoint.held.formats import ActivationKind
from ...workers.kernels.routing.top_k import scatter_pairs
from ...workers.messages import ExpertPage
from ..decoder.dense import Rows
from ..lane.interface import Computed, Lane, Loaded, WorkerBatch
from ..model.plan import ModelPlan
from ..residency.expert_memory import ExpertMemory, Load
from ..residency.latency import LatencyHistogram
from .groups import ExpertGroups

log = logging.getLogger("sterna.scheduler")

# Below this many tokens all rows go to every worker: finding out which it needs costs more.
FEW_TOKENS = 4
# The fewest experts read at a time for a batch that needs more than its layer's share of the slots.
LEAST_READING = 8

Indices = npt.NDArray[np.int32]


class UnreadableExpert(ModelReadError):
    """An expert that a step needs cannot be read; who does not need it can go on.

    rows: of the step's batch, those that were routed to the expert.
    """

    def __init__(self, text: str, rows: Indices) -> None:
        super().__init__(text)
        self.rows = rows


class SpoiledExpert(ModelFileError):
    """An expert that a step needs was read, and its bytes are no weights; `rows` as of `UnreadableExpert`."""

    def __init__(self, text: str, rows: Indices) -> None:
        super().__init__(text)
        self.rows = rows


@dataclass(slots=True)
class Counts:
    """What happened since the start; an event is one layer of one step.

    by_layer: int64 (MoE layers, 2), the distinct experts and the hits of each.
    """

    by_layer: npt.NDArray[np.int64]

    events: int = 0
    logical: int = 0  # (token, expert) pairs asked for
    distinct: int = 0  # different experts of each event, summed
    hits: int = 0  # of them in memory at the start of the event
    fetched: int = 0
    fetched_bytes: int = 0
    foreseen: int = 0  # asked for before they were needed


@dataclass(slots=True)
class _LayerEvent:
    """One layer of one step; an ordinal is an expert's in its `ExpertOrder`."""

    layer: int
    rows: Rows
    count: int
    groups: ExpertGroups
    ends: list[int]
    y: npt.NDArray[np.float32]
    computing: dict[int, tuple[list[int], Indices, Indices]] = field(default_factory=dict)
    """By request: the ordinals of its experts, and the tokens and ranks of its pairs."""
    loading: dict[int, int] = field(default_factory=dict)
    """By request: the ordinal that is read."""
    after: dict[int, int] = field(default_factory=dict)
    """By ordinal: the one that gets its slot once it is computed."""
    held: dict[int, int] = field(default_factory=dict)
    """By request: the ordinal that gets the slot that is being read into."""


class ExpertOrder:
    """The experts of one layer in the order (owner, precision, id): what makes a batch are neighbours.

    ordinal_of: int32 (experts,), an expert's number in that order; experts: the inverse; batch: by ordinal
    the worker that owns the expert and the precision it is held in.
    """

    def __init__(self, owner: Sequence[int], precision: Sequence[int]) -> None:
        count = len(owner)
        of_expert = list(zip(owner, precision, strict=True))
        self.experts = sorted(range(count), key=lambda expert: (*of_expert[expert], expert))
        self.ordinal_of = np.empty(count, np.int32)
        self.ordinal_of[self.experts] = np.arange(count)
        self.batch = [of_expert[expert] for expert in self.experts]


class ExpertRunner:
    """Runs groups of (token, rank) pairs through the lane; see the module."""

    def __init__(self, plan: ModelPlan, file: GgufFile, lane: Lane, memory: ExpertMemory) -> None:
        self.plan = plan
        self._file = file
        self._lane = lane
        self.memory = memory
        h = plan.hyper
        self.counts = Counts(np.zeros((len(h.moe_layers), 2), np.int64))
        self.latency = LatencyHistogram()
        self._unreadable: set[int] = set()  # keys whose last read failed: said once in the log
        self._event: _LayerEvent | None = None
        keys = {layer: [plan.key_of(layer, expert) for expert in range(h.experts)] for layer in h.moe_layers}
        self.orders = {
            layer: ExpertOrder(
                [memory.owner(key) for key in of_layer], list(map(plan.precision_of, of_layer))
            )
            for layer, of_layer in keys.items()
        }

    def run(
        self,
        layer: int,
        rows: Rows,
        count: int,
        groups: ExpertGroups,
        y: npt.NDArray[np.float32],
        meanwhile: Callable[[], None],
    ) -> None:
        """Write the outputs of all pairs of `groups` (in the order of `orders`) to y[token, rank].

        `meanwhile` is called once, while workers compute and read. Raises WorkerLost, InternalError, or what
        reading an expert met (UnreadableExpert, SpoiledExpert); `y` is then not to be used.
        """
        event = self._event = _LayerEvent(layer, rows, count, groups, groups.ends.tolist(), y)
        ordinals: list[int] = groups.experts.tolist()
        keys = [self._key(event, ordinal) for ordinal in ordinals]
        tokens = np.diff(groups.ends)[ordinals].astype(np.float32)
        self.memory.begin(np.array(keys, np.int32), tokens)
        try:
            self._start(event, ordinals, keys)
            meanwhile()
            while event.computing or event.loading or event.held:
                self._continue(event)
        except BaseException:
            self._lane.give_up()
            raise
        finally:
            self._event = None
            self.memory.end()

    def _key(self, event: _LayerEvent, ordinal: int) -> int:
        return self.plan.key_of(event.layer, self.orders[event.layer].experts[ordinal])

    def _start(self, event: _LayerEvent, ordinals: list[int], keys: list[int]) -> None:
        here: list[int] = []
        missing: list[int] = []
        for ordinal, key in zip(ordinals, keys, strict=True):
            if self.memory.ready(key):
                here.append(ordinal)
            elif (request := self.memory.request_of(key)) is not None:
                event.loading[request] = ordinal
                self._hurry(key)
            else:
                missing.append(ordinal)
        counts = self.counts
        counts.events += 1
        counts.logical += event.ends[-1]
        counts.distinct += len(ordinals)
        hits = len(here) + len(event.loading)
        counts.hits += hits
        counts.by_layer[event.layer - self.plan.hyper.dense_layers] += (len(ordinals), hits)
        self._find_slots(event, missing, here)
        batch = self.orders[event.layer].batch
        first = 0
        for i in range(1, len(here) + 1):
            if i == len(here) or batch[here[i]] != batch[here[first]]:
                self._compute(event, here[first:i])
                first = i

    def _find_slots(self, event: _LayerEvent, missing: list[int], here: list[int]) -> None:
        """Decide which slot each missing expert gets, now or later, whatever comes first in time.

        The first ones get those that the policy gives up. Of a long batch the others take over, in turn, the
        slots of experts that it has computed: those of other layers are worth more.
        """
        of_class: dict[int, list[int]] = {}
        for ordinal in missing:
            of_class.setdefault(self.memory.class_of(self._key(event, ordinal)), []).append(ordinal)
        for slot_class, wanted in of_class.items():
            given = 0
            for ordinal in wanted[
                : max(LEAST_READING, self.memory.limits[slot_class] // self.memory.num_layers)
            ]:
                if not self._claim(event, ordinal):
                    break
                given += 1
            givers = wanted[:given] or [
                ordinal
                for ordinal in (*here, *event.loading.values())
                if self.memory.class_of(self._key(event, ordinal)) == slot_class
            ]
            later = wanted[given:]
            if later and not givers:
                raise InternalError(f"layer {event.layer}: no slot is left for {len(later)} experts")
            event.after.update(zip([*givers, *later], later, strict=False))

    def _claim(self, event: _LayerEvent, ordinal: int) -> bool:
        """Have an expert read into a free slot or the policy's victim's; return whether there is one."""
        key = self._key(event, ordinal)
        slot = self.memory.free_slot(key)
        if slot is None:
            victim = self.memory.victim(key)
            if victim < 0:
                return False
            request = self.memory.request_of(victim)
            if request is not None:  # foreseen, and not even there yet: it gives way when it is
                self.memory.pin(victim)
                event.held[request] = ordinal
                return True
            slot = self.memory.take(victim)
        self._read_for(event, ordinal, slot)
        return True

    def _read_for(self, event: _LayerEvent, ordinal: int, slot: int) -> None:
        event.loading[self.read(self._key(event, ordinal), slot, urgent=True)] = ordinal

    def _continue(self, event: _LayerEvent) -> None:
        """Wait for one answer and do what it makes possible."""
        loading = [*event.loading, *event.held]
        if not event.computing and not loading:
            loading = self.memory.requests
        answer = self._lane.collect(event.computing, loading, f"layer {event.layer}")
        if isinstance(answer, Computed):
            self._computed(event, answer)
        else:
            self._loaded(event, answer)

    def _computed(self, event: _LayerEvent, answer: Computed) -> None:
        ordinals, tokens, ranks = event.computing.pop(answer.seq)
        scatter_pairs(answer.rows, tokens, ranks, 0, len(tokens), event.y)
        for ordinal in ordinals:
            if (following := event.after.pop(ordinal, None)) is not None:
                self._read_for(event, following, self.memory.take(self._key(event, ordinal)))

    def _loaded(self, event: _LayerEvent, answer: Loaded) -> None:
        load = self.take_loaded(answer)
        if (ordinal := event.loading.pop(answer.seq, None)) is not None:
            if answer.error is not None:
                raise self._unreadable_for(event, ordinal, answer.error)
            self._compute(event, [ordinal])
        elif load is not None and (ordinal := event.held.pop(answer.seq, None)) is not None:
            slot = self.memory.free_slot(load.key) if answer.error else self.memory.take(load.key)
            if slot is None:
                raise InternalError(f"layer {event.layer}: the slot of a failed read is gone")
            self._read_for(event, ordinal, slot)

    def _unreadable_for(self, event: _LayerEvent, ordinal: int, error: SternaError) -> SternaError:
        first, last = event.ends[ordinal], event.ends[ordinal + 1]
        rows = event.groups.tokens[first:last]
        if isinstance(error, ModelReadError):
            return UnreadableExpert(str(error), rows.copy())
        return SpoiledExpert(str(error), rows.copy()) if isinstance(error, ModelFileError) else error

    def take_loaded(self, answer: Loaded) -> Load | None:
        """Note the end of a read, whoever asked for it; return what it was, None if nobody knows any more."""
        if answer.error is not None:
            failed = self.memory.failed(answer.seq)
            if failed is not None and failed.key not in self._unreadable:
                self._unreadable.add(failed.key)
                layer, expert = divmod(failed.key, self.plan.hyper.experts)
                log.warning(
                    "read.failed layer=%d expert=%d worker=%d error=%r",
                    layer + self.plan.hyper.dense_layers, expert, failed.worker, str(answer.error),
                )  # fmt: skip
            return failed
        load = self.memory.loaded(answer.seq)
        if load is not None:
            self._unreadable.discard(load.key)
            self.counts.fetched += 1
            self.counts.fetched_bytes += answer.nbytes
            self.latency.record(answer.busy_ns)
        return load

    @property
    def waited_ns(self) -> int:
        """Time spent waiting for experts and nothing else."""
        return self._lane.waited_ns

    def prefetch(self, keys: Sequence[int]) -> list[int]:
        """Ask for experts that may soon be wanted; return those there was room for. Raises WorkerLost.

        Called from `meanwhile` of `run`.
        """
        asked = []
        for key in keys:
            slot = self.memory.free_slot(key)
            if slot is None:
                victim = self.memory.victim(key, foreseen=True)
                if victim < 0:
                    continue
                while self._event is not None and self.memory.request_of(victim) is not None:
                    self._continue(self._event)  # rare: two steps old, and still not read
                slot = self.memory.take(victim)
            self.read(key, slot, urgent=False)
            self.counts.foreseen += 1
            asked.append(key)
        return asked

    def read(self, key: int, slot: int, *, urgent: bool) -> int:
        """Have an expert read into a slot claimed for it; return the request. Raises WorkerLost."""
        try:
            request = self._lane.page_in(self.memory.owner(key), self._page(key, slot), urgent=urgent)
        except BaseException:
            self.memory.give_back(key, slot)
            raise
        self.memory.loading(request, key, slot, awaited=urgent)
        return request

    def _hurry(self, key: int) -> None:
        """Ask again, urgently now, for an expert that is on its way; the first request has the answer."""
        self._lane.page_in(
            self.memory.owner(key), self._page(key, int(self.memory.slot_of[key])), urgent=True
        )

    def _page(self, key: int, slot: int) -> ExpertPage:
        layer, expert = divmod(key, self.plan.hyper.experts)
        first, precision = self.plan.hyper.dense_layers, self.plan.precision_of(key)
        return self.plan.expert_page(self._file, layer + first, expert, slot, precision)

    def _compute(self, event: _LayerEvent, ordinals: list[int]) -> None:
        """Send the experts at `ordinals`, all of one worker and precision, as one batch."""
        ends, groups = event.ends, event.groups
        first, last = ends[ordinals[0]], ends[ordinals[-1] + 1]
        starts = [0]
        for ordinal in ordinals:
            starts.append(starts[-1] + ends[ordinal + 1] - ends[ordinal])
        tokens, ranks = groups.tokens[first:last], groups.ranks[first:last]
        if starts[-1] != last - first:  # there are others between
            picked = np.concatenate([np.arange(ends[ordinal], ends[ordinal + 1]) for ordinal in ordinals])
            tokens, ranks = groups.tokens[picked], groups.ranks[picked]
        order = self.orders[event.layer]
        worker, precision = order.batch[ordinals[0]]
        kind = self.plan.expert_activation(event.layer, precision)
        needed, index = _needed(tokens, event.count)
        batch = WorkerBatch(
            worker=worker,
            layer=event.layer,
            precision=precision,
            activation_kind=int(kind),
            experts=[order.experts[ordinal] for ordinal in ordinals],
            slots=[int(self.memory.slot_of[self._key(event, ordinal)]) for ordinal in ordinals],
            starts=starts,
            rows=index,
            activations=_take(event.rows, kind, needed, event.count),
        )
        event.computing[self._lane.compute(batch)] = (ordinals, tokens, ranks)


def _needed(tokens: Indices, count: int) -> tuple[Indices | slice, Indices]:
    """Return the rows a batch needs and, for each pair, the index of its row among them."""
    if count <= FEW_TOKENS:
        return slice(count), tokens
    needed, row_index = np.unique(tokens, return_inverse=True)
    return needed, row_index.astype(np.int32)


def _take(
    rows: Rows, kind: ActivationKind, needed: Indices | slice, count: int
) -> tuple[npt.NDArray[np.generic], ...]:
    """Return the `needed` rows in the form that `kind` asks for."""
    if kind is ActivationKind.FLOAT:
        return (rows.x[needed],)
    q = rows.quantized(kind, count)
    return q.q[needed], q.scales[needed], q.sums[needed]
