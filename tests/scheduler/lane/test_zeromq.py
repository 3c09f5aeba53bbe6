"""The ZeroMQ lane: with real worker processes, and with a scripted peer that misbehaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from sterna.scheduler.lane.interface import Loaded
from sterna.scheduler.lane.roster import AnswersOverdue, Join, Leave
from sterna.shm.errors import InternalError, ModelReadError, ProtocolError, WorkerLost
from sterna.workers.framing import split
from sterna.workers.messages import Compute, Configure, Hello, Outputs, Paged, PageIn, Trouble, encode

from .stage import D_MODEL, LAYER, PATIENT_S, START_S, Peer, Stage


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path, PATIENT_S)
    yield made
    made.close()


# ---- real workers ----


def test_two_workers_compute_what_one_in_process_does(stage: Stage) -> None:
    stage.start(0)
    stage.start(1)
    stage.join(0, 1)
    stage.page_in(0, 3, 7)
    stage.page_in(1, 11)
    assert stage.slots.num_ready() == 3
    batches = [
        stage.batch(1, {11: [4, 0], 3: [1]}),  # worker 1 computes what worker 0 has read in
        stage.batch(0, {7: [0, 1, 2, 3, 4, 5]}, seed=2),
    ]
    calls: list[int] = []
    outputs = stage.exchange(batches, lambda: calls.append(1))
    assert calls == [1]
    for batch, output in zip(batches, outputs, strict=True):
        assert output.dtype == np.float32
        assert output.tobytes() == stage.expected(batch).tobytes()


def test_a_killed_worker_is_noticed_and_its_successor_goes_on(stage: Stage) -> None:
    first = stage.start(0)
    stage.join(0)
    stage.page_in(0, 3)
    batch = stage.batch(0, {3: [0, 1]})
    (before,) = stage.exchange([batch])
    kept = before.tobytes()
    first.send_signal(signal.SIGSTOP)  # so that it cannot answer before it dies
    begin_s = time.monotonic()
    with pytest.raises(WorkerLost, match=r"worker 0 .*layer 2"):
        stage.exchange([batch], first.kill)
    assert time.monotonic() - begin_s < 2.0
    assert stage.settle() == [Leave(worker=0)]
    assert stage.settle() == []
    with pytest.raises(WorkerLost, match="worker 0"):
        stage.exchange([batch])
    stage.start(0, incarnation=1)
    stage.join(0)
    (after,) = stage.exchange([batch])  # its experts are in the arena already
    assert after.tobytes() == kept


def test_a_worker_that_hangs_is_killed_when_its_time_is_up(tmp_path: Path) -> None:
    stage = Stage(tmp_path, timeout_s=0.6)
    process = stage.start(0)
    stage.join(0)
    process.send_signal(signal.SIGSTOP)
    begin_s = time.monotonic()
    with pytest.raises(WorkerLost, match=r"worker 0 .*layer 2"):
        stage.exchange([stage.batch(0, {3: [0]})])
    assert 0.5 < time.monotonic() - begin_s < 2.0
    assert process.wait(START_S) == -signal.SIGKILL
    stage.close()


def test_trouble_keeps_its_kind_and_text(stage: Stage) -> None:
    stage.start(0)
    stage.join(0)
    with pytest.raises(InternalError, match="expert 3 of layer 2 is not in slot"):
        stage.exchange([stage.batch(0, {3: [0]})])
    os.truncate(stage.file.path, stage.file.data_offset)
    with pytest.raises(ModelReadError, match=r"blk\.2\.ffn_\w+_exps\.weight: the model file ends at byte"):
        stage.page_in(0, 3)


# ---- a scripted peer ----


@pytest.fixture
def peers(stage: Stage) -> Iterator[Callable[[int], Peer]]:
    made: list[Peer] = []

    def joined(index: int) -> Peer:
        peer = Peer(stage, index)
        made.append(peer)
        peer.say(peer.hello)
        stage.join(index)
        assert isinstance(peer.hear()[0], Configure)
        return peer

    yield joined
    for peer in made:
        peer.close()


Joined = Callable[[int], Peer]


def answer(value: float, pairs: int = 1) -> bytes:
    return np.full((pairs, D_MODEL), value, np.float32).tobytes()


def test_a_worker_is_configured_first_and_given_its_batch_whole(stage: Stage, peers: Joined) -> None:
    peer = peers(3)
    batch = stage.batch(3, {3: [0, 4], 9: [2]})

    def check() -> None:
        message, frames = peer.hear()
        assert isinstance(message, Compute)
        assert (message.layer, message.activation_kind, message.tokens) == (LAYER, 256, 5)
        assert (message.experts, message.slots, message.starts) == ([3, 9], batch.slots, [0, 2, 3])
        (frame,) = frames
        assert [bytes(part) for part in split(frame)] == [
            a.tobytes() for a in (*batch.activations, batch.rows)
        ]
        peer.say(Outputs(seq=message.seq, busy_ns=1), answer(1.0, 3))

    (output,) = stage.exchange([batch], check)
    assert output.shape == (3, D_MODEL)


def test_outputs_keep_the_order_of_the_batches(stage: Stage, peers: Joined) -> None:
    one, two = peers(0), peers(1)

    def reversed_answers() -> None:
        for peer, value in ((two, 2.0), (one, 1.0)):
            peer.say(Outputs(seq=peer.computation().seq, busy_ns=1), answer(value))

    outputs = stage.exchange([stage.batch(0, {3: [0]}), stage.batch(1, {3: [0]})], reversed_answers)
    assert [float(output[0, 0]) for output in outputs] == [1.0, 2.0]


def give_up_a_step(stage: Stage, slow: Peer, failing: Peer) -> Compute:
    """Break an exchange off before `slow` has answered; return what it still has to do."""
    pending: list[Compute] = []

    def fail() -> None:
        pending.append(slow.computation())
        failing.say(Trouble(seq=failing.computation().seq, code="internal", text="for a test"))

    batches = [stage.batch(slow.hello.index, {3: [0]}), stage.batch(failing.hello.index, {3: [0]})]
    with pytest.raises(InternalError, match="for a test"):
        stage.exchange(batches, fail)
    return pending[0]


@pytest.mark.parametrize("late", ["outputs", "trouble"])
def test_what_answers_a_step_that_was_given_up_does_not_count(stage: Stage, peers: Joined, late: str) -> None:
    slow, failing = peers(0), peers(1)
    old = give_up_a_step(stage, slow, failing)

    def late_then_right() -> None:
        if late == "outputs":
            slow.say(Outputs(seq=old.seq, busy_ns=1), answer(-1.0))
        else:
            slow.say(Trouble(seq=old.seq, code="internal", text="of the step before"))
        slow.say(Outputs(seq=slow.computation().seq, busy_ns=1), answer(5.0))

    (output,) = stage.exchange([stage.batch(0, {3: [0]})], late_then_right)
    assert (output == 5.0).all()


def test_reading_goes_on_through_a_step_that_was_given_up(stage: Stage, peers: Joined) -> None:
    peer, failing = peers(0), peers(1)
    page = stage.plan.expert_page(stage.file, LAYER, 1, 4)
    seq = stage.lane.page_in(0, page, urgent=False)
    message, _ = peer.hear()
    assert message == PageIn(seq=seq, page=page, urgent=False)
    give_up_a_step(stage, peer, failing)
    peer.say(Paged(seq=10**6, nbytes=1, read_ns=1, busy_ns=1))  # nobody asked for that one
    peer.say(Paged(seq=seq, nbytes=7, read_ns=8, busy_ns=9))
    answer = stage.lane.collect((), (seq,), "a test")
    assert answer == Loaded(seq=seq, nbytes=7, read_ns=8, busy_ns=9)


def test_what_was_read_while_nobody_waited_is_not_lost(stage: Stage, peers: Joined) -> None:
    peer = peers(0)
    seqs = [
        stage.lane.page_in(0, stage.plan.expert_page(stage.file, LAYER, e, e), urgent=False) for e in (1, 2)
    ]
    for seq in seqs:
        peer.say(Paged(seq=seq, nbytes=1, read_ns=1, busy_ns=1))
    time.sleep(0.2)
    assert stage.settle() == []
    assert [loaded.seq for loaded in stage.lane.reads()] == seqs
    assert stage.lane.reads() == []


def test_an_expert_that_cannot_be_read_is_an_answer_and_not_the_end(stage: Stage, peers: Joined) -> None:
    peer = peers(0)
    seq = stage.lane.page_in(0, stage.plan.expert_page(stage.file, LAYER, 1, 4), urgent=True)
    peer.say(Trouble(seq=seq, code="model_read", text="for a test"))
    answer = stage.lane.collect((), (seq,), "a test")
    assert isinstance(answer, Loaded)
    assert isinstance(answer.error, ModelReadError)


@pytest.mark.parametrize(
    "frames", [[], [b""], [answer(1.0)[:-4]], [answer(1.0, 2)], [answer(1.0), b""]], ids=len
)
def test_an_answer_of_the_wrong_size_is_an_error(stage: Stage, peers: Joined, frames: list[bytes]) -> None:
    peer = peers(0)

    def wrong() -> None:
        peer.say(Outputs(seq=peer.computation().seq, busy_ns=1), *frames)

    with pytest.raises(InternalError, match="worker 0"):
        stage.exchange([stage.batch(0, {3: [0]})], wrong)


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"hello", encode(Outputs(seq=1, busy_ns=1))[:-1]], ids=repr)
def test_a_frame_that_is_no_message_is_an_error(stage: Stage, peers: Joined, raw: bytes) -> None:
    peer = peers(0)
    with pytest.raises(ProtocolError):
        stage.exchange([stage.batch(0, {3: [0]})], lambda: peer.socket.send(raw))


def test_a_worker_that_joins_during_a_step_does_not_disturb_it(stage: Stage, peers: Joined) -> None:
    peer, newcomer = peers(0), Peer(stage, 1)

    def joins() -> None:
        newcomer.say(newcomer.hello)
        assert isinstance(peer.hear()[0], Compute)
        time.sleep(0.1)  # so that the hello is there first
        peer.say(Outputs(seq=stage.lane._seq, busy_ns=1), answer(1.0))

    stage.exchange([stage.batch(0, {3: [0]})], joins)
    assert stage.settle() == [Join(worker=1)]
    assert isinstance(newcomer.hear()[0], Configure)
    newcomer.close()


def test_a_successor_that_joins_during_the_step_breaks_it_off(stage: Stage, peers: Joined) -> None:
    peers(0)
    successor = Peer(stage, 0, identity=b"successor")
    with pytest.raises(WorkerLost, match="worker 0"):
        stage.exchange([stage.batch(0, {3: [0]})], lambda: successor.say(successor.hello))
    assert stage.settle() == [Leave(worker=0), Join(worker=0)]
    successor.close()


@pytest.mark.parametrize("how", ["left", "dead"])
def test_a_worker_that_is_gone_right_after_its_hello_harms_nobody(stage: Stage, how: str) -> None:
    """It may have crashed at once: the scheduler must not fall with it."""
    peer = Peer(stage, 0)
    peer.say(peer.hello)
    assert stage.wait(5000)
    if how == "dead":
        peer.process.kill()
        peer.process.wait(START_S)
    peer.close()
    time.sleep(0.3)  # until the lane's side of the connection is closed too
    first = stage.settle()
    assert first in ([], [Join(worker=0)], [Leave(worker=0)])
    # Whether it counted as joined or not, it must be found gone before anybody waits for it.
    peer.process.kill()
    peer.process.wait(START_S)
    assert [*first, *stage.settle()] in ([], [Leave(worker=0)], [Join(worker=0), Leave(worker=0)])
    assert len(stage.lane.sources()) == 1  # the socket: nobody is watched any more
    with pytest.raises(WorkerLost, match="worker 0"):
        stage.exchange([stage.batch(0, {3: [0]})])


def test_a_worker_nobody_knows_is_lost_at_once(stage: Stage) -> None:
    with pytest.raises(WorkerLost, match="worker 7"):
        stage.exchange([stage.batch(7, {3: [0]})])


def test_chatter_does_not_extend_the_time_limit(tmp_path: Path) -> None:
    stage = Stage(tmp_path, timeout_s=0.5)
    peer = Peer(stage, 0)
    peer.say(peer.hello)
    stage.join(0)
    quiet = threading.Event()

    def chatter() -> None:
        until_s = time.monotonic() + 4.0
        while time.monotonic() < until_s and not quiet.wait(0.0005):
            peer.say(Outputs(seq=10**6, busy_ns=1), b"")

    thread = threading.Thread(target=chatter)
    begin_s = time.monotonic()
    with pytest.raises(WorkerLost):
        stage.exchange([stage.batch(0, {3: [0]})], thread.start)
    elapsed_s = time.monotonic() - begin_s
    quiet.set()
    thread.join(5.0)
    peer.close()
    stage.close()
    assert elapsed_s < 2.0


def test_closing_gives_all_descriptors_back(tmp_path: Path) -> None:
    zmq.Context.instance()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for round_number in range(3):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        stage = Stage(folder, PATIENT_S)
        peer = Peer(stage, 0)
        peer.say(peer.hello)
        stage.join(0)
        assert len(stage.lane.sources()) == 2  # the socket and a pidfd
        peer.close()
        stage.close()
        assert len(stage.lane.sources()) == 1
    time.sleep(0.2)  # the socket's own end in ZeroMQ's thread
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


class Heartbeats:
    """A `Presence` without pidfds, as a worker on another machine needs: told who has fallen silent."""

    def __init__(self) -> None:
        self.watched: set[int] = set()
        self.silent: set[int] = set()
        self.killed: list[int] = []

    def watch(self, peer: int, hello: Hello) -> bool:
        self.watched.add(peer)
        return True

    def ended(self, peer: int) -> bool:
        return peer not in self.watched or peer in self.silent

    def kill(self, peer: int) -> None:
        self.killed.append(peer)

    def forget(self, peer: int) -> None:
        self.watched.discard(peer)

    def sources(self) -> list[int]:
        return []


def test_a_loss_may_be_noticed_without_pidfds(tmp_path: Path) -> None:
    presence = Heartbeats()
    stage = Stage(tmp_path, PATIENT_S, presence)
    peer = Peer(stage, 0)
    peer.say(peer.hello)
    stage.join(0)
    (number,) = presence.watched
    assert isinstance(peer.hear()[0], Configure)

    def falls_silent() -> None:
        peer.computation()
        presence.silent.add(number)

    with pytest.raises(WorkerLost, match="worker 0 died"):
        stage.exchange([stage.batch(0, {3: [0]})], falls_silent)
    assert stage.settle() == [Leave(worker=0)]
    assert (presence.watched, presence.killed) == (set(), [])
    successor = Peer(stage, 0, identity=b"successor")
    successor.say(successor.hello)
    stage.join(0)
    seq = stage.lane.page_in(0, stage.plan.expert_page(stage.file, LAYER, 1, 4), urgent=True)
    stage.lane.tell(AnswersOverdue(requests=(seq,)))
    assert stage.settle() == [Leave(worker=0)]
    assert len(presence.killed) == 1
    assert presence.watched == set()
    for each in (peer, successor):
        each.close()
    stage.close()
