"""Any text comes back from its tokens, for each way of cutting words and for pieces with scores."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.runtime.text.small_vocabularies import SPACE, USER_DEFINED, byte_level, words

from sterna.runtime.text.detokenizer import StreamDetokenizer
from sterna.runtime.text.pre_tokenizers import PRE_TOKENIZERS
from sterna.runtime.text.tokenizer import Tokenizer

# One name of each way to cut words.
FAMILIES = list({splitting: name for name, splitting in reversed(PRE_TOKENIZERS.items())}.values())
ANY = st.characters(exclude_categories=["Cs"])
# Characters that the rules are about, in the company of all the others.
TELLING = st.sampled_from(
    [*" \t\r\n'.,!1239aAdeEhlLmMrsStTvV<|>/\u0301\u00a0\u3000中り한é\U0001f600", "the", "<tool>"]
)
TEXT = st.lists(ANY | TELLING, max_size=40).map("".join)

WHICH = st.integers(0, len(FAMILIES) - 1)


@cache
def byte_levels() -> list[Tokenizer]:
    extra = (("<tool>", USER_DEFINED), ("  ", USER_DEFINED))
    return [Tokenizer.from_metadata(byte_level(name, extra), f"{name}.gguf") for name in FAMILIES]


@cache
def by_bytes() -> Tokenizer:
    return Tokenizer.from_metadata({}, "bytes.gguf")


def check(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    rest = ids[1:] if tok.adds_bos else ids
    assert tok.decode(rest) == text
    stream = StreamDetokenizer(tok)
    assert "".join([stream.push([i]) for i in rest]) + stream.finish() == tok.bytes_of(rest).decode()


def check_scored(text: str) -> None:
    # This one writes a space as U+2581, so one cannot be told from the other; and a space before each text.
    check(words(), text.replace(SPACE, "_").replace("<tool>", ""))


def check_all(text: str, which: int) -> None:
    check(byte_levels()[which], text)
    check(by_bytes(), text)
    check_scored(text)


@settings(max_examples=500, deadline=None)
@given(text=TEXT, which=WHICH)
def test_any_text_comes_back(text: str, which: int) -> None:
    check_all(text, which)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=100_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(text=TEXT, which=WHICH)
def test_100000_texts_come_back(text: str, which: int) -> None:
    check_all(text, which)
