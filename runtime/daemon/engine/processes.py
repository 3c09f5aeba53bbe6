"""Keeps scheduler and workers alive: carries out what `Restarts` orders, and tells it what happens.

A worker that ends is replaced and finds its experts in the arena; the scheduler repeats the step. A scheduler
that ends is replaced together with the workers, and is told of all running streams again: their tokens and KV
lie in memory that belongs to the daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ....shm.errors import StartFailed, SternaError
from ...processes.placement import Placed, Placement
from ..tasks import TaskSet
from .link import EngineLink
from .presence import EnginePresence
from .recipes import EngineRecipes
from .restarts import SCHEDULER, BeginGeneration, EndAll, GiveUp, Member, Order, Restarts, StartMember

log = logging.getLogger("sterna.engine")

KILL_TIMEOUT_S = 2.0
# The last message of a scheduler that ends may still be on the way, and says more than its exit code.
LAST_WORDS_S = 0.2


class EngineProcesses:
    """One scheduler with its workers.

    on_lost is called in the loop when the engine cannot be kept alive; has_work tells whether requests run.
    """

    def __init__(
        self,
        workers: int,
        placement: Placement,
        recipes: EngineRecipes,
        link: EngineLink,
        group: asyncio.TaskGroup,
        start_timeout_s: float,
    ) -> None:
        """`group`: the parent of the tasks that start processes."""
        self._loop = asyncio.get_running_loop()
        self._restarts = Restarts(workers)
        self._num_workers = workers
        self._placement = placement
        self._recipes = recipes
        self._link = link
        self._start_timeout_s = start_timeout_s
        self._tasks = TaskSet(group)
        self._placed: dict[int, tuple[Member, Placed]] = {}  # by incarnation
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._overdue: asyncio.TimerHandle | None = None
        self._stopping = False
        self.on_lost: Callable[[SternaError], None] = lambda error: None
        self.has_work: Callable[[], bool] = lambda: False
        link.on_ready = self._on_ready
        link.on_worker_ready = self._on_worker_ready
        link.on_step_done = self._restarts.step_done
        link.on_trouble = self._on_trouble

    async def start(self) -> None:
        """Start scheduler and workers and return when the engine is ready.

        Raises StartFailed, or the error that the scheduler met while loading.
        """
        self._carry_out(self._restarts.begin(self._loop.time()))
        # Bounded: `_overdue` ends it.
        await asyncio.wait([self._started])
        self._started.result()

    def close(self) -> None:
        """Replace nobody any more. The processes are left to whoever placed them."""
        self._stopping = True
        if self._overdue is not None:
            self._overdue.cancel()
        self._tasks.cancel()

    def presence(self) -> EnginePresence:
        """Return which processes of the engine are there."""
        restarts = self._restarts
        return EnginePresence(
            scheduler=restarts.scheduler_ready,
            workers_missing=restarts.workers_missing,
            workers_missing_since_s=restarts.workers_missing_since_s,
            scheduler_restarts=restarts.scheduler_restarts,
            worker_restarts=restarts.worker_restarts,
            pids={str(member): placed.pid for member, placed in self._placed.values()},
        )

    # ---- orders ----

    def _carry_out(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if self._stopping:
                return
            match order:
                case BeginGeneration(generation=generation):
                    self._begin(generation)
                case StartMember():
                    self._tasks.start(self._start(order), f"start {order.member}")
                case EndAll(why=why):
                    self._link.lost(why)
                    for incarnation in list(self._placed):
                        self._kill(incarnation)
                case GiveUp(error=error):
                    self._give_up(error)

    def _begin(self, generation: int) -> None:
        self._link.begin(generation)
        if self._overdue is not None:
            self._overdue.cancel()
        late = StartFailed(f"the engine was not ready after {self._start_timeout_s:.0f} s")
        self._overdue = self._loop.call_later(
            self._start_timeout_s, lambda: self._carry_out(self._restarts.overdue(generation, late))
        )

    async def _start(self, order: StartMember) -> None:
        await asyncio.sleep(order.after_s)
        if self._stopping or not self._restarts.due(order.incarnation):
            return
        try:
            placed = await self._placement.start(self._recipes.launch(order))
        except StartFailed as error:
            self._carry_out(self._restarts.start_failed(order.incarnation, error))
            return
        self._placed[order.incarnation] = (order.member, placed)
        placed.on_end(lambda: self._process_ended(order.incarnation))
        if not self._restarts.wanted(order.incarnation):
            self._kill(order.incarnation)

    def _kill(self, incarnation: int) -> None:
        """End a process; what the system cannot end within a bound does not hold up its successor."""
        member, placed = self._placed[incarnation]
        placed.kill()
        why = f"{member} did not end within {KILL_TIMEOUT_S:.0f} s"
        self._loop.call_later(KILL_TIMEOUT_S, self._report_end, incarnation, why)

    def _give_up(self, error: SternaError) -> None:
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # seen, though nobody may wait any more
            return
        log.error("engine.lost error=%r", str(error))
        self.on_lost(error)

    # ---- events ----

    def _process_ended(self, incarnation: int) -> None:
        found = self._placed.pop(incarnation, None)
        if found is None or self._stopping:
            return
        member, placed = found
        why = placed.describe()
        if self._restarts.wanted(incarnation):
            log.warning("process.lost name=%r pid=%d status=%r", str(member), placed.pid, why)
        if member == SCHEDULER and not self._restarts.scheduler_ready:
            self._loop.call_later(LAST_WORDS_S, self._report_end, incarnation, f"the {why}")
        else:
            self._report_end(incarnation, f"the {why}" if member == SCHEDULER else why)

    def _report_end(self, incarnation: int, why: str) -> None:
        now_s = self._loop.time()
        self._carry_out(self._restarts.ended(incarnation, why, now_s, busy=self.has_work()))

    def _on_ready(self) -> None:
        self._carry_out(self._restarts.member_ready(SCHEDULER))
        if not self._restarts.scheduler_ready:
            return  # it ended meanwhile
        if self._overdue is not None:
            self._overdue.cancel()
        if self._started.done():
            self._link.serve_again()
        else:
            self._link.serve()
            self._started.set_result(None)

    def _on_worker_ready(self, index: int) -> None:
        if index < self._num_workers:
            self._carry_out(self._restarts.member_ready(Member(index)))

    def _on_trouble(self, error: SternaError) -> None:
        self._carry_out(self._restarts.trouble(error, busy=self.has_work()))
