"""The tokenizer's keys of a GGUF file, read with their types and ranges checked.

In here: `MetadataReader`, the token types and the ids with a role. Not in here: what each
tokenizer model does with them (`vocabulary.py`, `sentencepiece.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from ...shm.errors import ModelFileError

PREFIX: Final = "tokenizer.ggml."
MAX_SHOWN_CHARS: Final = 60
MAX_LISTED: Final = 10


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Types of tokens that are found in ordinary text; the others never come out of it.
WRITTEN: Final = frozenset({TokenType.NORMAL, TokenType.USER_DEFINED})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRoles:
    """Ids with a meaning, None where the model has none, and what is added around a text by default."""

    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    eom_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    adds_bos: bool = False
    adds_eos: bool = False


def shown(value: object) -> str:
    """Return the value for an error's text, shortened."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


class MetadataReader:
    """Typed access to the tokenizer's keys; every error names the source and the key."""

    def __init__(self, metadata: Mapping[str, object], source: str) -> None:
        self._metadata = metadata
        self._source = source

    def error(self, name: str, text: str) -> ModelFileError:
        """Return the error for the key `tokenizer.ggml.<name>`."""
        return ModelFileError(f"{self._source}: {PREFIX}{name}: {text}")

    def has(self, name: str) -> bool:
        """Say whether the file has `tokenizer.ggml.<name>`."""
        return PREFIX + name in self._metadata

    def model_name(self) -> str:
        """Return `general.name` in small letters, "" if the file has none."""
        name = self._metadata.get("general.name", "")
        return name.lower() if isinstance(name, str) else ""

    def names(self, name: str, values: Collection[str]) -> bool:
        """Say whether the value is one of these."""
        value = self._metadata.get(PREFIX + name)
        return isinstance(value, str) and value in values

    def choice(self, name: str, supported: Collection[str]) -> str:
        """Return the value if it is one of the supported names."""
        value = self._metadata.get(PREFIX + name)
        if isinstance(value, str) and value in supported:
            return value
        names = sorted(supported)
        if len(names) > MAX_LISTED:
            close = difflib.get_close_matches(str(value)[:MAX_SHOWN_CHARS], names, n=3) or names[:3]
            names = [f"{len(supported)} names such as {close[0]}", *close[1:]]
        found = "is missing" if value is None else f"{shown(value)} is not supported"
        raise self.error(name, f"{found}; supported: {', '.join(names)}")

    def array(self, name: str) -> list[object]:
        """Return the array as a list of whatever it holds."""
        value = self._metadata.get(PREFIX + name)
        if value is None:
            raise self.error(name, "is missing")
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise self.error(name, f"expected an array, found {shown(value)}")
        return list(value)

    def strings(self, name: str) -> list[str]:
        """Return an array of strings."""
        values = self.array(name)
        strings = [value for value in values if isinstance(value, str)]
        if len(strings) != len(values):
            index, value = next((i, v) for i, v in enumerate(values) if not isinstance(v, str))
            raise self.error(f"{name}[{index}]", f"expected a string, found {shown(value)}")
        return strings

    def pieces(self) -> list[str]:
        """Return the tokens; each but the empty one must be there once only."""
        pieces = self.strings("tokens")
        if not pieces:
            raise self.error("tokens", "is empty")
        if len(set(pieces)) != len(pieces):
            id_of: dict[str, int] = {}
            for token_id, piece in enumerate(pieces):
                if id_of.setdefault(piece, token_id) != token_id and piece:
                    raise self.error(f"tokens[{token_id}]", f"{shown(piece)} is also token {id_of[piece]}")
        return pieces

    def types(self, pieces: list[str]) -> list[TokenType]:
        """Return one type per token; normal if the file does not say, and a token without text is unused."""
        if not self.has("token_type"):
            return [TokenType.NORMAL if piece else TokenType.UNUSED for piece in pieces]
        values = self._per_token("token_type", len(pieces))
        known = {int(t): t for t in TokenType}
        types: list[TokenType] = []
        for index, value in enumerate(values):
            token_type = known.get(value) if isinstance(value, int) else None
            if token_type is None:
                raise self.error(f"token_type[{index}]", f"expected 0 to {max(known)}, found {shown(value)}")
            types.append(token_type if pieces[index] else TokenType.UNUSED)
        return types

    def scores(self, size: int) -> list[float]:
        """Return one finite number per token."""
        scores: list[float] = []
        for index, value in enumerate(self._per_token("scores", size)):
            if not isinstance(value, int | float) or not abs(value) < float("inf"):
                raise self.error(f"scores[{index}]", f"expected a finite number, found {shown(value)}")
            scores.append(float(value))
        return scores

    def _per_token(self, name: str, size: int) -> list[object]:
        values = self.array(name)
        if len(values) != size:
            raise self.error(name, f"expected {size} values, one per token, found {len(values)}")
        return values

    def token_id(self, name: str, size: int, default: int | None) -> int | None:
        """Return the id under the key, which must be below `size`, or the default."""
        value = self._metadata.get(PREFIX + name, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
            raise self.error(name, f"expected a token id of 0 to {size - 1}, found {shown(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return the value under the key, which must be a bool, or the default."""
        value = self._metadata.get(PREFIX + name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, found {shown(value)}")
        return value

    def _adds(self, name: str, default: bool, needed: str, token_id: int | None) -> bool:
        value = self.flag(name, default and token_id is not None)
        if value and token_id is None:
            raise self.error(name, f"is true, but {PREFIX}{needed} is missing")
        return value

    def roles(self, size: int, defaults: TokenRoles) -> TokenRoles:
        """Return the special ids, each within a vocabulary of `size` tokens."""
        bos_id = self.token_id("bos_token_id", size, defaults.bos_id)
        eos_id = self.token_id("eos_token_id", size, defaults.eos_id)
        return TokenRoles(
            bos_id=bos_id,
            eos_id=eos_id,
            eot_id=self.token_id("eot_token_id", size, defaults.eot_id),
            eom_id=self.token_id("eom_token_id", size, defaults.eom_id),
            unk_id=self.token_id("unknown_token_id", size, defaults.unk_id),
            pad_id=self.token_id("padding_token_id", size, defaults.pad_id),
            adds_bos=self._adds("add_bos_token", defaults.adds_bos, "bos_token_id", bos_id),
            adds_eos=self._adds("add_eos_token", defaults.adds_eos, "eos_token_id", eos_id),
        )
