"""The roster under all orders of events: nobody who said hello and lives is forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sterna.scheduler.lane.roster import (
    AnswersOverdue,
    Event,
    FillSlots,
    ForgetPeer,
    HelloSaid,
    Join,
    KillPeer,
    Leave,
    PeerEnded,
    Roster,
    SendRefused,
    SendShapes,
    ShapesSent,
    SlotsFilled,
)

WORKERS = st.integers(0, 2)


@dataclass
class Process:
    """A worker's process, as its lane sees it."""

    worker: int
    alive: bool = True
    told_to_end: bool = False
    forgotten: bool = False


class RosterFuzz(RuleBasedStateMachine):
    """Plays processes, transport and scheduler at random; what is asked for is done in any order, or late."""

    def __init__(self) -> None:
        super().__init__()
        self.roster = Roster()
        self.processes: dict[int, Process] = {}
        self.shapes_due: list[int] = []
        self.fills_due: list[int] = []
        self.joined: set[int] = set()  # as the scheduler has been told
        self.owed: dict[int, int] = {}
        self.requests = 0

    def feed(self, event: Event) -> None:
        for instruction in self.roster.handle(event):
            match instruction:
                case SendShapes(worker=worker, peer=peer):
                    assert self.processes[peer].worker == worker
                    self.shapes_due.append(peer)
                case FillSlots(worker=worker, peer=peer):
                    assert self.processes[peer].worker == worker
                    self.fills_due.append(peer)
                case KillPeer(peer=peer, reason=reason):
                    assert reason
                    assert not self.processes[peer].told_to_end
                    self.processes[peer].told_to_end = True
                case ForgetPeer(peer=peer):
                    assert not self.processes[peer].alive, "a living process is watched no more"
                    self.processes[peer].forgotten = True
                case Join(worker=worker):
                    assert worker not in self.joined
                    self.joined.add(worker)
                case Leave(worker=worker):
                    self.joined.discard(worker)
                    self.owed = {each: by for each, by in self.owed.items() if by != worker}

    def some_peer(self, draw: int) -> int:
        return sorted(self.processes)[draw % len(self.processes)]

    @rule(worker=WORKERS)
    def hello(self, worker: int) -> None:
        peer = len(self.processes) + 1
        self.processes[peer] = Process(worker)
        self.feed(HelloSaid(worker=worker, peer=peer))

    @rule(refused=st.booleans())
    def send_shapes(self, refused: bool) -> None:
        if self.shapes_due:
            peer = self.shapes_due.pop(0)
            self.feed(SendRefused(peer=peer) if refused else ShapesSent(peer=peer))

    @rule(count=st.integers(1, 3))
    def fill(self, count: int) -> None:
        """A read that failed is an answer like any other: filling ends all the same."""
        peers, self.fills_due = self.fills_due[:count], self.fills_due[count:]
        self.feed(SlotsFilled(peers=tuple(peers)))

    @rule(draw=st.integers(0, 50))
    def die(self, draw: int) -> None:
        if self.processes:
            self.processes[self.some_peer(draw)].alive = False

    @rule(draw=st.integers(0, 50))
    def notice(self, draw: int) -> None:
        """An end is noticed when it is noticed: before, after or between anything else."""
        if self.processes and not self.processes[peer := self.some_peer(draw)].alive:
            self.feed(PeerEnded(peer=peer))

    @rule(worker=WORKERS)
    def ask(self, worker: int) -> None:
        if self.roster.peer_of(worker) is not None:
            self.requests += 1
            self.roster.owe_read(self.requests, worker)
            self.owed[self.requests] = worker

    @rule(draw=st.integers(0, 50))
    def answer(self, draw: int) -> None:
        if self.owed:
            request = sorted(self.owed)[draw % len(self.owed)]
            assert self.roster.read_answered(request) == self.owed.pop(request)

    @rule(draw=st.integers(0, 50))
    def time_out(self, draw: int) -> None:
        if self.owed:
            self.feed(AnswersOverdue(requests=(sorted(self.owed)[draw % len(self.owed)], 10**6)))

    @rule(draw=st.integers(0, 50))
    def refuse(self, draw: int) -> None:
        if self.processes:
            self.feed(SendRefused(peer=self.some_peer(draw)))

    @invariant()
    def the_scheduler_knows_what_the_roster_knows(self) -> None:
        assert sorted(self.joined) == self.roster.joined
        assert self.roster.owing(range(self.requests + 1)) == set(self.owed.values())

    @invariant()
    def nobody_who_lives_is_forgotten(self) -> None:
        for peer, process in self.processes.items():
            if process.alive and not process.told_to_end:
                assert self.roster.peer_of(process.worker) == peer

    def teardown(self) -> None:
        """Once everything that is due has been done, who lives has joined or is told to end."""
        while self.shapes_due:
            self.feed(ShapesSent(peer=self.shapes_due.pop()))
        for peer, process in self.processes.items():
            if not process.alive:
                self.feed(PeerEnded(peer=peer))
        self.feed(SlotsFilled(peers=tuple(self.fills_due)))
        for peer, process in self.processes.items():
            if process.alive and not process.told_to_end:
                assert process.worker in self.joined
                assert self.roster.peer_of(process.worker) == peer
            else:
                assert process.told_to_end or process.forgotten


