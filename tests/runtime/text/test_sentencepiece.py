"""Pieces with scores against the algorithm written naively, and the rules around spaces and bytes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.text.small_vocabularies import (
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    SPACE,
    UNUSED,
    USER_DEFINED,
    WORDS,
    scored,
    words,
)

from sterna.runtime.text.detokenizer import StreamDetokenizer
from sterna.runtime.text.tokenizer import Tokenizer
from sterna.shm.errors import BadRequest, ModelFileError


def naive(pieces: dict[str, float], text: str) -> list[str]:
    """Join the neighbours that form the piece with the best score, leftmost first, until none do."""
    parts = list((" " + text).replace(" ", SPACE))
    while True:
        joined = [
            (-pieces[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in pieces
        ]
        if not joined:
            break
        at = min(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = [[p] if p in pieces else [f"<0x{byte:02X}>" for byte in p.encode()] for p in parts]
    return list(itertools.chain(*spelled))


def pieces_of(tok: Tokenizer, text: str) -> list[str]:
    return [tok.id_to_piece(i) for i in tok.encode(text, add_bos=False)]


@given(text=st.text(st.sampled_from("aaabbthe  xé中.😀\n"), min_size=1, max_size=40))
def test_pieces_are_the_naive_algorithms(text: str) -> None:
    assert pieces_of(words(), text) == naive(WORDS, text)


@dataclass(frozen=True)
class Made:
    pieces: dict[str, float]
    tokenizer: Tokenizer


@cache
def made(texts: tuple[str, ...]) -> Made:
    pieces = {text: -float(rank) for rank, text in enumerate(texts)}
    return Made(pieces, Tokenizer.from_metadata(scored(pieces), "made.gguf"))


@settings(deadline=None)
@given(
    texts=st.lists(st.text(f"ab{SPACE}", min_size=1, max_size=4), min_size=1, max_size=12, unique=True),
    text=st.text("ab c", min_size=1, max_size=20),
)
def test_any_vocabulary_gives_the_naive_algorithms_pieces(texts: list[str], text: str) -> None:
    # Also those that lack the letters of their own pieces and those whose pieces reach across spaces.
    vocabulary = made(tuple(texts))
    assert pieces_of(vocabulary.tokenizer, text) == naive(vocabulary.pieces, text)


def test_usual_ids_bos_and_prefix() -> None:
    tok = words()
    assert (tok.unk_id, tok.bos_id, tok.eos_id, tok.adds_bos, tok.adds_eos) == (0, 1, 2, True, False)
    assert tok.stop_ids == {2}
    assert tok.encode("") == [1]
    assert [tok.id_to_piece(i) for i in tok.encode("the")] == ["<s>", f"{SPACE}the"]
    bare = Tokenizer.from_metadata(scored(WORDS, add_space_prefix=False, add_bos_token=False), "bare.gguf")
    assert [bare.id_to_piece(i) for i in bare.encode("the")] == ["the"]
    assert bare.decode(bare.encode(" the")) == " the"
    text_only = scored(WORDS, token_type=[NORMAL] * 3 + [BYTE] * 256 + [NORMAL] * len(WORDS))
    assert Tokenizer.from_metadata(text_only, "text.gguf").bos_id is None


def test_each_text_behind_a_special_token_gets_a_space() -> None:
    pieces = [words().id_to_piece(i) for i in words().encode("the</s>the<tool>b", special=True)]
    assert pieces == ["<s>", f"{SPACE}the", "</s>", f"{SPACE}the", "<tool>", SPACE, "b"]
    assert words().encode("a</s>").count(2) == 0


def test_a_text_loses_the_space_before_it_and_a_continuation_keeps_it() -> None:
    tok = words()
    ids = tok.encode("the the")
    assert tok.decode(ids) == tok.decode(ids[1:]) == "the the"
    assert tok.decode(ids, skip_special=False) == "<s>the the"
    assert tok.bytes_of(ids[1:]) == b" the the"
    stream = StreamDetokenizer(tok)
    assert [stream.push([i]) for i in ids] == ["", " the", " the"]


def test_bytes_become_characters_when_the_last_has_come() -> None:
    tok = words()
    ids = tok.encode("x😀", add_bos=False)
    assert [tok.id_to_piece(i) for i in ids[2:]] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    stream = StreamDetokenizer(tok)
    assert [stream.push([i]) for i in ids] == [" ", "x", "", "", "", "😀"]
    assert stream.push(ids[2:4]) == ""
    assert stream.finish() == "\ufffd"


def test_only_text_comes_out_of_text() -> None:
    extra = (("th", CONTROL), ("ex", UNUSED), ("xx", USER_DEFINED), (f"b{SPACE}", USER_DEFINED))
    pieces = {"t": -1.0, "h": -2.0, "<0": -3.0, "x0": -4.0, SPACE: -5.0}
    tok = Tokenizer.from_metadata(scored(pieces, extra), "m.gguf")
    ids = tok.encode("th ex <0x0A> xx", add_bos=False)
    assert tok.decode(ids) == "th ex <0x0A> xx"
    found = [tok.id_to_piece(i) for i in ids]
    assert {"th", "ex", "<0x0A>"}.isdisjoint(found)
    assert found[-1] == "xx", "user-defined tokens are found in any text"
    assert tok.id_to_piece(tok.encode("th", special=True)[-1]) == "th"
    # As it is in the file: spaces of user-defined tokens have been written out by whoever made it.
    assert tok.token_bytes(tok.vocab_size - 1) == f"b{SPACE}".encode()


def test_a_file_without_types_still_has_its_bytes() -> None:
    tok = Tokenizer.from_metadata(scored(WORDS, token_type=None, bos_token_id=1), "untyped.gguf")
    assert tok.decode(tok.encode("😀 the\n", add_bos=False)) == "😀 the\n"


def test_characters_without_bytes_are_refused_not_dropped() -> None:
    metadata = {PREFIX + "model": "llama", PREFIX + "tokens": ["<unk>", "a", "<0x62>"]}
    metadata |= {PREFIX + "token_type": [2, 1, 6], PREFIX + "scores": [0.0, -1.0, 0.0]}
    metadata |= {PREFIX + "add_space_prefix": False, PREFIX + "add_bos_token": False}
    tok = Tokenizer.from_metadata(metadata, "few.gguf")
    assert tok.encode("abba") == [1, 2, 2, 1]
    with pytest.raises(BadRequest, match="text: the model has no token for byte 0x63 of 'c'"):
        tok.encode("abc")
    with pytest.raises(BadRequest, match="byte 0xE2 of '\u2581'"):
        tok.encode("a b")
    with pytest.raises(ModelFileError, match="scores: is missing"):
        Tokenizer.from_metadata({k: v for k, v in metadata.items() if "scores" not in k}, "few.gguf")
