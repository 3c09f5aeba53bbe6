"""A lane in this process whose workers die, come back and cannot read, when a test says so; no test here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from sterna.scheduler.lane.interface import Computed, Loaded, WorkerBatch
from sterna.scheduler.lane.local import LocalLane
from sterna.scheduler.lane.roster import (
    AnswersOverdue,
    Change,
    Deed,
    FillSlots,
    HelloSaid,
    Join,
    KillPeer,
    Leave,
    PeerEnded,
    SendShapes,
    ShapesSent,
    SlotsFilled,
)
from sterna.shm.errors import ModelReadError, SternaError, WorkerLost
from sterna.workers.messages import ExpertPage
from sterna.workers.serve import ExpertWorker


class FlakyLane(LocalLane):
    """Real workers and the real roster; in between, processes that are only numbers.

    at: called before each message is sent or waited for, to `die` or `say_hello` there.
    """

    def __init__(self, workers: Sequence[ExpertWorker]) -> None:
        super().__init__(workers)
        self.at: Callable[[], None] = lambda: None
        self.unreadable: set[tuple[int, int]] = set()
        """(layer, expert) of which no read succeeds."""
        self.met: SternaError = ModelReadError("for a test")
        """What these reads end with."""
        self.computed: list[tuple[int, int]] = []
        """(layer, expert) of every batch."""
        self.peers = {worker: worker for worker in range(len(workers))}
        self.dead: set[int] = set()  # peers
        self.killed: set[int] = (
            set()
        )  # workers that the roster had killed: who starts processes sees them end
        self.hellos: list[int] = []  # workers whose successor is about to say so
        self._owners: dict[int, int] = {}  # request: peer that answers

    # ---- what a test does ----

    def die(self, worker: int) -> None:
        """Kill the present incarnation of a worker: what it has not said yet is never said."""
        self.dead.add(self.peers[worker])
        self._answers = [each for each in self._answers if self._owners.get(each.seq) not in self.dead]

    def say_hello(self, worker: int) -> None:
        """Let the successor of a dead worker be heard at the next look at the socket."""
        self.hellos.append(worker)

    # ---- the lane ----

    def receive(self) -> None:
        while self.hellos:
            self._hello(self.hellos.pop(0))
        for peer in [peer for peer in self.peers.values() if peer in self.dead]:
            self._carry_out(self._roster.handle(PeerEnded(peer=peer)))

    def tell(self, event: SlotsFilled | AnswersOverdue) -> None:
        self._carry_out(self._roster.handle(event))

    def compute(self, batch: WorkerBatch) -> int:
        peer = self._peer(batch.worker)
        seq = super().compute(batch)
        self.computed += [(batch.layer, expert) for expert in batch.experts]
        self._roster.owe_batch(seq, batch.worker)
        self._sent(seq, peer)
        return seq

    def page_in(self, worker: int, page: ExpertPage, *, urgent: bool) -> int:
        peer = self._peer(worker)
        if (page.layer, page.expert) in self.unreadable:
            self._seq += 1
            seq = self._seq
            self._answers.append(Loaded(seq=seq, error=self.met))
        else:
            seq = super().page_in(worker, page, urgent=urgent)
        self._roster.owe_read(seq, worker)
        self._sent(seq, peer)
        return seq

    def collect(self, computing: Collection[int], loading: Collection[int], what: str) -> Computed | Loaded:
        self.at()
        while self.hellos:
            owed = self._roster.owes(self.hellos[0])
            self._hello(self.hellos.pop(0))
            if owed:
                raise WorkerLost("a worker died and was replaced")
        if self._answers:
            answer = self._answers.pop(0)
            self._roster.batch_answered(answer.seq)
            self._roster.read_answered(answer.seq)
            return answer
        for worker in sorted(self._roster.owing((*computing, *loading))):
            if self.peers[worker] in self.dead:
                self._carry_out(self._roster.handle(PeerEnded(peer=self.peers[worker])))
        raise WorkerLost("a worker died")

    def reads(self) -> list[Loaded]:
        done = super().reads()
        for answer in done:
            self._roster.read_answered(answer.seq)
        return done

    def give_up(self) -> None:
        super().give_up()
        self._roster.give_up_batches()

    def _peer(self, worker: int) -> int:
        self.at()
        peer = self._roster.peer_of(worker)
        if peer is None:
            raise WorkerLost(f"worker {worker} is gone")
        return peer

    def _sent(self, seq: int, peer: int) -> None:
        self._owners[seq] = peer
        if peer in self.dead:  # nobody has noticed yet: it takes the message with it
            self._answers = [each for each in self._answers if each.seq != seq]

    def _hello(self, worker: int) -> None:
        peer = self.peers[worker] = max(self.peers.values()) + 1
        self._carry_out(self._roster.handle(HelloSaid(worker=worker, peer=peer)))

    def _carry_out(self, instructions: Iterable[Deed | Change]) -> None:
        for instruction in instructions:
            match instruction:
                case SendShapes(peer=peer):
                    self._carry_out(self._roster.handle(ShapesSent(peer=peer)))
                case KillPeer(worker=worker, peer=peer):
                    if peer not in self.dead:
                        self.killed.add(worker)
                    self.dead.add(peer)
                case FillSlots() | Join() | Leave():
                    self._changes.append(instruction)