TestRosterFuzz = RosterFuzz.TestCase
TestRosterFuzz.settings = settings(max_examples=300, stateful_step_count=60, deadline=None, derandomize=True)


def joined(roster: Roster, worker: int, peer: int) -> None:
    roster.handle(HelloSaid(worker=worker, peer=peer))
    roster.handle(ShapesSent(peer=peer))
    assert roster.handle(SlotsFilled(peers=(peer,))) == [Join(worker=worker)]


def test_a_worker_joins_though_another_dies_while_slots_are_filled_for_both() -> None:
    """What hung for ever once: the first one's joining was dropped with the loss of the second."""
    roster = Roster()
    for worker, peer in ((0, 1), (1, 2)):
        roster.handle(HelloSaid(worker=worker, peer=peer))
        assert roster.handle(ShapesSent(peer=peer)) == [FillSlots(worker=worker, peer=peer)]
    assert roster.handle(PeerEnded(peer=2)) == [ForgetPeer(peer=2), Leave(worker=1)]
    assert roster.handle(SlotsFilled(peers=(1, 2))) == [Join(worker=0)]
    joined(roster, 1, 3)
    assert roster.joined == [0, 1]


def test_a_successor_ends_who_was_there_before() -> None:
    roster = Roster()
    joined(roster, 0, 1)
    kill, leave, told = roster.handle(HelloSaid(worker=0, peer=2))
    assert kill == KillPeer(worker=0, peer=1, reason="its successor has come")
    assert (leave, told) == (Leave(worker=0), SendShapes(worker=0, peer=2))
    assert roster.handle(PeerEnded(peer=1)) == []
    assert roster.handle(SlotsFilled(peers=(1,))) == []


@pytest.mark.parametrize("owed", ["batch", "read"])
def test_who_owes_what_is_overdue_is_killed(owed: str) -> None:
    roster = Roster()
    joined(roster, 0, 1)
    joined(roster, 1, 2)
    (roster.owe_batch if owed == "batch" else roster.owe_read)(7, 1)
    assert roster.owing((7,)) == {1}
    kill, leave = roster.handle(AnswersOverdue(requests=(7,)))
    assert kill == KillPeer(worker=1, peer=2, reason="it gave no answer in time")
    assert leave == Leave(worker=1)
    # A batch is waited for until its step gives up; a read of one who left comes to nothing at once.
    assert roster.owing((7,)) == ({1} if owed == "batch" else set())
    roster.give_up_batches()
    assert not roster.owes(1)
