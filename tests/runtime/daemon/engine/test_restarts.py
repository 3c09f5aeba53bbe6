"""Who is started again and when: single rules, and invariants over all orders of events."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sterna.runtime.daemon.engine.restarts import (
    BACKOFF_S,
    MAX_FAILED_STARTS,
    MAX_SCHEDULER_DEATHS,
    SCHEDULER,
    BeginGeneration,
    EndAll,
    GiveUp,
    Member,
    Order,
    Restarts,
    StartMember,
)
from sterna.shm.errors import EngineLost, ModelReadError, StartFailed, SternaError

WORKERS = 2


@dataclass
class World:
    """Does at once what `Restarts` orders, with numbers for processes, and checks what must always hold."""

    restarts: Restarts = field(default_factory=lambda: Restarts(WORKERS))
    now_s: float = 0.0
    scheduled: dict[int, StartMember] = field(default_factory=dict)
    living: dict[int, Member] = field(default_factory=dict)
    doomed: set[int] = field(default_factory=set)
    ready: set[int] = field(default_factory=set)
    errors: list[SternaError] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)

    def obey(self, orders: list[Order]) -> list[Order]:
        for order in orders:
            assert not self.errors, "an order after it was given up"
            match order:
                case BeginGeneration(generation=generation):
                    assert not self.living, "a generation begins while processes of the last one live"
                    self.generations.append(generation)
                case StartMember():
                    assert order.generation == self.generations[-1]
                    self.scheduled[order.incarnation] = order
                case EndAll():
                    self.doomed |= set(self.living)
                case GiveUp(error=error):
                    self.errors.append(error)
        return orders

    def begin(self) -> None:
        self.obey(self.restarts.begin(self.now_s))

    def start(self, incarnation: int) -> bool:
        order = self.scheduled.pop(incarnation)
        if not self.restarts.due(incarnation):
            return False
        assert order.member not in self.living.values(), "two live processes for one member"
        self.living[incarnation] = order.member
        return True

    def start_all(self) -> None:
        for incarnation in list(self.scheduled):
            self.start(incarnation)

    def of(self, member: Member) -> int:
        (found,) = [number for number, each in self.living.items() if each == member]
        return found

    def end(self, incarnation: int, *, busy: bool = False) -> list[Order]:
        member = self.living.pop(incarnation)
        self.doomed.discard(incarnation)
        self.ready.discard(incarnation)
        return self.obey(self.restarts.ended(incarnation, f"{member} died", self.now_s, busy=busy))

    def make_ready(self, incarnation: int) -> None:
        self.obey(self.restarts.member_ready(self.living[incarnation]))
        self.ready.add(incarnation)

    def serving(self) -> World:
        """Bring the engine up."""
        self.begin()
        self.start_all()
        for incarnation in list(self.living):
            self.make_ready(incarnation)
        return self


def delays(orders: list[Order]) -> list[float]:
    return [order.after_s for order in orders if isinstance(order, StartMember)]


# ---- single rules ----


def test_a_worker_that_was_ready_is_replaced_at_once_however_often() -> None:
    world = World().serving()
    for _ in range(50):
        assert delays(world.end(world.of(Member(1)))) == [0.0]
        world.start_all()
        world.make_ready(world.of(Member(1)))
    assert not world.errors
    assert world.restarts.worker_restarts == 50


def test_a_worker_that_dies_at_every_start_is_given_up_with_one_error() -> None:
    world = World().serving()
    found = delays(world.end(world.of(Member(0))))
    while not world.errors:
        world.start_all()
        found += delays(world.end(world.of(Member(0))))
    assert found == [0.0, *BACKOFF_S[: MAX_FAILED_STARTS - 1]]
    (error,) = world.errors
    assert isinstance(error, EngineLost)
    assert str(error) == "worker 0 died, 8 times in a row before it was ready"


def test_one_that_dies_at_the_very_first_starts_keeps_the_daemon_from_starting() -> None:
    world = World()
    world.begin()
    while not world.errors:
        world.start_all()
        world.end(world.of(Member(0)))
    assert isinstance(world.errors[0], StartFailed)


def test_being_ready_resets_the_delay() -> None:
    world = World().serving()
    world.end(world.of(Member(0)))
    for expected in BACKOFF_S[:4]:
        world.start_all()
        assert delays(world.end(world.of(Member(0)))) == [expected]
    world.start_all()
    world.make_ready(world.of(Member(0)))
    assert delays(world.end(world.of(Member(0)))) == [0.0]
    world.start_all()
    assert delays(world.end(world.of(Member(0)))) == [BACKOFF_S[0]]


def test_starts_that_fail_among_steps_do_not_end_the_service() -> None:
    world = World().serving()
    world.end(world.of(Member(0)))
    for _ in range(5 * MAX_FAILED_STARTS):
        world.start_all()
        world.end(world.of(Member(0)))
        world.restarts.step_done()
    assert not world.errors


def test_ready_that_comes_after_the_end_starts_the_successor_at_once() -> None:
    world = World().serving()
    world.end(world.of(Member(0)))
    for _ in range(3):
        world.start_all()
        world.end(world.of(Member(0)))
    (late,) = world.scheduled
    orders = world.obey(world.restarts.member_ready(Member(0)))
    assert delays(orders) == [0.0]
    assert not world.start(late)
    world.start_all()
    assert sorted(map(str, world.living.values())) == ["scheduler", "worker 0", "worker 1"]


def test_a_scheduler_is_replaced_with_its_workers_after_all_have_ended() -> None:
    world = World().serving()
    first = world.of(Member(0))
    world.end(world.of(SCHEDULER), busy=True)
    assert world.doomed == set(world.living)
    assert not world.restarts.scheduler_ready
    world.end(world.of(Member(1)))
    assert not world.scheduled
    world.end(first)
    assert world.generations == [1, 2]
    assert [order.after_s for order in world.scheduled.values()] == [0.0] * 3
    assert (world.restarts.scheduler_restarts, world.restarts.worker_restarts) == (1, 0)


def test_schedulers_that_die_of_their_work_are_given_up() -> None:
    world = World().serving()
    for _ in range(MAX_SCHEDULER_DEATHS):
        world.end(world.of(SCHEDULER), busy=True)
        for incarnation in list(world.living):
            world.end(incarnation)
        world.start_all()
        for incarnation in list(world.living):
            world.make_ready(incarnation)
    (error,) = world.errors
    assert isinstance(error, EngineLost)
    assert "3 times in a row" in str(error)


def test_schedulers_that_are_killed_idle_or_among_steps_are_not_given_up() -> None:
    world = World().serving()
    for number in range(20):
        if busy := number % 2 == 0:
            world.restarts.step_done()
        world.end(world.of(SCHEDULER), busy=busy)
        for incarnation in list(world.living):
            world.end(incarnation)
        world.start_all()
        for incarnation in list(world.living):
            world.make_ready(incarnation)
    assert not world.errors


def test_schedulers_that_cannot_start_again_are_given_up_also_without_work() -> None:
    world = World().serving()
    deaths = 0
    while not world.errors:
        world.end(world.of(SCHEDULER))
        deaths += 1
        for incarnation in list(world.living):
            world.end(incarnation)
        world.start_all()
    assert deaths == 1 + MAX_SCHEDULER_DEATHS  # the first one was ready


def test_what_the_file_says_while_loading_is_final() -> None:
    world = World().serving()
    world.end(world.of(SCHEDULER))
    for incarnation in list(world.living):
        world.end(incarnation)
    world.start_all()
    error = ModelReadError("the card was pulled")
    world.obey(world.restarts.trouble(error, busy=True))
    assert world.errors == [error]


def test_trouble_while_serving_ends_the_scheduler_though_it_lives() -> None:
    """One that reports it may never get to its end."""
    world = World().serving()
    world.obey(world.restarts.trouble(ModelReadError("truncated"), busy=True))
    assert world.doomed == set(world.living)
    assert len(world.doomed) == 3


def test_who_is_missing_and_since_when() -> None:
    world = World().serving()
    assert world.restarts.workers_missing_since_s is None
    world.now_s = 5.0
    world.end(world.of(Member(1)))
    world.now_s = 6.0
    world.end(world.of(Member(0)))
    assert world.restarts.workers_missing == [0, 1]
    assert world.restarts.workers_missing_since_s == 5.0
    world.start_all()
    world.make_ready(world.of(Member(0)))
    assert (world.restarts.workers_missing, world.restarts.workers_missing_since_s) == ([1], 5.0)


# ---- all orders of events ----


class AnyOrder(RuleBasedStateMachine):
    """Processes start, become ready, die and report late in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.begin()

    def any_of(self, data: st.DataObject, numbers: set[int]) -> int:
        return data.draw(st.sampled_from(sorted(numbers)))

    @rule(data=st.data())
    @precondition(lambda self: self.world.scheduled)
    def delay_is_over(self, data: st.DataObject) -> None:
        incarnation = self.any_of(data, set(self.world.scheduled))
        started = self.world.start(incarnation)
        assert started == (incarnation in self.world.living)

    @rule(data=st.data())
    @precondition(lambda self: self.world.living.keys() - self.world.doomed - self.world.ready)
    def becomes_ready(self, data: st.DataObject) -> None:
        world = self.world
        self.world.make_ready(self.any_of(data, world.living.keys() - world.doomed - world.ready))

    @rule(data=st.data(), busy=st.booleans())
    @precondition(lambda self: self.world.living)
    def dies(self, data: st.DataObject, busy: bool) -> None:
        world = self.world
        incarnation = self.any_of(data, set(world.living))
        member, was_ready = world.living[incarnation], incarnation in world.ready
        was_doomed = incarnation in world.doomed
        orders = world.end(incarnation, busy=busy)
        if member != SCHEDULER and was_ready and not was_doomed and not world.errors:
            assert delays(orders) == [0.0], "a worker that was ready waits for its successor"
        assert world.restarts.ended(incarnation, "again", world.now_s) == []

    @rule(index=st.integers(0, WORKERS - 1))
    @precondition(lambda self: not self.world.doomed and not self.world.errors)
    def ready_comes_late(self, index: int) -> None:
        """What a worker sent before it died arrives when its successor waits for its delay."""
        if Member(index) not in self.world.living.values():
            orders = self.world.obey(self.world.restarts.member_ready(Member(index)))
            assert delays(orders) == [0.0]

    @rule()
    @precondition(lambda self: len(self.world.ready) == WORKERS + 1)
    def step_is_done(self) -> None:
        self.world.restarts.step_done()

    @rule(error=st.sampled_from([StartFailed("worker 0 not there"), ModelReadError("truncated")]))
    def scheduler_has_trouble(self, error: SternaError) -> None:
        if SCHEDULER in self.world.living.values():
            self.world.obey(self.world.restarts.trouble(error, busy=True))

    @rule(back=st.integers(0, 1))
    def time_to_become_ready_is_over(self, back: int) -> None:
        generation = self.world.generations[-1] - back
        self.world.obey(self.world.restarts.overdue(generation, StartFailed("not ready in time")))

    @rule(data=st.data())
    @precondition(lambda self: self.world.doomed)
    def start_fails_of_what_is_to_be_ended(self, data: st.DataObject) -> None:
        incarnation = self.any_of(data, self.world.doomed)
        self.world.living.pop(incarnation)
        self.world.doomed.discard(incarnation)
        self.world.ready.discard(incarnation)
        self.world.obey(self.world.restarts.start_failed(incarnation, StartFailed("no fork")))

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.world.now_s += seconds

    @invariant()
    def every_member_lives_or_is_scheduled_or_all_is_given_up(self) -> None:
        world = self.world
        assert len(world.errors) <= 1
        if world.errors or world.doomed:
            return
        wanted = [order.member for order in world.scheduled.values()]
        for member in (SCHEDULER, *(Member(index) for index in range(WORKERS))):
            living = [each for each in world.living.values() if each == member]
            assert len(living) <= 1, f"{member} lives twice"
            assert living or member in wanted, f"{member} neither lives nor is it scheduled"

    @invariant()
    def what_is_missing_is_known(self) -> None:
        world = self.world
        if world.errors or world.doomed:
            return
        ready = {world.living[incarnation] for incarnation in world.ready}
        missing = [index for index in range(WORKERS) if Member(index) not in ready]
        assert world.restarts.workers_missing == missing
        assert (world.restarts.workers_missing_since_s is None) == (not missing)
        assert world.restarts.scheduler_ready == (SCHEDULER in ready)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
