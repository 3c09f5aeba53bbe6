"""The roster: which workers are there, how one joins, and who owes which answer. Pure: no socket, no clock.

Events in, instructions out. A peer is one incarnation of a worker; the lane numbers them as they say hello.

    hello --> SendShapes --> ShapesSent --> FillSlots --> SlotsFilled --> Join
      any time: PeerEnded, SendRefused, AnswersOverdue or the hello of a successor --> Leave

No peer that said hello and lives is forgotten: it ends as joined, or it is to be killed. A lane carries out
what concerns the transport (`Deed`) and hands the rest (`Change`) to the scheduler between two steps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

# ---- events ----


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloSaid:
    """A worker is there; `peer` is a number that no incarnation had before."""

    worker: int
    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesSent:
    """The peer was told the shapes of all layers: it can read and compute from now on."""

    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendRefused:
    """The peer takes no message: it hangs, or is about to be found dead."""

    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerEnded:
    """The peer is gone, by whatever means that was noticed."""

    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsFilled:
    """All was read that could be read for these peers."""

    peers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersOverdue:
    """Nobody has answered one of these requests for longer than a step may take."""

    requests: tuple[int, ...]


Event = HelloSaid | ShapesSent | SendRefused | PeerEnded | SlotsFilled | AnswersOverdue


# ---- instructions ----


@dataclass(frozen=True, slots=True, kw_only=True)
class SendShapes:
    """Tell the peer the shapes of all layers; answered by ShapesSent or SendRefused."""

    worker: int
    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KillPeer:
    """Have the peer end, if it has not, and watch it no more."""

    worker: int
    peer: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetPeer:
    """The peer has ended: watch it no more."""

    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FillSlots:
    """Read what is missing; answered by SlotsFilled."""

    worker: int
    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """The worker can be given work."""

    worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """The worker is gone: nothing comes any more of what it was reading."""

    worker: int


Deed = SendShapes | KillPeer | ForgetPeer
Change = FillSlots | Join | Leave


@dataclass(slots=True)
class _Incarnation:
    """One worker's present incarnation, and how far it has come."""

    peer: int
    told: bool = False
    """Whether it knows the shapes, and its slots are being filled."""
    joined: bool = False


@dataclass(slots=True)
class _Owed:
    """Requests without an answer, and the worker that owes each."""

    batches: dict[int, int] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)


class Roster:
    """All workers that are there, and what they owe. See the module."""

    def __init__(self) -> None:
        self._members: dict[int, _Incarnation] = {}
        self._owed = _Owed()

    @property
    def joined(self) -> list[int]:
        """Workers that can be given work, in order."""
        return sorted(worker for worker, member in self._members.items() if member.joined)

    def peer_of(self, worker: int) -> int | None:
        """Return the incarnation of `worker` that is there, joined or not."""
        member = self._members.get(worker)
        return None if member is None else member.peer

    def handle(self, event: Event) -> list[Deed | Change]:
        """Take one event and return what is to be done, in order. Events of a peer that left do nothing."""
        match event:
            case HelloSaid(worker=worker, peer=peer):
                before = self._leave(worker, "its successor has come")
                self._members[worker] = _Incarnation(peer)
                return [*before, SendShapes(worker=worker, peer=peer)]
            case ShapesSent(peer=peer):
                return self._shapes_sent(peer)
            case SendRefused(peer=peer):
                return self._leave(self._worker_of(peer), "it takes no message")
            case PeerEnded(peer=peer):
                return self._leave(self._worker_of(peer), "")
            case SlotsFilled(peers=peers):
                return self._filled(peers)
            case AnswersOverdue(requests=requests):
                late = sorted(self.owing(requests))
                return [each for worker in late for each in self._leave(worker, "it gave no answer in time")]

    def _worker_of(self, peer: int) -> int | None:
        return next((worker for worker, member in self._members.items() if member.peer == peer), None)

    def _shapes_sent(self, peer: int) -> list[Deed | Change]:
        worker = self._worker_of(peer)
        if worker is None or self._members[worker].told:
            return []
        self._members[worker].told = True
        return [FillSlots(worker=worker, peer=peer)]

    def _filled(self, peers: Collection[int]) -> list[Deed | Change]:
        done: list[Deed | Change] = []
        for worker, member in sorted(self._members.items()):
            if member.peer in peers and member.told and not member.joined:
                member.joined = True
                done.append(Join(worker=worker))
        return done

    def _leave(self, worker: int | None, reason: str) -> list[Deed | Change]:
        """Take a worker off the roster; `reason` is why it is to be killed, "" if it has ended already."""
        if worker is None or worker not in self._members:
            return []
        peer = self._members.pop(worker).peer
        self._owed.reads = {request: by for request, by in self._owed.reads.items() if by != worker}
        gone: Deed = KillPeer(worker=worker, peer=peer, reason=reason) if reason else ForgetPeer(peer=peer)
        return [gone, Leave(worker=worker)]

    # ---- what is owed ----

    def owe_batch(self, request: int, worker: int) -> None:
        """Note that `worker` was sent a batch."""
        self._owed.batches[request] = worker

    def owe_read(self, request: int, worker: int) -> None:
        """Note that `worker` was asked to read an expert."""
        self._owed.reads[request] = worker

    def batch_answered(self, request: int) -> int | None:
        """Note an answer; return the worker that owed it, None for what nobody waits for any more."""
        return self._owed.batches.pop(request, None)

    def read_answered(self, request: int) -> int | None:
        """Note that a read ended, well or not; returns as `batch_answered`."""
        return self._owed.reads.pop(request, None)

    def give_up_batches(self) -> None:
        """Forget all batches: their step failed."""
        self._owed.batches.clear()

    def owing(self, requests: Collection[int]) -> set[int]:
        """Return the workers that owe an answer to one of `requests`."""
        batches, reads = self._owed.batches, self._owed.reads
        return {batches[each] for each in requests if each in batches} | {
            reads[each] for each in requests if each in reads
        }

    def owes(self, worker: int) -> bool:
        """Return whether `worker` owes any answer."""
        return worker in self._owed.batches.values() or worker in self._owed.reads.values()
