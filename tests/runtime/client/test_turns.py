"""Whose turn it is: the order of requests over one connection, without a socket."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sterna.runtime.client.replies import never_sent
from sterna.runtime.client.turns import Turns
from sterna.runtime.protocol import messages as m


def turns(max_queue: int, max_sequences: int = 1, now_s: float = 0.0) -> Turns:
    made = Turns()
    made.restart(m.Limits(max_frame_bytes=65_536, max_queue=max_queue, max_sequences=max_sequences), now_s)
    return made


def sent(line: Turns, now_s: float = 0.0) -> list[str]:
    return [frame.decode() for frame in line.due(now_s)]


def failed(request_id: str) -> m.Failed:
    return m.Failed(id=request_id, code="overloaded", text="full", retryable=True)


def test_the_end_of_one_is_the_turn_of_the_next() -> None:
    line = turns(2)
    for name in "abcde":
        line.add(name, name.encode())
    assert sent(line) == ["a", "b"]
    line.feed("a", m.Accepted(id="a", prompt_token_ids=[1], queue_position=0), 0.0)
    assert sent(line) == []
    line.feed("b", never_sent("b"), 0.0)
    line.feed("b", failed("b"), 0.0)  # the complaint about a cancel that came too late
    assert sent(line) == ["c"]
    line.feed("a", failed("a"), 0.0)
    assert sent(line) == ["d"]
    assert line.num_open == 3


def test_a_request_that_waits_can_be_withdrawn() -> None:
    line = turns(1)
    for name in "abc":
        line.add(name, name.encode())
    assert sent(line) == ["a"]
    assert not line.withdraw("a")  # it was sent: the daemon has to end it
    assert line.withdraw("b")
    assert not line.withdraw("b")
    line.feed("a", never_sent("a"), 0.0)
    assert sent(line) == ["c"]


def test_sequences_beyond_a_short_queue_are_used() -> None:
    line = turns(1, max_sequences=3)
    for name in "abcd":
        line.add(name, name.encode())
    assert sent(line) == ["a", "b", "c"]


def test_a_new_connection_knows_nothing_of_the_old() -> None:
    line = turns(1)
    for name in "ab":
        line.add(name, name.encode())
    assert sent(line) == ["a"]
    line.restart(m.Limits(max_frame_bytes=65_536, max_queue=1, max_sequences=1), 5.0)
    assert line.num_open == 0
    line.add("c", b"c")
    assert sent(line) == ["c"]


def test_waiting_is_quiet_only_while_those_before_are() -> None:
    line = turns(1, now_s=10.0)
    line.add("a", b"a")
    line.add("b", b"b")
    assert sent(line, 11.0) == ["a"]
    assert (line.quiet_since_s("a"), line.quiet_since_s("b"), line.quiet_since_s("none")) == (11.0, 10.0, 0.0)
    line.feed("a", m.TokenItem(id="a", index=0, token_ids=[1], text="x"), 12.0)
    line.feed("other", never_sent("other"), 99.0)
    assert line.quiet_since_s("b") == 12.0
    line.feed("a", never_sent("a"), 13.0)
    assert sent(line, 14.0) == ["b"]
    assert line.quiet_since_s("b") == 14.0


ACTS = st.tuples(st.sampled_from(["add", "end", "withdraw"]), st.integers(0, 30))


@given(st.integers(1, 5), st.lists(ACTS))
def test_nothing_is_lost_overtaken_or_too_much(limit: int, acts: list[tuple[str, int]]) -> None:
    line, number = turns(limit), 0
    in_flight: list[str] = []
    waiting: list[str] = []
    for act, which in acts:
        if act == "add":
            waiting.append(f"{number:04}")
            line.add(waiting[-1], waiting[-1].encode())
            number += 1
        elif act == "end" and in_flight:
            ended = in_flight.pop(which % len(in_flight))
            line.feed(ended, never_sent(ended), 0.0)
        elif act == "withdraw" and waiting:
            assert line.withdraw(waiting.pop(which % len(waiting)))
        room = limit - len(in_flight)
        assert sent(line) == waiting[:room]
        in_flight += waiting[:room]
        del waiting[:room]
        assert line.num_open == len(in_flight) + len(waiting)
