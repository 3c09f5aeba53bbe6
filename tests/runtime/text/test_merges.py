"""Merges whose result is no token: llama.cpp applies them all the same, and so does the tokenizer.

`oracle` is llama.cpp's way (`llm_tokenizer_bpe_session`): the merge of least rank first, of equal ones the
leftmost; what is no token in the end is written byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.runtime.config import embedded_model
from sterna.runtime.examine.describe import validate
from sterna.runtime.text.tokenizer import Tokenizer
from sterna.runtime.text.vocabulary import ALPHABET

from ...scheduler import altered_model as altered

PREFIX = "tokenizer.ggml."
LETTERS = "abc"


def metadata(merges: Sequence[str], tokens: Sequence[str], pre: str = "gpt-2") -> dict[str, object]:
    values = {"model": "gpt2", "pre": pre, "tokens": [*ALPHABET, *tokens], "merges": list(merges)}
    return {PREFIX + name: value for name, value in values.items()}


def oracle(word: str, merges: Sequence[str], tokens: Sequence[str], whole_words: bool = False) -> list[str]:
    """Return the pieces of a word of ASCII letters as llama.cpp cuts it."""
    if whole_words and word in tokens:
        return [word]
    ranks: dict[tuple[str, str], int] = {}
    for rank, line in enumerate(merges):
        left, right = line.split(" ")
        ranks.setdefault((left, right), rank)
    symbols = list(word)
    while True:
        pairs = list(pairwise(symbols))
        found = [(ranks[pair], at) for at, pair in enumerate(pairs) if pair in ranks]
        if not found:
            break
        _, at = min(found)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    known = {*ALPHABET, *tokens}
    return [piece for symbol in symbols for piece in ([symbol] if symbol in known else symbol)]


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Return merges, each of letters or of earlier results, and those of the results that are tokens."""
    parts = list(LETTERS)
    merges: list[str] = []
    for _ in range(draw(st.integers(1, 8))):
        left, right = draw(st.sampled_from(parts)), draw(st.sampled_from(parts))
        merges.append(f"{left} {right}")
        parts.append(left + right)
    results = sorted({part for part in parts if len(part) > 1})
    return merges, draw(st.lists(st.sampled_from(results), unique=True))


@pytest.mark.parametrize(("pre", "whole_words"), [("gpt-2", False), ("llama-bpe", True)])
@settings(max_examples=300, deadline=None)
@given(made=vocabularies(), words=st.lists(st.text(LETTERS, min_size=1, max_size=12), min_size=1, max_size=4))
def test_as_llama_cpp(
    pre: str, whole_words: bool, made: tuple[list[str], list[str]], words: list[str]
) -> None:
    merges, tokens = made
    tok = Tokenizer.from_metadata(metadata(merges, tokens, pre), "made.gguf")
    for word in words:
        ids = tok.encode(word, add_bos=False)
        assert [tok.id_to_piece(i) for i in ids] == oracle(word, merges, tokens, whole_words)
        assert tok.decode(ids) == word


def test_a_merge_without_a_token_still_takes_its_parts() -> None:
    tok = Tokenizer.from_metadata(metadata(["a b", "b c", "ab c"], ["bc"]), "made.gguf")
    # "a b" comes first and takes the b away from "b c"; left out, the text would be a, bc.
    assert [tok.id_to_piece(i) for i in tok.encode("abc", add_bos=False)] == ["a", "b", "c"]
    assert [tok.id_to_piece(i) for i in tok.encode("bc", add_bos=False)] == ["bc"]
    assert max(tok.encode("abcabcab", add_bos=False)) < tok.vocab_size == 257


def test_no_byte_is_lost_outside_of_ascii() -> None:
    tok = Tokenizer.from_metadata(metadata(["Ġ a", "Ã ©"], []), "made.gguf")
    assert tok.decode(tok.encode("a a é a", add_bos=False)) == "a a é a"


def test_validate_warns_and_the_model_loads(tmp_path: Path) -> None:
    fields = altered.original().fields
    keys = {name: (f.contents(), f.types[0]) for name, f in fields.items() if name.startswith(PREFIX)}
    merges, value_type = keys[PREFIX + "merges"]
    keys[PREFIX + "merges"] = ([*merges, "z q", "q z"], value_type)
    found = validate(altered.write(tmp_path / "merges.gguf", keys=keys))
    assert (found["loads"], found["problems"]) == (True, [])
    (line,) = [text for text in found["warnings"] if "merges[" in text]
    assert f"merges[{len(merges)}]: 'z q' makes 'zq', which is not in tokenizer.ggml.tokens (2 such" in line
    assert [text for text in validate(embedded_model())["warnings"] if "merges[" in text] == []
