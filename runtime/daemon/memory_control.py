"""Memory while the daemon runs: a new budget on request, fewer slots under pressure, more when it is calm.

Each change goes to the scheduler and counts when it has answered; a new scheduler is told what counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

from ...shm.errors import BadRequest, ConfigError, OutOfResources, Overloaded, SternaError
from ..config import read_size
from ..memory.budget import BudgetTooSmall, SlotDecision, least_slots, spread
from ..memory.pressure import Governor, Pressure, read_pressure
from ..memory.room import Room, read_room
from ..sizes import format_given, format_size
from .engine.link import EngineLink
from .model.model_memory import ModelMemory
from .model.served_model import ServedModel

log = logging.getLogger("sterna.memory")

WATCH_S = 1.0


class MemoryControl:
    """Changes how many slots of a model are used; one change at a time."""

    def __init__(
        self, model: ServedModel, memory: ModelMemory, engine: EngineLink, root: Path = Path("/")
    ) -> None:
        """root: where /proc and /sys are read."""
        self._model = model
        self._memory = memory
        self._engine = engine
        self._root = root
        self._changing = asyncio.Lock()
        self._wished = memory.decision  # as the user set it; pressure goes below
        least = sum(least_slots(model.plan, model.slots))
        self._governor = Governor(least, memory.decision.num_slots, time.monotonic())

    async def resize(self, text: str) -> dict[str, object]:
        """Use as much memory as `text` says ("auto": as at the start); return what is held then.

        Raises BadRequest for what is no size, OutOfResources for one that the model does not fit into, that
        is beyond the start's or more than the machine has, Overloaded when there is no memory to grow into.
        """
        try:
            nbytes = self._model.budget.nbytes if text == "auto" else self._read_size(text)
            decision = self._model.plan_resize(nbytes)
        except ConfigError as error:
            raise BadRequest(str(error)) from None
        except BudgetTooSmall as error:
            raise OutOfResources(error.facts) from None  # context and sequences are those of the start
        async with self._changing:
            try:
                freed = await self._change(decision)
            except OutOfResources as error:
                raise Overloaded(str(error)) from None
            self._wished = decision
            self._governor.restart(decision.num_slots, time.monotonic())
        log.info(
            "memory.resized budget=%r slots=%d experts=%d freed=%r",
            format_size(nbytes), decision.num_slots, decision.num_experts, format_size(freed),
        )  # fmt: skip
        return {
            "memory_bytes": nbytes,
            "used_bytes": decision.total,
            "slots": decision.num_slots,
            "experts": decision.num_experts,
            "share": round(decision.share, 4),
            "freed_bytes": freed,
        }

    def _read_size(self, text: str) -> int:
        """Return the bytes of a size; raises ConfigError, and OutOfResources if no such memory exists."""
        nbytes = read_size(text, "memory")
        room = read_room(self._root)
        if nbytes > room.total:
            owner = "the limit of its cgroup is" if room.limited else "this machine has"
            raise OutOfResources(f"memory is {format_given(nbytes)}, but {owner} {format_size(room.total)}")
        return nbytes

    async def watch(self) -> None:
        """Shrink and grow with the memory of the machine, for ever."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                room = read_room(self._root)
            except (OSError, SternaError):
                continue  # a /proc that is not there tells nothing
            if not self._changing.locked():
                await self._follow(read_pressure(room, self._root), room)

    async def _follow(self, pressure: Pressure, room: Room) -> None:
        governor, now_s = self._governor, time.monotonic()
        wanted, before = governor.decide(pressure, now_s), governor.slots
        if wanted == before:
            return
        decision = self._with_slots(wanted)
        growth = decision.rows["slots"] - self._memory.decision.rows["slots"]
        if growth > room.usable:
            governor.settle(before, now_s)
            return
        async with self._changing:
            try:
                freed = await self._change(decision)
            except SternaError as error:
                governor.settle(before, now_s)
                log.warning("memory.unchanged error=%r", str(error))
                return
            governor.settle(decision.num_slots, now_s)
        log.warning(
            "memory.%s slots=%d of=%d freed=%r stalled_percent=%.1f free_share=%.3f",
            "grown" if growth > 0 else "shrunk", decision.num_slots, self._wished.num_slots,
            format_size(freed), pressure.stalled, pressure.free_share,
        )  # fmt: skip

    def _with_slots(self, wanted: int) -> SlotDecision:
        wished = self._wished
        counts = spread(self._model.plan, wished.classes, wanted)
        classes = [(count, nbytes) for count, (_, nbytes) in zip(counts, wished.classes, strict=True)]
        rows = {**wished.rows, "slots": sum(count * nbytes for count, nbytes in classes)}
        return replace(wished, classes=classes, rows=rows, why=f"{sum(counts)} slots for now")

    async def _change(self, decision: SlotDecision) -> int:
        """Have the scheduler use the slots of `decision`; return the bytes that are free for it.

        Raises OutOfResources before anything is done where the memory to grow into is not there (a cgroup
        kills whoever takes more than its limit), and EngineLost.
        """
        growth = decision.rows["slots"] - self._memory.decision.rows["slots"]
        if growth > 0 and growth > (room := read_room(self._root)).available:
            raise OutOfResources(
                f"{format_size(growth)} more are needed, but {format_size(room.available)} are {room.source}"
            )
        resized = await self._engine.resize(self._memory.begin_resize(decision))
        self._memory.resized(decision)
        return resized.freed_bytes
