"""Metadata of small tokenizers made by hand, one of each model."""

from __future__ import annotations

from functools import cache

from sterna.runtime.text.tokenizer import Tokenizer
from sterna.runtime.text.vocabulary import ALPHABET

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"


def byte_level(pre: str, extra: tuple[tuple[str, int], ...] = (), **changes: object) -> dict[str, object]:
    """Metadata of a `gpt2` vocabulary: byte b is token b, then some merges, then <|bos|> and `extra`."""
    merges = ["t h", "th e", "Ġ the", "Ġ Ġ", "1 2", "12 3", "Ċ Ċ", "a a", "aa aa", "' s", "Ã ©"]
    made = ["".join(merge.split()) for merge in merges]
    values: dict[str, object] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*ALPHABET, *made, "<|bos|>", *(text for text, _ in extra)],
        "token_type": [NORMAL] * (256 + len(made)) + [CONTROL, *(token_type for _, token_type in extra)],
        "merges": merges,
        "bos_token_id": 256 + len(made),
        **changes,
    }
    return {PREFIX + name: value for name, value in values.items() if value is not None}


def scored(
    pieces: dict[str, float], extra: tuple[tuple[str, int], ...] = (), **changes: object
) -> dict[str, object]:
    """Metadata of a `llama` vocabulary: <unk>, <s>, </s>, 256 bytes, `pieces` with scores, then `extra`."""
    values: dict[str, object] = {
        "model": "llama",
        "tokens": [
            *("<unk>", "<s>", "</s>"),
            *(f"<0x{byte:02X}>" for byte in range(256)),
            *pieces,
            *(text for text, _ in extra),
        ],
        "token_type": [UNKNOWN, CONTROL, CONTROL]
        + [BYTE] * 256
        + [NORMAL] * len(pieces)
        + [token_type for _, token_type in extra],
        "scores": [0.0] * 259 + list(pieces.values()) + [-1000.0] * len(extra),
        **changes,
    }
    return {PREFIX + name: value for name, value in values.items() if value is not None}


WORDS = {
    f"{SPACE}the": -1.0,
    "he": -2.0,
    f"{SPACE}t": -3.0,
    "the": -4.0,
    "aa": -5.0,
    "aaa": -6.0,
    "aaaa": -7.0,
    SPACE * 2: -8.0,
    SPACE * 4: -9.0,
    "ab": -10.0,
    "abab": -11.0,
    f"a{SPACE}b": -12.0,
    f"{SPACE}a": -13.0,
    **{char: -100.0 - i for i, char in enumerate(f"{SPACE}abehtx.é中")},
}


@cache
def words() -> Tokenizer:
    """A `llama` tokenizer of WORDS, with the user-defined token <tool>."""
    return Tokenizer.from_metadata(scored(WORDS, (("<tool>", USER_DEFINED),)), "words.gguf")
