"""Streamed text against the whole text, for any ids, any cut, any stop strings."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from sterna.runtime.text.detokenizer import StopMatcher, StreamDetokenizer
from sterna.runtime.text.tokenizer import Tokenizer
from sterna.shm.errors import BadRequest

MODEL = Path(__file__).parents[3] / "runtime/models/tales-small.gguf"


@cache
def tales() -> Tokenizer:
    fields = GGUFReader(MODEL).fields
    metadata = {key: f.contents() for key, f in fields.items() if key.startswith("tokenizer.")}
    return Tokenizer.from_metadata(metadata, MODEL.name)


@cache
def by_bytes() -> Tokenizer:
    return Tokenizer.from_metadata({}, "bare.gguf")


def streamed(tok: Tokenizer, chunks: list[list[int]], *, skip_special: bool = True) -> str:
    stream = StreamDetokenizer(tok, skip_special=skip_special)
    return "".join([stream.push(chunk) for chunk in chunks]) + stream.finish()


def byte_ids(data: bytes) -> list[int]:
    return [4 + byte for byte in data]


@given(data=st.data(), skip_special=st.booleans(), of_bytes=st.booleans())
def test_pieces_join_to_the_whole(data: st.DataObject, skip_special: bool, of_bytes: bool) -> None:
    tok = by_bytes() if of_bytes else tales()
    # The first ids are single bytes: most sequences of them are invalid UTF-8.
    token_id = st.integers(0, 259) | st.integers(0, tok.vocab_size - 1)
    chunks = data.draw(st.lists(st.lists(token_id, max_size=5)))
    whole = tok.decode(itertools.chain(*chunks), skip_special=skip_special)
    assert streamed(tok, chunks, skip_special=skip_special) == whole


def test_every_short_sequence_of_telling_bytes_at_every_cut() -> None:
    # Continuations, overlong forms, surrogates, beyond U+10FFFF, and a byte that never occurs.
    telling = b"A\x80\x9f\xa0\xbf\xc0\xc3\xe0\xe2\xed\xf0\xf4\xff"
    for letters in itertools.product(telling, repeat=4):
        whole = bytes(letters).decode("utf-8", "replace")
        for sizes in ((1, 1, 1, 1), (2, 2), (1, 3), (3, 1), (4,)):
            ends = list(itertools.accumulate(sizes, initial=0))
            chunks = [byte_ids(bytes(letters[a:b])) for a, b in itertools.pairwise(ends)]
            assert streamed(by_bytes(), chunks) == whole, (letters, sizes)


def test_a_split_character_is_held_back() -> None:
    stream = StreamDetokenizer(by_bytes())
    pieces = [stream.push([i]) for i in byte_ids("a😀é".encode())]
    assert pieces == ["a", "", "", "", "😀", "", "é"]
    assert stream.finish() == ""


def test_a_control_token_inside_a_character_changes_nothing() -> None:
    first, second = byte_ids("é".encode())
    assert streamed(by_bytes(), [[first], [by_bytes().bos_id or 0], [second]]) == "é"


def test_finish_flushes_and_starts_anew() -> None:
    stream = StreamDetokenizer(by_bytes())
    assert stream.push(byte_ids(b"a\xf0\x9f")) == "a"
    assert stream.finish() == "\ufffd"
    assert stream.push(byte_ids(b"\x98b")) == "\ufffdb"
    assert stream.finish() == ""


def test_a_bad_id_takes_nothing_from_its_push() -> None:
    stream = StreamDetokenizer(by_bytes())
    first, second = byte_ids("é".encode())
    assert stream.push([first]) == ""
    with pytest.raises(BadRequest, match="token id 260 "):
        stream.push([4 + ord("x"), 260])
    assert stream.push([second]) == "é"


def matched(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text, stopped = "", False
    for piece in pieces:
        emit, stopped = matcher.push(piece)
        text += emit
    return text + matcher.finish(), stopped


def matched_naively(stops: list[str], text: str) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


LETTERS = st.text("aab", max_size=12)


@given(stops=st.lists(st.text("aab", min_size=1, max_size=6), max_size=4), pieces=st.lists(LETTERS))
def test_stops_as_in_the_whole_text(stops: list[str], pieces: list[str]) -> None:
    assert matched(stops, pieces) == matched_naively(stops, "".join(pieces))


@given(stops=st.lists(st.text("aab", min_size=1, max_size=6), max_size=4), pieces=st.lists(LETTERS))
def test_no_more_is_held_back_than_a_stop_string_may_need(stops: list[str], pieces: list[str]) -> None:
    matcher, seen, shown = StopMatcher(stops), "", ""
    for piece in pieces:
        emit, stopped = matcher.push(piece)
        seen, shown = seen + piece, shown + emit
        if stopped:
            return
        held = seen[len(shown) :]
        begun = [n for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])]
        assert len(held) == max(begun, default=0)
        assert seen == shown + held


def test_stop_string_across_tokens() -> None:
    ids = tales().encode("The king said: THE END of it", add_bos=False)
    stream, matcher = StreamDetokenizer(tales()), StopMatcher(["E EN", "never"])
    shown, stopped_at = "", -1
    for n_pushed, token_id in enumerate(ids, start=1):
        emit, stopped = matcher.push(stream.push([token_id]))
        shown += emit
        if stopped:
            stopped_at = n_pushed
            break
    assert shown == "The king said: TH"
    through = tales().decode(ids[:stopped_at])
    assert "E EN" in through
    assert "E EN" not in tales().decode(ids[: stopped_at - 1])
    assert all("E EN" not in tales().decode([i]) for i in ids), "no token holds the stop string alone"


def test_after_the_stop_nothing_is_shown() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("\ntwo\n") == ("", True)
    assert matcher.push("three") == ("", True)
    assert matcher.finish() == ""


def test_held_text_is_shown_when_no_stop_follows() -> None:
    matcher = StopMatcher(["<end>"])
    assert matcher.push("a<e") == ("a", False)
    assert matcher.push("x<en") == ("<ex", False)
    assert matcher.finish() == "<en"
    assert matcher.push("d>") == ("d>", False), "finish() forgot the beginning"


def test_the_stop_that_is_complete_first_counts_and_of_two_the_longer() -> None:
    assert matched(["abcd", "bc"], ["abcd"]) == ("a", True)
    assert matched(["bc", "abc"], ["xabc"]) == ("x", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"stop\[1\]: .* empty"):
        StopMatcher(["a", ""])


def test_without_stops_all_passes() -> None:
    assert matched([], ["a", "", "b"]) == ("ab", False)
