"""Who of the engine is started when, and when it is given up: events in, instructions out.

In here: the decisions, without a clock, a process or a socket. Not in here: carrying them out
(`processes.py`) and the means to start a process (`processes/placement.py`).

A worker that ends alone is started again. When the scheduler ends, everything is ended and started again, in
a new generation with a lane of its own:

    running --scheduler ended--> ending --the last process has ended--> running (next generation)
       |                            |
       +----------------------------+--started in vain too often--> given up

Only an end that comes before a process is ready delays its successor; one that was ready is replaced at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ....shm.errors import EngineLost, StartFailed, SternaError

BACKOFF_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
"""Delay of the next start, by how many starts in a row failed before it."""
MAX_FAILED_STARTS = len(BACKOFF_S)
"""A worker that fails this often in a row, with no step of the engine in between, is given up."""
MAX_SCHEDULER_DEATHS = 3
"""A scheduler that ends this often in a row without finishing a step is given up."""


@dataclass(frozen=True, slots=True)
class Member:
    """One that belongs to an engine: the scheduler (`worker` is None) or a worker by its index."""

    worker: int | None = None

    def __str__(self) -> str:
        """Return the name under which it is logged and shown."""
        return "scheduler" if self.worker is None else f"worker {self.worker}"


SCHEDULER = Member()


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginGeneration:
    """Nothing of earlier generations lives: release what waited for that. `StartMember`s follow."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartMember:
    """Start a process after a delay, if `Restarts.due` still wants it by then."""

    member: Member
    generation: int
    incarnation: int
    """Number of this start; no other start has it."""
    after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EndAll:
    """Kill every process, also those that are being started, and report each end."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Nothing is started any more; `error` is the daemon's."""

    error: SternaError


Order = BeginGeneration | StartMember | EndAll | GiveUp


@dataclass(slots=True)
class _Seat:
    """What is known of one member."""

    incarnation: int = 0
    """The start that counts; reports on others are late."""
    state: Literal["absent", "ordered", "live"] = "absent"
    ready: bool = False
    failed_starts: int = 0
    """Ends in a row, each of them before the process was ready."""
    failed_since_step: int = 0
    """Such ends since the engine last finished a step."""


