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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from ..shm.errors import InternalError, ProtocolError, WorkerLost, error_of
from ..workers.framing import join
from ..workers.messages import (
    Compute,
    Configure,
    ExpertPage,
    Hello,
    Outputs,
    Paged,
    PageIn,
    ToScheduler,
    Trouble,
    decode_for_scheduler,
    encode,
)
from .lane import WorkerBatch

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
            frames = self.socket.recv_multipart()
            message = self._decode(frames)
            if isinstance(message, Hello):
                self._join(frames[0], message)
        joined, self._joined = self._joined, []
        return joined

    def poll_lost(self) -> list[int]:
        """Return the workers that died since the last call and forget them."""
        for index in [peer.index for peer in self._peers.values() if _ended(peer.pidfd)]:
            self._give_up(index)
        lost, self._lost = self._lost, []
        return lost

    def _join(self, identity: bytes, hello: Hello) -> None:
        self._forget(hello.index)
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

    # ---- work ----

    def exchange_all(
        self, batches: Sequence[WorkerBatch], meanwhile: Callable[[], None]
    ) -> list[npt.NDArray[np.float32]]:
        """See `Lane.exchange_all`."""
        waiting: dict[int, int] = {}
        for position, batch in enumerate(batches):
            self._seq += 1
            waiting[self._seq] = position
            request = Compute(
                seq=self._seq,
                layer=batch.layer,
                kind=batch.kind,
                tokens=len(batch.activations[0]),
                experts=batch.experts,
                slots=batch.slots,
                starts=batch.starts,
            )
            self._send(batch.worker, [encode(request), join((*batch.activations, batch.rows))])
        meanwhile()
        outputs: list[npt.NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(batches)
        deadline = time.monotonic() + self._timeout_s
        while waiting:
            silent = {seq: batches[position].worker for seq, position in waiting.items()}
            message, frames = self._receive(silent, deadline, f"layer {batches[0].layer}")
            position = waiting.pop(message.seq)
            pairs = batches[position].starts[-1]
            if len(frames) != 3 or len(frames[2]) != pairs * self._d_model * 4:
                raise InternalError(f"worker {batches[position].worker}: an answer of the wrong size")
            outputs[position] = np.frombuffer(frames[2], np.float32).reshape(pairs, self._d_model)
        return outputs

    def page_in(self, experts: Mapping[int, list[ExpertPage]], progress: Callable[[int, int], None]) -> None:
        """See `Lane.page_in`; the time limit holds between two experts."""
        total = sum(len(wanted) for wanted in experts.values())
        waiting: dict[int, int] = {}
        for worker, wanted in experts.items():
            self._seq += 1
            waiting[self._seq] = worker
            self._send(worker, [encode(PageIn(seq=self._seq, experts=wanted))])
        for done in range(1, total + 1):
            deadline = time.monotonic() + self._timeout_s
            message, _ = self._receive(waiting, deadline, "reading experts")
            if isinstance(message, Paged) and not message.left:
                del waiting[message.seq]
            progress(done, total)

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

    def _receive(
        self, waiting: Mapping[int, int], deadline: float, awaited: str
    ) -> tuple[Outputs | Paged, list[bytes]]:
        """Return the next answer to one of `waiting` (request number: worker).

        Raises what a worker reports, or WorkerLost when one of them died or `deadline` passed. What
        belongs to a request that was given up is dropped.
        """
        while True:
            # Waiting for the socket alone costs half of what polling pidfds beside it does; a death
            # is seen after one slice.
            if self.socket.poll(SLICE_MS, zmq.POLLIN):
                frames = self.socket.recv_multipart()
                message = self._decode(frames)
                if isinstance(message, Hello):
                    self._join(frames[0], message)
                    if message.index in waiting.values():
                        raise WorkerLost(f"worker {message.index} died and was replaced ({awaited})")
                elif message.seq in waiting:
                    if isinstance(message, Trouble):
                        raise error_of(message.code, message.text)
                    return message, frames
            else:
                for index in waiting.values():
                    peer = self._peers.get(index)
                    if peer is None or _ended(peer.pidfd):
                        raise WorkerLost(f"worker {index} died ({awaited})")
            if time.monotonic() > deadline:
                self._kill(set(waiting.values()))
                names = ", ".join(str(index) for index in sorted(set(waiting.values())))
                raise WorkerLost(
                    f"worker {names} gave no answer in {self._timeout_s:.0f} s ({awaited}): killed"
                )

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
