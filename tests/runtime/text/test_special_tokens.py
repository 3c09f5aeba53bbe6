"""Cutting texts at special tokens, and which tokens end an answer."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.runtime.text.small_vocabularies import CONTROL, NORMAL, USER_DEFINED, WORDS, byte_level, scored

from sterna.runtime.text.metadata import TokenType
from sterna.runtime.text.special_tokens import SpecialTokens, answer_ends
from sterna.runtime.text.tokenizer import Tokenizer

TYPES = st.sampled_from([TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN, TokenType.NORMAL])


@given(
    tokens=st.dictionaries(st.text("<|ab ", min_size=1, max_size=6), TYPES, min_size=1, max_size=40),
    text=st.text("<|ab ", max_size=60),
    special=st.booleans(),
)
def test_first_then_longest(tokens: dict[str, TokenType], text: str, special: bool) -> None:
    pieces, types = list(tokens), list(tokens.values())
    found = {TokenType.USER_DEFINED} | ({TokenType.CONTROL, TokenType.UNKNOWN} if special else set())
    wanted = sorted((p for p, t in tokens.items() if t in found), key=len, reverse=True)
    expected = re.split("(" + "|".join(map(re.escape, wanted)) + ")", text) if wanted else [text]
    texts, ids = SpecialTokens(pieces, types).split(text, special=special)
    assert texts == expected[::2]
    assert [pieces[i] for i in ids] == expected[1::2]


def test_thousands_of_tokens_and_long_ones() -> None:
    runs = [" " * n for n in range(2, 200)] + [f"<unused{n}>" for n in range(6000)] + ["<" * 5000]
    special = SpecialTokens(runs, [TokenType.USER_DEFINED] * len(runs))
    texts, ids = special.split("a" + " " * 150 + "b<unused10><" + "<" * 5000, special=False)
    assert texts == ["a", "b", "", "<"]
    assert [runs[i] for i in ids] == [" " * 150, "<unused10>", "<" * 5000]


def test_spaces_beside_tokens_by_the_models_name() -> None:
    extra = (("<|user|>", CONTROL), ("<|endoftext|>", CONTROL))
    phi = Tokenizer.from_metadata(scored(WORDS, extra) | {"general.name": "Phi-3 mini"}, "phi.gguf")
    text = "<|user|> \n\tthe<|endoftext|>  the"
    pieces = [phi.id_to_piece(i) for i in phi.encode(text, special=True, add_bos=False)]
    assert pieces == ["<|user|>", "\u2581the", "<|endoftext|>", "\u2581\u2581", "\u2581the"]
    mask = byte_level("jina-v2-code", (("<mask>", CONTROL),))
    jina = Tokenizer.from_metadata(mask, "jina.gguf")
    ids = jina.encode("a \n<mask> b", special=True)
    assert jina.decode(ids, skip_special=False) == "a<mask> b"


@pytest.mark.parametrize(
    ("texts", "stops"),
    [
        ("<|im_end|> <|endoftext|> <|im_start|>", "<|im_end|> <|endoftext|>"),
        ("<|fim_pad|> <|file_sep|> <|fim_prefix|>", "<|fim_pad|> <|file_sep|>"),
        ("<|eot_id|> <|eom_id|> <|python_tag|>", "<|eot_id|> <|eom_id|>"),
        ("<end_of_turn> <start_of_turn> <eos>", "<end_of_turn> <eos>"),
        ("<|end|> <|user|>", "<|end|>"),
        ("<|return|> <|call|> <|end|> <|start|>", "<|return|> <|call|>"),
        ("<|flush|> <|calls|> <|end|>", "<|flush|> <|calls|>"),
        ("<|return|> <|end|>", "<|return|> <|end|>"),
    ],
)
def test_tokens_that_end_an_answer(texts: str, stops: str) -> None:
    for token_type in (CONTROL, NORMAL):
        tok = Tokenizer.from_metadata(
            byte_level("gpt-2", tuple((t, token_type) for t in texts.split())), "m.gguf"
        )
        assert {tok.id_to_piece(i) for i in tok.stop_ids} == set(stops.split())
        assert all(tok.token_bytes(i) == b"" for i in tok.stop_ids)
        assert set(tok.encode(stops, special=True)) >= tok.stop_ids
        assert tok.stop_ids.isdisjoint(tok.encode(stops))


def test_roles_name_further_ends() -> None:
    extra = (("<|user|>", CONTROL), ("<|observation|>", CONTROL))
    metadata = byte_level("glm4", extra, eot_token_id=268, eom_token_id=269, eos_token_id=267)
    tok = Tokenizer.from_metadata(metadata, "glm.gguf")
    assert [tok.id_to_piece(i) for i in sorted(tok.stop_ids)] == ["<|bos|>", "<|user|>", "<|observation|>"]


def test_a_tag_of_ordinary_text_ends_nothing() -> None:
    for at, token_type, ends in (
        (9, TokenType.NORMAL, False),
        (9, TokenType.CONTROL, True),
        (2, TokenType.NORMAL, True),
    ):
        pieces = [f"t{i}" for i in range(10)]
        types = [TokenType.NORMAL] * 10
        pieces[at], types[at] = "</s>", token_type
        assert answer_ends(pieces, types) == ({at} if ends else set(), set())


def test_marks_between_parts_of_an_answer_are_shown_but_not_taken_from_text() -> None:
    names = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
    tok = Tokenizer.from_metadata(byte_level("gpt-4o", tuple((n, CONTROL) for n in names)), "oss.gguf")
    text = "<|channel|>a<|message|>b<|end|>"
    ids = tok.encode(text, special=True, add_bos=False)
    assert len(ids) == 5
    assert tok.decode(ids) == tok.decode(ids, skip_special=False) == text
    assert tok.decode(tok.encode("<|return|>", special=True)) == ""
    assert set(ids[::2]).isdisjoint(tok.encode(text))
    user = Tokenizer.from_metadata(byte_level("gpt-4o", (("<|start|>", USER_DEFINED),)), "u.gguf")
    assert user.decode(user.encode("x<|start|>y")) == "x<|start|>y"