class Restarts:
    """Keeps one scheduler and `workers` workers alive, as far as that makes sense.

    Every method that takes an event returns what is to be done now. `now_s`: a clock that never goes back.
    """

    def __init__(self, workers: int) -> None:
        self._seats = {SCHEDULER: _Seat(), **{Member(index): _Seat() for index in range(workers)}}
        self._living: dict[int, Member] = {}  # started and not yet ended, by incarnation
        self._phase: Literal["new", "running", "ending", "given up"] = "new"
        self._generation = 0
        self._incarnation = 0
        self._was_ready = False
        self._deaths = 0  # of schedulers since the last step
        self._missing_since_s = 0.0
        self.scheduler_restarts = 0
        self.worker_restarts = 0

    # ---- what is known ----

    @property
    def scheduler_ready(self) -> bool:
        """Whether the scheduler has loaded the model and lives."""
        return self._phase == "running" and self._seats[SCHEDULER].ready

    @property
    def workers_missing(self) -> list[int]:
        """Workers that are dead, starting, or not yet taken in by the scheduler."""
        return [index for index, seat in self._workers() if not seat.ready]

    @property
    def workers_missing_since_s(self) -> float | None:
        """Since when at least one worker is missing; None while all are there."""
        return self._missing_since_s if self.workers_missing else None

    def wanted(self, incarnation: int) -> bool:
        """Return whether a process that has just been started is to live on."""
        member = self._living.get(incarnation)
        return self._phase == "running" and member is not None

    # ---- events ----

    def begin(self, now_s: float) -> list[Order]:
        """Start the engine for the first time."""
        self._missing_since_s = now_s
        return self._start_generation()

    def due(self, incarnation: int) -> bool:
        """Return whether a start whose delay is over is still wanted; if so, it counts as living."""
        for member, seat in self._seats.items():
            if seat.incarnation == incarnation and seat.state == "ordered" and self._phase == "running":
                seat.state = "live"
                self._living[incarnation] = member
                return True
        return False

    def start_failed(self, incarnation: int, error: SternaError) -> list[Order]:
        """The process could not be started at all: the machine refuses, and will do so again."""
        self._forget(incarnation)
        if self._phase == "ending":
            return self._after_end()
        return self._give_up(error)

    def member_ready(self, member: Member) -> list[Order]:
        """A worker was taken in by the scheduler, or the scheduler has loaded the model.

        The message does not say which incarnation it is about. One that comes late, when its sender has ended
        already, still tells that starting works: a successor that waits for its delay is started now.
        """
        seat = self._seats[member]
        seat.failed_starts = 0
        if self._phase != "running":
            return []
        if seat.state == "live":
            seat.ready = True
            self._was_ready |= member == SCHEDULER
            return []
        return [self._order_start(member, 0.0)]

    def step_done(self) -> None:
        """The engine finished a step: whatever ended its processes before is no reason to give up."""
        self._deaths = 0
        for _, seat in self._workers():
            seat.failed_since_step = 0

    def trouble(self, error: SternaError, *, busy: bool) -> list[Order]:
        """The scheduler says that it cannot go on; it may live on, so it is ended."""
        if self._phase != "running":
            return []
        if not self._seats[SCHEDULER].ready and not isinstance(error, StartFailed):
            return self._give_up(error)  # the file, the memory: a successor would meet the same
        return self._scheduler_lost(error, self._seats[SCHEDULER].ready, busy)

    def overdue(self, generation: int, error: StartFailed) -> list[Order]:
        """The time to become ready is over; without effect if that generation is ready or not the last."""
        if generation != self._generation or self._phase != "running" or self._seats[SCHEDULER].ready:
            return []
        return self._scheduler_lost(error, was_ready=False, busy=False)

    def ended(self, incarnation: int, why: str, now_s: float, *, busy: bool = False) -> list[Order]:
        """A process has ended; `busy`: requests were being computed. A repeated report has no effect."""
        member = self._living.get(incarnation)
        if member is None:
            return []
        was_ready = self._seats[member].ready
        if member != SCHEDULER and not self.workers_missing:
            self._missing_since_s = now_s
        self._forget(incarnation)
        if self._phase == "ending":
            return self._after_end()
        if self._phase != "running":
            return []
        if member == SCHEDULER:
            return self._scheduler_lost(StartFailed(why), was_ready, busy)
        return self._replace_worker(member, was_ready, why)

    # ---- decisions ----

    def _workers(self) -> Iterator[tuple[int, _Seat]]:
        return ((m.worker, seat) for m, seat in self._seats.items() if m.worker is not None)

    def _forget(self, incarnation: int) -> None:
        member = self._living.pop(incarnation, None)
        if member is not None and (seat := self._seats[member]).incarnation == incarnation:
            seat.state, seat.ready = "absent", False

    def _order_start(self, member: Member, after_s: float) -> StartMember:
        """Return the order that replaces any other that was given for this member."""
        self._incarnation += 1
        seat = self._seats[member]
        seat.incarnation, seat.state, seat.ready = self._incarnation, "ordered", False
        return StartMember(
            member=member, generation=self._generation, incarnation=self._incarnation, after_s=after_s
        )

    def _start_generation(self) -> list[Order]:
        self._generation += 1
        self._phase = "running"
        starts = [self._order_start(member, 0.0) for member in self._seats]
        return [BeginGeneration(generation=self._generation), *starts]

    def _replace_worker(self, member: Member, was_ready: bool, why: str) -> list[Order]:
        seat = self._seats[member]
        seat.failed_starts = 0 if was_ready else seat.failed_starts + 1
        seat.failed_since_step += not was_ready
        failed = seat.failed_starts
        if min(failed, seat.failed_since_step) >= MAX_FAILED_STARTS:
            text = f"{why}, {failed} times in a row before it was ready"
            return self._give_up(EngineLost(text) if self._was_ready else StartFailed(text))
        self.worker_restarts += 1
        return [self._order_start(member, BACKOFF_S[min(max(0, failed - 1), len(BACKOFF_S) - 1)])]

    def _scheduler_lost(self, error: SternaError, was_ready: bool, busy: bool) -> list[Order]:
        """Judge the end of a scheduler, or what is as bad: try again with everything new, or give up."""
        if not self._was_ready:
            return self._give_up(error)
        # One that was ready and had nothing to do did not end of its own doing.
        self._deaths = 0 if was_ready and not busy else self._deaths + 1
        if self._deaths >= MAX_SCHEDULER_DEATHS:
            return self._give_up(EngineLost(f"{error}, {self._deaths} times in a row"))
        self.scheduler_restarts += 1
        self._phase = "ending"
        for seat in self._seats.values():
            seat.ready = False
        return [EndAll(why=str(error)), *self._after_end()]

    def _after_end(self) -> list[Order]:
        return [] if self._living else self._start_generation()

    def _give_up(self, error: SternaError) -> list[Order]:
        if self._phase == "given up":
            return []
        self._phase = "given up"
        return [GiveUp(error=error)]
