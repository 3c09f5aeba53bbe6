"""The tokenizer against the embedded model's metadata, llama.cpp's ids for it, and contradictory metadata."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, overload

import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from sterna.runtime.text.tokenizer import Tokenizer
from sterna.shm.errors import BadRequest, ModelFileError

ROOT = Path(__file__).parents[3]
GOLDEN: list[dict[str, Any]] = json.loads((ROOT / "tests/data/tales-golden.json").read_text())["cases"]
PREFIX = "tokenizer.ggml."
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@cache
def tales_metadata() -> dict[str, object]:
    reader = GGUFReader(ROOT / "runtime/models/tales-small.gguf")
    return {key: f.contents() for key, f in reader.fields.items() if key.startswith(PREFIX)}


@cache
def tales() -> Tokenizer:
    return Tokenizer.from_metadata(tales_metadata(), "tales-small.gguf")


@cache
def by_bytes() -> Tokenizer:
    return Tokenizer.from_metadata({}, "bare.gguf")


def small(**changes: object) -> dict[str, object]:
    """Metadata with the 256 byte tokens, three merges, control tokens 260 and 261, a user-defined 262."""
    letters = _tales_tokens()[1:257]
    values: dict[str, object] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*letters, "Ġt", "he", "Ġthe", "[PAD259]", "<|user|>", "<|end|>", "<tool>"],
        "token_type": [1] * 259 + [5, 3, 3, 4],
        "merges": ["Ġ t", "h e", "Ġt he"],
        "bos_token_id": 260,
        "eos_token_id": 261,
        **changes,
    }
    return {PREFIX + name: value for name, value in values.items() if value is not None}


def _tales_tokens() -> list[str]:
    tokens = tales_metadata()[PREFIX + "tokens"]
    assert isinstance(tokens, list)
    return tokens


def build(**changes: object) -> Tokenizer:
    return Tokenizer.from_metadata(small(**changes), "small.gguf")


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: repr(case["text"][:24]))
def test_golden_ids_and_text_are_llama_cpps(case: dict[str, Any]) -> None:
    assert tales().encode(case["text"]) == case["prompt_ids"]
    assert tales().decode(case["greedy_ids"]) == case["greedy_text"]
    assert tales().decode(case["prompt_ids"]) == case["text"]


def test_tales_attributes() -> None:
    tok = tales()
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.stop_ids) == (2048, 0, 0, frozenset({0}))
    assert tok.adds_bos
    assert not tok.adds_eos
    assert (tok.id_to_piece(0), tok.token_bytes(0)) == ("<|endoftext|>", b"")
    the = tok.encode(" the", add_bos=False)
    assert [(tok.id_to_piece(i), tok.token_bytes(i)) for i in the] == [("Ġthe", b" the")]


def test_all_256_bytes_have_a_token() -> None:
    spelled = {tales().token_bytes(i) for i in range(tales().vocab_size)}
    assert {bytes((b,)) for b in range(256)} <= spelled


@given(text=TEXT, special=st.booleans())
def test_round_trip_of_any_text(text: str, special: bool) -> None:
    for tok in (tales(), by_bytes()):
        ids = tok.encode(text, special=special)
        assert ids[0] == tok.bos_id
        assert tok.decode(ids[1:], skip_special=not special) == text
        assert b"".join(map(tok.token_bytes, tok.encode(text))) == text.encode()


@given(
    text=st.lists(st.sampled_from(["<|user|>", "<|end|>", "<tool>", "the", " ", "<|", "\u00e9"])).map("".join)
)
def test_control_tokens_never_come_out_of_user_text(text: str) -> None:
    tok = build()
    ids = tok.encode(text, add_bos=False)
    assert not {260, 261} & set(ids)
    assert tok.decode(ids) == text


def test_control_tokens_are_parsed_when_asked() -> None:
    tok = build()
    text = "<|user|>he <tool><|end|>"
    assert tok.encode(text, special=True) == [260, 257, *tok.encode(" "), 262, 261]
    assert tok.encode(text)[-1] != 261
    assert tok.encode(text).count(262) == 1, "user-defined tokens are found in any text"
    assert tok.decode(tok.encode(text, special=True)) == "he <tool>"
    assert tok.decode(tok.encode(text, special=True), skip_special=False) == text


def test_unknown_tokens_are_control_tokens_and_unused_ones_stand_for_nothing() -> None:
    tok = build(token_type=[1] * 259 + [5, 2, 3, 4])
    assert tok.encode("<|user|>", special=True) == [260]
    assert 259 not in tok.encode("[PAD259]", special=True)
    assert tok.decode([257, 259, 260, 257]) == "hehe"


def test_a_byte_without_a_token_is_refused_not_dropped() -> None:
    tokens = [*small()[PREFIX + "tokens"]]  # type: ignore[misc]
    tokens[tokens.index("ñ")] = "[0xF1]"  # begins characters of planes 4 to 7
    tok = build(tokens=tokens)
    assert tok.decode(tok.encode("ñ 😀")) == "ñ 😀"
    with pytest.raises(BadRequest, match=r"text: the model has no token for byte 0xF1 of '\\U00040000'"):
        tok.encode("é \U00040000")
    with pytest.raises(BadRequest, match="no token for byte 0x21 of '!'"):
        build(token_type=[3] + [1] * 262).encode("!")


def test_a_merge_never_makes_a_control_token() -> None:
    tok = build(token_type=[1] * 257 + [3, 1, 5, 3, 3, 4])  # 257 is "he"
    assert tok.decode(tok.encode("the")) == "the"
    assert tok.encode("he") == [*tok.encode("h"), *tok.encode("e")]
    assert tok.encode("he", special=True) == [257]


def test_tokens_outside_the_alphabet_are_their_own_text() -> None:
    tokens = [*small()[PREFIX + "tokens"], "a b", "日本", "Ġuser"]  # type: ignore[misc]
    tok = build(tokens=tokens, token_type=[1] * 259 + [5, 3, 3, 4, 1, 1, 4])
    assert [tok.token_bytes(i) for i in (263, 264, 265)] == [b"a b", "日本".encode(), "Ġuser".encode()]
    assert tok.decode(tok.encode("xĠusery")) == "xĠusery"


def test_bos_and_eos() -> None:
    tok = build(add_bos_token=True, add_eos_token=True)
    assert tok.encode("he") == [260, 257]
    assert tok.encode("he", add_bos=False) == [257]
    assert tok.encode("he", add_eos=tok.adds_eos) == [260, 257, 261]
    assert build().encode("he") == [257], "gpt2 adds no BOS unless the metadata says so"
    assert build().encode("he", add_bos=True) == [260, 257]
    bare = build(bos_token_id=None, eos_token_id=None)
    assert (bare.bos_id, bare.eos_id, bare.stop_ids) == (None, None, {261})
    with pytest.raises(BadRequest, match="add_bos: this model has no BOS"):
        bare.encode("he", add_bos=True)
    with pytest.raises(BadRequest, match="add_eos: this model has no EOS"):
        bare.encode("he", add_eos=True)


def test_stop_ids_and_other_roles() -> None:
    tok = build(eot_token_id=260, eom_token_id=262, unknown_token_id=1, padding_token_id=259)
    assert tok.stop_ids == {260, 261, 262}
    assert (tok.unk_id, tok.pad_id) == (1, 259)


def test_byte_vocabulary_as_pinned() -> None:
    tok = by_bytes()
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.stop_ids) == (260, 1, 2, frozenset({2}))
    assert (tok.pad_id, tok.unk_id) == (0, 3)
    assert tok.encode("") == [1]
    assert tok.encode("A") == [1, 4 + ord("A")]
    assert tok.decode([1, 4 + ord("H"), 4 + ord("i"), 2]) == "Hi"
    assert tok.decode(tok.encode("cafe\u0301 ok")) == "cafe\u0301 ok"
    assert [tok.token_bytes(4 + b) for b in range(256)] == [bytes((b,)) for b in range(256)]
    assert [tok.token_bytes(i) for i in range(4)] == [b""] * 4
    assert [tok.id_to_piece(i) for i in (0, 1, 2, 3, 4, 259)] == [
        "<PAD>",
        "<BOS>",
        "<EOS>",
        "<UNK>",
        "<00>",
        "<FF>",
    ]
    assert tok.encode("a<EOS>", special=True) == [1, 4 + ord("a"), 2]
    assert 2 not in tok.encode("a<EOS>")
    silent = Tokenizer.from_metadata({PREFIX + "add_bos_token": False}, "bare.gguf")
    assert silent.encode("A") == [4 + ord("A")]


@pytest.mark.parametrize("bad_id", [-1, 2048, 2**63])
def test_ids_outside_the_vocabulary(bad_id: int) -> None:
    for call in (tales().token_bytes, tales().id_to_piece, lambda i: tales().decode([5, i])):
        with pytest.raises(BadRequest, match=rf"token id {bad_id} is outside the vocabulary, 0 to 2047"):
            call(bad_id)


@pytest.mark.parametrize("tok", [tales, by_bytes])
def test_lone_surrogates_are_refused(tok: Callable[[], Tokenizer]) -> None:
    with pytest.raises(BadRequest, match=r"text: .*lone surrogate '\\ud83d' at character 2"):
        tok().encode("ab\ud83d")


TWICE = ["a", "b", "a"]
CONTRADICTIONS: list[tuple[dict[str, object], str]] = [
    *(
        ({"model": name}, rf"model: '{name}' is not supported; supported: gpt2, llama")
        for name in ("bert", "t5", "rwkv", "plamo2", "gemma4", "none", "no_vocab", "hybriddna", "whitespace")
    ),
    ({"model": None}, r"model: is missing; supported: gpt2, llama"),
    ({"model": "none", "tokens": None}, r"model: 'none' is not supported"),
    ({"model": ["gpt2"]}, r"model: \['gpt2'\] is not supported"),
    ({"model": "llama"}, r"scores: is missing"),
    ({"model": "llama", "scores": [0.0]}, r"scores: expected 263 values, one per token, found 1"),
    ({"model": "llama", "scores": [float("nan")] * 263}, r"scores\[0\]: expected a finite number, found nan"),
    ({"model": "llama", "tokens": ["x" * 1025], "token_type": [1]}, r"tokens\[0\]: has more than 1024 char"),
    ({"model": "llama", "token_type": [6] * 263}, r"tokens\[0\]: is a byte, expected <0x00> to <0xFF>"),
    ({"pre": "glm"}, r"pre: 'glm' is not supported; supported: \d+ names such as glm\d, glm\d"),
    ({"pre": "x" * 5000}, r"pre: 'x{56}\.\.\. is not supported"),
    ({"pre": None}, r"pre: is missing; supported: \d+ names such as "),
    ({"tokens": TWICE}, r"tokens\[2\]: 'a' is also token 0"),
    ({"tokens": []}, r"tokens: is empty"),
    ({"tokens": "abc"}, r"tokens: expected an array, found 'abc'"),
    ({"tokens": ["a", 7]}, r"tokens\[1\]: expected a string, found 7"),
    ({"tokens": None}, r"tokens: is missing"),
    ({"tokens": None, "model": None}, r"merges: is there, but tokenizer.ggml.tokens is missing"),
    ({"token_type": [1] * 262}, r"token_type: expected 263 values, one per token, found 262"),
    ({"token_type": [9] * 263}, r"token_type\[0\]: expected 0 to 6, found 9"),
    ({"token_type": ["1"] * 263}, r"token_type\[0\]: expected 0 to 6, found '1'"),
    ({"merges": None}, r"merges: is missing"),
    ({"merges": ["Ġ t", "he"]}, r"merges\[1\]: expected two tokens and one space, found 'he'"),
    ({"merges": ["h  e"]}, r"merges\[0\]: expected two tokens and one space"),
    ({"merges": [" he"]}, r"merges\[0\]: expected two tokens and one space"),
    ({"merges": ["he "]}, r"merges\[0\]: expected two tokens and one space"),
    ({"merges": ["h e", "he zz"]}, r"merges\[1\]: 'zz' is not in tokenizer.ggml.tokens"),
    ({"merges": ["e h", "eh zz"]}, r"merges\[1\]: 'zz' is not in tokenizer.ggml.tokens"),
    ({"bos_token_id": 263}, r"bos_token_id: expected a token id of 0 to 262, found 263"),
    ({"eos_token_id": -1}, r"eos_token_id: expected a token id of 0 to 262, found -1"),
    ({"eot_token_id": 2**32 - 1}, r"eot_token_id: .* found 4294967295"),
    ({"eom_token_id": "1"}, r"eom_token_id: .* found '1'"),
    ({"unknown_token_id": True}, r"unknown_token_id: .* found True"),
    ({"padding_token_id": 999}, r"padding_token_id: .* found 999"),
    ({"add_bos_token": 1}, r"add_bos_token: expected true or false, found 1"),
    ({"add_bos_token": True, "bos_token_id": None}, r"add_bos_token: is true, but .*bos_token_id is missing"),
    ({"add_eos_token": True, "eos_token_id": None}, r"add_eos_token: is true, but .*eos_token_id is missing"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_contradictory_metadata_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelFileError, match=r"^small\.gguf: tokenizer\.ggml\." + message) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_byte_vocabulary_checks_its_metadata_too() -> None:
    for name, value in (("bos_token_id", 260), ("add_bos_token", "yes"), ("token_type", [1])):
        with pytest.raises(ModelFileError, match=rf"^bare\.gguf: {PREFIX}{name}: "):
            Tokenizer.from_metadata({PREFIX + name: value}, "bare.gguf")


class Lazy(Sequence[object]):
    """Elements made on access, as a reader of large files gives them."""

    def __init__(self, values: list[object]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> object: ...
    @overload
    def __getitem__(self, index: slice) -> list[object]: ...
    def __getitem__(self, index: int | slice) -> object:
        return self._values[index]


def test_arrays_may_be_any_sequence() -> None:
    metadata = {k: Lazy(v) if isinstance(v, list) else v for k, v in tales_metadata().items()}
    tok = Tokenizer.from_metadata(metadata, "lazy.gguf")
    assert tok.encode(GOLDEN[0]["text"]) == GOLDEN[0]["prompt_ids"]


def test_of_two_merges_of_a_pair_the_first_counts() -> None:
    tokens = [*small()[PREFIX + "tokens"], "hh"]  # type: ignore[misc]
    tok = build(tokens=tokens, token_type=None, merges=["h h", "h e", "h h"])
    assert [tok.id_to_piece(i) for i in tok.encode("hhe")] == ["hh", "e"]


def test_import_needs_no_numpy() -> None:
    code = (
        "import sys, sterna.runtime.text.detokenizer; "
        "sys.exit('numpy' in sys.modules or 'numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_encode_speed(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(case["text"] + case["greedy_text"] for case in GOLDEN) * 60
    for name, tok in (("gpt2", tales()), ("bytes", by_bytes())):
        started_s = time.process_time()
        ids = tok.encode(text, add_bos=False)
        elapsed_s = time.process_time() - started_s
        assert tok.decode(ids) == text
        rate = len(text.encode()) / elapsed_s / 1e6
        with capsys.disabled():
            print(f"\nencode {name}: {len(ids)} tokens, {rate:.1f} MB/s", end="")
