"""Which routed expert lies in which slot, which are being read, and who gives way. No lane, no clock.

Not in here: how the choice of a victim is made (`policies`), and carrying it out (`expert_runner`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from ...shm.slots import SlotClasses, SlotTable
from ..model.plan import ModelPlan
from .policies import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """An expert on its way into its slot, and the worker that reads it."""

    key: int
    worker: int


class ExpertMemory:
    """The slots of the arena as the scheduler uses them. A key is `ModelPlan.key_of`.

    slot_of: int32 (experts of all layers,), -1 for an expert without a slot; resident: uint8, 1 for one that
    has a slot, be it still on its way: what the router is told, so that its choice does not depend on the
    disk.
    """

    def __init__(
        self,
        plan: ModelPlan,
        slots: SlotTable,
        classes: SlotClasses,
        owners: Mapping[tuple[int, int], int],
        policy: Policy | None,
    ) -> None:
        """Take over what lies in the slots. `policy` may be None when there is a slot for every expert.

        It may also be there to count: what was used decides about precisions at the next start.
        """
        self._plan = plan
        self._slots = slots
        self._policy = policy
        self.num_experts = plan.num_experts
        self.num_layers = len(plan.hyper.moe_layers)
        self.slot_of = np.full(self.num_experts, -1, np.int32)
        self.resident = np.zeros(self.num_experts, np.uint8)
        self._owner = np.zeros(self.num_experts, np.int32)
        for (layer, expert), worker in owners.items():
            self._owner[plan.key_of(layer, expert)] = worker
        sizes = [nbytes for _, nbytes in classes]
        self._class_of = np.array([sizes.index(nbytes) for nbytes in plan.slot_nbytes().tolist()], np.int32)
        self._holds_all = policy is None or slots.num_slots >= plan.num_experts
        self._ends = [0, *accumulate(count for count, _ in classes)]
        self.limits = [count for count, _ in classes]
        self._key_of = np.full(slots.num_slots, -1, np.int32)
        self._ready = np.zeros(self.num_experts, np.uint8)  # resident and read whole
        self._pinned: set[int] = set()
        self._used = np.full(self.num_experts, -1, np.int64)  # the last step that used it
        self._step = 0
        self._loads: dict[int, Load] = {}
        self._on_way: dict[int, int] = {}  # key: request
        self._free: list[list[int]] = []  # of each class; the last of a list is taken first
        self._adopt()

    def _adopt(self) -> None:
        headers, plan = self._slots.headers, self._plan
        for slot in range(self._slots.num_slots):
            layer, expert = int(headers["layer"][slot]), int(headers["expert"][slot])
            if self._slots.holds(slot, layer, expert):
                key = plan.key_of(layer, expert)
                # No expert should be there twice; if one is, either copy will do.
                if self.slot_of[key] >= 0 or headers["precision"][slot] != plan.precision_of(key):
                    self._slots.clear(slot)
                else:
                    self._assign(key, slot)
                    self._ready[key] = 1
                    if self._policy is not None:
                        self._policy.admitted(key)
        self._find_free()

    def _find_free(self) -> None:
        """List the free slots of each class; the last of a list is taken first, and is the lowest."""
        self._free = [
            [slot for slot in range(first, first + limit) if self._key_of[slot] < 0][::-1]
            for first, limit in zip(self._ends, self.limits, strict=False)
        ]

    def _assign(self, key: int, slot: int) -> None:
        self.slot_of[key], self._key_of[slot], self.resident[key] = slot, key, 1

    def _remove(self, key: int) -> int:
        """Take an expert out of its slot and return that."""
        slot = int(self.slot_of[key])
        self._slots.clear(slot)
        self.slot_of[key], self._key_of[slot] = -1, -1
        self.resident[key] = self._ready[key] = 0
        if self._policy is not None:
            self._policy.evicted(key)
        return slot

    # ---- what is there ----

    @property
    def num_resident(self) -> int:
        """Experts that have a slot and are complete."""
        return int(np.count_nonzero(self._ready))

    @property
    def num_loading(self) -> int:
        """Experts on their way."""
        return len(self._loads)

    @property
    def policy(self) -> Policy | None:
        """Who decides who gives way; may be None while there is a slot for every expert."""
        return self._policy

    @property
    def holds_all(self) -> bool:
        """Whether every expert has its slot for good."""
        return self._holds_all

    def class_of(self, key: int) -> int:
        """Return the class of slots that an expert needs."""
        return int(self._class_of[key])

    def owner(self, key: int) -> int:
        """Return the worker that reads an expert in."""
        return int(self._owner[key])

    def ready(self, key: int) -> bool:
        """Return whether an expert can be computed now."""
        return bool(self._ready[key])

    @property
    def requests(self) -> list[int]:
        """The requests under which experts are on their way."""
        return list(self._loads)

    def request_of(self, key: int) -> int | None:
        """Return the request under which an expert is on its way."""
        return self._on_way.get(key)

    def resident_of_workers(self, workers: int) -> list[int]:
        """Return how many complete experts each worker owns."""
        counts: list[int] = np.bincount(self._owner[self._ready > 0], minlength=workers).tolist()
        return counts

    def missing(self, order: Iterable[int]) -> list[int]:
        """Return those keys of `order` that have no slot but a free one waiting, in that order."""
        left = [len(free) for free in self._free]
        found = []
        for key in order:
            slot_class = self._class_of[key]
            if self.slot_of[key] < 0 and left[slot_class]:
                left[slot_class] -= 1
                found.append(key)
        return found

    # ---- one event: a layer of a step ----

    def begin(self, keys: npt.NDArray[np.int32], tokens: npt.NDArray[np.float32]) -> None:
        """Note that keys[i] is used by tokens[i] tokens, all in one layer; keep the experts until `end`."""
        if self._policy is not None:
            self._policy.touch(keys, tokens)
        self._pinned.update(keys.tolist())
        self._used[keys] = self._step

    def step(self) -> None:
        """Start a step: what the one before used is not to give way to what is only foreseen."""
        self._step += 1

    def pin(self, key: int) -> None:
        """Keep an expert until `end`, or until it is taken."""
        self._pinned.add(key)

    def end(self) -> None:
        """End the event: everything may give way again."""
        self._pinned.clear()

    def free_slot(self, key: int) -> int | None:
        """Return a slot for `key` that nobody has, None if there is none."""
        free = self._free[int(self._class_of[key])]
        return free.pop() if free else None

    def victim(self, key: int, *, foreseen: bool = False) -> int:
        """Return the expert that is to give way to `key`, be it still on its way; -1 for none.

        For a foreseen expert nobody gives way who was used in this step or the one before. What has been read
        so far does not count: the choice must be the same whatever the disk does.
        """
        if self._policy is None:
            return -1
        candidates = self.resident & (self._class_of == self._class_of[key])
        if foreseen:
            candidates &= self._used < self._step - 1
        if self._pinned:
            candidates[list(self._pinned)] = 0
        return self._policy.victim(candidates)

    def take(self, victim: int) -> int:
        """Take a complete expert out of its slot and return that."""
        self._pinned.discard(victim)
        return self._remove(victim)

    def loading(self, request: int, key: int, slot: int, *, awaited: bool) -> None:
        """Note that `request` reads an expert into a slot that was claimed for it."""
        self._assign(key, slot)
        if not awaited:
            self._used[key] = self._step
        self._loads[request] = Load(key=key, worker=self.owner(key))
        self._on_way[key] = request
        if self._policy is not None:
            self._policy.admitted(key)

    def give_back(self, key: int, slot: int) -> None:
        """Give a slot back that was meant for `key`: the request could not be sent."""
        self._free[int(self._class_of[key])].append(slot)

    def loaded(self, request: int) -> Load | None:
        """Note that an expert is complete; None for a request that is not known any more."""
        load = self._loads.pop(request, None)
        if load is not None:
            del self._on_way[load.key]
            self._ready[load.key] = 1
        return load

    def failed(self, request: int) -> Load | None:
        """Note that an expert could not be read: its slot is free again."""
        load = self._loads.pop(request, None)
        if load is not None:
            del self._on_way[load.key]
            slot = self._remove(load.key)
            self._free[int(self._class_of[load.key])].append(slot)
        return load

    def worker_lost(self, worker: int) -> None:
        """Note that nothing comes any more of what a worker was reading."""
        for request in [request for request, load in self._loads.items() if load.worker == worker]:
            self.failed(request)

    # ---- more and less memory ----

    def use_policy(self, policy: Policy) -> None:
        """From now on there may be fewer slots than experts: `policy` says who gives way."""
        for key in self._ready.nonzero()[0].tolist():
            policy.admitted(key)
        self._policy = policy

    def resize(self, limits: Sequence[int]) -> list[int]:
        """Use only the first `limits` slots of each class; return those that are no longer used.

        Experts beyond the limit are given up. Call it between steps; what is being read stays until it is
        there, so call again when `num_loading` was not 0.
        """
        gone = []
        for first, end, limit in zip(self._ends, self._ends[1:], limits, strict=False):
            for slot in range(first + limit, end):
                key = int(self._key_of[slot])
                if key >= 0 and self._ready[key]:
                    self._remove(key)
                if self._key_of[slot] < 0:
                    gone.append(slot)
        self.limits = list(limits)
        self._holds_all = self._holds_all and sum(limits) >= self.num_experts
        self._find_free()
        return gone
