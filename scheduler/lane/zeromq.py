"""The lane over ZeroMQ: one ROUTER here, one DEALER in each worker, blocking sockets.

In here: frames and waiting. Not in here: what follows from a hello or an end (`roster`), and how an end is
noticed (`presence`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from itertools import count
from typing import Any

import msgspec
import numpy as np
import zmq

from ...shm.errors import InternalError, ProtocolError, WorkerLost, error_of
from ...workers.framing import join
from ...workers.messages import (
    Configure,
    ExpertPage,
    Hello,
    Paged,
    PageIn,
    ToScheduler,
    Trouble,
    decode_for_scheduler,
    encode,
)
from .interface import Computed, Loaded, WorkerBatch
from .presence import PidfdPresence, Presence
from .roster import (
    AnswersOverdue,
    Change,
    Deed,
    ForgetPeer,
    HelloSaid,
    KillPeer,
    PeerEnded,
    Roster,
    SendRefused,
    SendShapes,
    ShapesSent,
    SlotsFilled,
)

log = logging.getLogger("sterna.scheduler")

SLICE_MS = 20


class ZmqLane:
    """A `ServedLane`: workers behind a ROUTER socket bound to `url`; owns the socket.

    Each worker is sent `configure` as soon as it has said hello.
    """

    def __init__(
        self, url: str, configure: Configure, d_model: int, timeout_s: float, presence: Presence | None = None
    ) -> None:
        """timeout_s: of each answer that is waited for; `presence`: pidfds if none is given."""
        self.waited_ns = 0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(url)
        self._configure = encode(configure)
        self._d_model = d_model
        self._timeout_s = timeout_s
        self._presence: Presence = presence or PidfdPresence()
        self._roster = Roster()
        self._peers = count(1)
        self._hellos: dict[int, tuple[bytes, Hello]] = {}  # peer: identity of its socket, what it said
        self._changes: list[Change] = []
        self._seq = 0
        self._pairs: dict[int, int] = {}  # of each batch that is computed
        self._early: list[Loaded] = []

    def close(self) -> None:
        """See `ServedLane.close`."""
        for peer in list(self._hellos):
            self._forget(peer)
        self._socket.close(linger=0)

    # ---- workers coming and going ----

    def sources(self) -> list[Any]:
        """See `ServedLane.sources`."""
        return [self._socket, *self._presence.sources()]

    def receive(self) -> None:
        """See `ServedLane.receive`."""
        while self._socket.poll(0, zmq.POLLIN):
            answer = self._take(self._socket.recv_multipart())
            if isinstance(answer, Loaded):
                self._early.append(answer)
        for peer in [peer for peer in self._hellos if self._presence.ended(peer)]:
            self._carry_out(self._roster.handle(PeerEnded(peer=peer)))

    def changes(self) -> list[Change]:
        """See `ServedLane.changes`."""
        changes, self._changes = self._changes, []
        return changes

    def reads(self) -> list[Loaded]:
        """See `ServedLane.reads`."""
        early, self._early = self._early, []
        return early

    def tell(self, event: SlotsFilled | AnswersOverdue) -> None:
        """See `ServedLane.tell`."""
        self._carry_out(self._roster.handle(event))

    def _carry_out(self, instructions: Iterable[Deed | Change]) -> None:
        for instruction in instructions:
            match instruction:
                case SendShapes(worker=worker, peer=peer):
                    identity, _ = self._hellos[peer]
                    event = (
                        SendRefused(peer=peer)
                        if self._refused([identity, self._configure])
                        else ShapesSent(peer=peer)
                    )
                    self._carry_out(self._roster.handle(event))
                case KillPeer(worker=worker, peer=peer, reason=reason):
                    if not self._presence.ended(peer):
                        pid = self._hellos[peer][1].pid
                        log.warning("worker.killed index=%d pid=%d reason=%r", worker, pid, reason)
                        self._presence.kill(peer)
                    self._forget(peer)
                case ForgetPeer(peer=peer):
                    self._forget(peer)
                case _:
                    self._changes.append(instruction)

    def _forget(self, peer: int) -> None:
        self._presence.forget(peer)
        self._hellos.pop(peer, None)

    def _hello(self, identity: bytes, hello: Hello) -> None:
        peer = next(self._peers)
        if self._presence.watch(peer, hello):  # else the daemon starts another one
            self._hellos[peer] = (identity, hello)
            self._carry_out(self._roster.handle(HelloSaid(worker=hello.index, peer=peer)))

    # ---- work ----

    def compute(self, batch: WorkerBatch) -> int:
        """See `Lane.compute`."""
        self._seq += 1
        self._send(batch.worker, [encode(batch.request(self._seq)), join((*batch.activations, batch.rows))])
        self._roster.owe_batch(self._seq, batch.worker)
        self._pairs[self._seq] = batch.starts[-1]
        return self._seq

    def page_in(self, worker: int, page: ExpertPage, *, urgent: bool) -> int:
        """See `Lane.page_in`."""
        self._seq += 1
        self._send(worker, [encode(PageIn(seq=self._seq, page=page, urgent=urgent))])
        self._roster.owe_read(self._seq, worker)
        return self._seq

    def give_up(self) -> None:
        """See `Lane.give_up`."""
        self._roster.give_up_batches()
        self._pairs.clear()

    def collect(self, computing: Collection[int], loading: Collection[int], what: str) -> Computed | Loaded:
        """See `Lane.collect`; the time limit holds for each answer."""
        begin_ns = time.perf_counter_ns()
        deadline_ns = begin_ns + int(self._timeout_s * 1e9)
        while True:
            # Waiting for the socket alone costs half of what polling pidfds beside it does; a death
            # is seen after one slice.
            if self._early:
                return self._early.pop(0)
            if self._socket.poll(SLICE_MS, zmq.POLLIN):
                answer = self._take(self._socket.recv_multipart(), what)
                if answer is not None:
                    if not computing:
                        self.waited_ns += time.perf_counter_ns() - begin_ns
                    return answer
            else:
                self._look_for_dead((*computing, *loading), what)
            if time.perf_counter_ns() > deadline_ns:
                silent = sorted(self._roster.owing((*computing, *loading)))
                self.tell(AnswersOverdue(requests=(*computing, *loading)))
                names = ", ".join(map(str, silent))
                raise WorkerLost(f"worker {names} gave no answer in {self._timeout_s:.0f} s ({what}): killed")

    def _look_for_dead(self, requests: Collection[int], what: str) -> None:
        """Raise WorkerLost if one that owes an answer has ended, or nobody owes one any more."""
        owing = self._roster.owing(requests)
        for worker in sorted(owing):
            peer = self._roster.peer_of(worker)
            if peer is None or self._presence.ended(peer):
                if peer is not None:
                    self._carry_out(self._roster.handle(PeerEnded(peer=peer)))
                raise WorkerLost(f"worker {worker} died ({what})")
        if not owing:
            raise WorkerLost(f"a worker died before it answered ({what})")

    def _take(self, frames: list[bytes], what: str = "") -> Computed | Loaded | None:
        """Return the answer that `frames` are; None for a hello and for what was given up.

        Raises WorkerLost for the hello of a successor while `what` is waited for.
        """
        message = self._decode(frames)
        if isinstance(message, Hello):
            owed = self._roster.owes(message.index)
            self._hello(frames[0], message)
            if owed and what:
                raise WorkerLost(f"worker {message.index} died and was replaced ({what})")
            return None
        if self._roster.read_answered(message.seq) is not None:
            match message:
                case Paged(nbytes=nbytes, read_ns=read_ns, busy_ns=busy_ns):
                    return Loaded(seq=message.seq, nbytes=nbytes, read_ns=read_ns, busy_ns=busy_ns)
                case Trouble(code=code, text=text):
                    return Loaded(seq=message.seq, error=error_of(code, text))
        if (worker := self._roster.batch_answered(message.seq)) is None:
            return None
        pairs = self._pairs.pop(message.seq)
        if isinstance(message, Trouble):
            raise error_of(message.code, message.text)
        if len(frames) != 3 or len(frames[2]) != pairs * self._d_model * 4:
            raise InternalError(f"worker {worker}: an answer of the wrong size")
        rows = np.frombuffer(frames[2], np.float32).reshape(pairs, self._d_model)
        return Computed(seq=message.seq, rows=rows)

    def _send(self, worker: int, frames: Sequence[Any]) -> None:
        peer = self._roster.peer_of(worker)
        if peer is None:
            raise WorkerLost(f"worker {worker} is gone")
        identity, hello = self._hellos[peer]
        if why := self._refused([identity, *frames]):
            self._carry_out(self._roster.handle(SendRefused(peer=peer)))
            raise WorkerLost(f"worker {worker} (pid {hello.pid}) cannot be reached: {why}")

    def _refused(self, frames: Sequence[Any]) -> str:
        """Send; return why the peer took nothing, "" if it did."""
        try:
            self._socket.send_multipart(frames, flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            return error.strerror or str(error)
        return ""

    def _decode(self, frames: list[bytes]) -> ToScheduler:
        try:
            message: ToScheduler = decode_for_scheduler(frames[1])
        except (msgspec.MsgspecError, ValueError, IndexError) as error:
            raise ProtocolError(f"a worker sent a frame that is not a lane message: {error}") from error
        return message
