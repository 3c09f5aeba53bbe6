"""The lane over ZeroMQ: one ROUTER here, one DEALER in each worker, blocking sockets.

A worker is known by its index and by the process it said it is; its pidfd tells of its death, so
that no heartbeat is needed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
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

SLICE_MS = 20


@dataclass(slots=True)
class _Peer:
    index: int
    identity: bytes
    pid: int
    pidfd: int


class ZmqLane:
    """Workers behind a ROUTER socket bound to `url`; owns the socket and the workers' pidfds.

    Each worker is sent `configure` as soon as it has said hello.
    """

    def __init__(self, url: str, configure: Configure, d_model: int, timeout_s: float) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.bind(url)
        self._configure = encode(configure)
        self._d_model = d_model
        self._timeout_s = timeout_s
        self._peers: dict[int, _Peer] = {}
        self._joined: list[int] = []
        self._lost: list[int] = []
        self._seq = 0
        self._computing: dict[int, tuple[int, int]] = {}  # request: worker, pairs
        self._loading: dict[int, int] = {}  # request: worker
        self._early: list[Loaded] = []
        self.waited_ns = 0

    def close(self) -> None:
        """Close the socket and all pidfds."""
        for index in list(self._peers):
            self._forget(index)
        self.socket.close()

    # ---- workers coming and going ----

    def pidfds(self) -> list[int]:
        """Return what becomes readable when a worker ends."""
        return [peer.pidfd for peer in self._peers.values()]

    def poll_hello(self) -> list[int]:
        """Take hellos that have arrived and return the indices of workers that joined."""
        while self.socket.poll(0, zmq.POLLIN):
            answer = self._take(self.socket.recv_multipart())
            if isinstance(answer, Loaded):
                self._early.append(answer)
        joined, self._joined = self._joined, []
        return joined

    def poll_lost(self) -> list[int]:
        """Return the workers that died since the last call and forget them."""
        for index in [peer.index for peer in self._peers.values() if _ended(peer.pidfd)]:
            self._give_up(index)
        lost, self._lost = self._lost, []
        return lost

    def poll_loaded(self) -> list[Loaded]:
        """Return what was read without anybody waiting, as far as `poll_hello` has met it."""
        early, self._early = self._early, []
        return early

    def _join(self, identity: bytes, hello: Hello) -> None:
        self._give_up(hello.index)
        try:
            pidfd = os.pidfd_open(hello.pid)
        except ProcessLookupError:
            return  # died right after its hello; the daemon starts another one
        self._peers[hello.index] = _Peer(hello.index, identity, hello.pid, pidfd)
        with contextlib.suppress(WorkerLost):  # its pidfd tells the rest
            self._send(hello.index, [self._configure])
            self._joined.append(hello.index)

    def _give_up(self, index: int) -> None:
        """Take a worker for dead: a dying process closes its sockets before its pidfd says so."""
        if index in self._peers:
            self._forget(index)
            self._lost.append(index)

    def _forget(self, index: int) -> None:
        peer = self._peers.pop(index, None)
        if peer is not None:
            os.close(peer.pidfd)
        self._loading = {seq: worker for seq, worker in self._loading.items() if worker != index}

    # ---- work ----

    def compute(self, batch: WorkerBatch) -> int:
        """See `Lane.compute`."""
        self._seq += 1
        self._send(batch.worker, [encode(batch.request(self._seq)), join((*batch.activations, batch.rows))])
        self._computing[self._seq] = (batch.worker, batch.starts[-1])
        return self._seq

    def page_in(self, worker: int, page: ExpertPage, *, urgent: bool) -> int:
        """See `Lane.page_in`."""
        self._seq += 1
        self._send(worker, [encode(PageIn(seq=self._seq, page=page, urgent=urgent))])
        self._loading[self._seq] = worker
        return self._seq

    def give_up(self) -> None:
        """See `Lane.give_up`."""
        self._computing.clear()

    def collect(self, computing: Collection[int], loading: Collection[int], what: str) -> Computed | Loaded:
        """See `Lane.collect`; the time limit holds for each answer."""
        begin_ns = time.perf_counter_ns()
        deadline_ns = begin_ns + int(self._timeout_s * 1e9)
        while True:
            # Waiting for the socket alone costs half of what polling pidfds beside it does; a death
            # is seen after one slice.
            if self._early:
                return self._early.pop(0)
            if self.socket.poll(SLICE_MS, zmq.POLLIN):
                answer = self._take(self.socket.recv_multipart(), what)
                if answer is not None:
                    if not computing:
                        self.waited_ns += time.perf_counter_ns() - begin_ns
                    return answer
            else:
                for index in self._owing(computing, loading):
                    peer = self._peers.get(index)
                    if peer is None or _ended(peer.pidfd):
                        raise WorkerLost(f"worker {index} died ({what})")
            if time.perf_counter_ns() > deadline_ns:
                silent = self._owing(computing, loading)
                self._kill(silent)
                names = ", ".join(str(index) for index in sorted(silent))
                raise WorkerLost(f"worker {names} gave no answer in {self._timeout_s:.0f} s ({what}): killed")

    def _owing(self, computing: Collection[int], loading: Collection[int]) -> set[int]:
        """Return the workers that owe an answer to one of these requests."""
        return {self._computing[seq][0] for seq in computing if seq in self._computing} | {
            self._loading[seq] for seq in loading if seq in self._loading
        }

    def _take(self, frames: list[bytes], what: str = "") -> Computed | Loaded | None:
        """Return the answer that `frames` are; None for a hello and for what was given up.

        Raises WorkerLost for the hello of a successor while `what` is waited for.
        """
        message = self._decode(frames)
        if isinstance(message, Hello):
            index = message.index
            owed = index in self._owing(self._computing, self._loading)
            self._join(frames[0], message)
            if owed and what:
                raise WorkerLost(f"worker {index} died and was replaced ({what})")
            return None
        if self._loading.pop(message.seq, None) is not None:
            match message:
                case Paged(nbytes=nbytes, read_ns=read_ns, busy_ns=busy_ns):
                    return Loaded(seq=message.seq, nbytes=nbytes, read_ns=read_ns, busy_ns=busy_ns)
                case Trouble(code=code, text=text):
                    return Loaded(seq=message.seq, error=error_of(code, text))
        if (owed_by := self._computing.pop(message.seq, None)) is None:
            return None
        worker, pairs = owed_by
        if isinstance(message, Trouble):
            raise error_of(message.code, message.text)
        if len(frames) != 3 or len(frames[2]) != pairs * self._d_model * 4:
            raise InternalError(f"worker {worker}: an answer of the wrong size")
        rows = np.frombuffer(frames[2], np.float32).reshape(pairs, self._d_model)
        return Computed(seq=message.seq, rows=rows)

    def _send(self, worker: int, frames: Sequence[Any]) -> None:
        peer = self._peers.get(worker)
        if peer is None:
            raise WorkerLost(f"worker {worker} is gone")
        try:
            self.socket.send_multipart([peer.identity, *frames], flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            self._kill({worker})
            raise WorkerLost(
                f"worker {worker} (pid {peer.pid}) cannot be reached: {error.strerror}"
            ) from None

    def _kill(self, workers: set[int]) -> None:
        """Kill workers that hang or take nothing; the daemon sees them end and starts new ones."""
        for index in workers:
            peer = self._peers.get(index)
            if peer is not None and not _ended(peer.pidfd):
                signal.pidfd_send_signal(peer.pidfd, signal.SIGKILL)
            self._give_up(index)

    def _decode(self, frames: list[bytes]) -> ToScheduler:
        try:
            message: ToScheduler = decode_for_scheduler(frames[1])
        except (msgspec.MsgspecError, ValueError, IndexError) as error:
            raise ProtocolError(f"a worker sent a frame that is not a lane message: {error}") from error
        return message


def _ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
