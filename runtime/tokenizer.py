"""Text to token ids and back, from the tokenizer metadata of a GGUF file.

In here: `Tokenizer`, the byte-level BPE of model `gpt2` with its pre-tokenizers by name, and the 260-entry
byte vocabulary for files that hold no tokens. Not in here: streamed text and stop strings
(`detokenizer.py`), chat templates, and whether the vocabulary fits the model (the engine checks that).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tokenizers import AddedToken
from tokenizers import Tokenizer as Encoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer

from ..shm.errors import BadRequest, ModelFileError

# One text at a time is encoded here, so a pool of threads per process would only cost memory.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PREFIX: Final = "tokenizer.ggml."
MAX_SHOWN_CHARS: Final = 60


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Types of tokens that stand for no text.
SILENT: Final = frozenset(TokenType) - {TokenType.NORMAL, TokenType.USER_DEFINED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """How text is cut before merges; `ignore_merges` takes a piece that is a whole token as it is."""

    pre_tokenizer: PreTokenizer
    ignore_merges: bool = False


def _gpt2() -> Splitting:
    return Splitting(pre_tokenizer=ByteLevel(add_prefix_space=False, use_regex=True))


# By `tokenizer.ggml.pre`. The file holds only the name, so a name that is not here is refused, never guessed.
PRE_TOKENIZERS: Final[dict[str, Callable[[], Splitting]]] = {"gpt-2": _gpt2}
MODELS: Final = ("gpt2",)


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


class ByteVocabulary:
    """PAD 0, BOS 1, EOS 2, UNK 3 and byte b as id 4 + b: every text is one token per UTF-8 byte."""

    SPECIAL: Final = ("<PAD>", "<BOS>", "<EOS>", "<UNK>")
    ROLES: Final = TokenRoles(bos_id=1, eos_id=2, pad_id=0, unk_id=3, adds_bos=True)
    size: Final = 4 + 256

    _SPLIT: Final = re.compile("(" + "|".join(SPECIAL) + ")")

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return one id per byte of the text's UTF-8 form."""
        ids: list[int] = []
        for part in self._SPLIT.split(text) if special else (text,):
            if special and part in self.SPECIAL:
                ids.append(self.SPECIAL.index(part))
            else:
                ids.extend(4 + byte for byte in part.encode("utf-8"))
        return ids

    def piece(self, token_id: int) -> str:
        """Return the special token's name, or the byte as `<XX>` in upper-case hexadecimal."""
        return self.SPECIAL[token_id] if token_id < 4 else f"<{token_id - 4:02X}>"

    def raw(self, token_id: int) -> bytes:
        """Return the one byte, or b"" for the four special tokens."""
        return bytes((token_id - 4,)) if token_id >= 4 else b""


def _byte_alphabet() -> str:
    """Return the 256 characters that byte-level BPE writes for bytes 0 to 255."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x144))  # controls, space, soft hyphen: in order of their value
    return "".join(chr(byte if byte in itself else next(others)) for byte in range(256))


_ALPHABET: Final = _byte_alphabet()
# The stand-in makes encode("latin-1") fail for characters below 256 that no byte is written as.
_TO_BYTES: Final = dict.fromkeys(range(256), 0xFFFD) | {ord(c): b for b, c in enumerate(_ALPHABET)}


class ByteLevelBpe:
    """Byte-level BPE: pieces are written in an alphabet of 256 characters, one for each byte.

    Ids given to `piece` and `raw` are checked by the caller; so are the values given to build it.
    Two encoders share one model, with and without the special tokens, so that neither setting is toggled
    while another thread encodes; the second costs no measurable memory.
    """

    def __init__(
        self, pieces: list[str], types: list[TokenType], merges: list[tuple[str, str]], splitting: Splitting
    ) -> None:
        vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
        model = BPE(vocab=vocab, merges=merges, ignore_merges=splitting.ignore_merges)
        self.size = len(pieces)
        self._user_defined = frozenset(i for i, t in enumerate(types) if t is TokenType.USER_DEFINED)
        self._silent = frozenset(i for i, t in enumerate(types) if t in SILENT)
        unwritten = {None, *self._silent}
        self._missing = bytes(b for b, c in enumerate(_ALPHABET) if vocab.get(c) in unwritten)
        parsed = (TokenType.CONTROL, TokenType.UNKNOWN)
        user = [AddedToken(pieces[i], normalized=False) for i in sorted(self._user_defined)]
        control = [
            AddedToken(pieces[i], normalized=False, special=True) for i, t in enumerate(types) if t in parsed
        ]
        self._plain = Encoder(model)
        self._parsing = Encoder(model)
        for encoder in (self._plain, self._parsing):
            encoder.pre_tokenizer = splitting.pre_tokenizer
            encoder.add_tokens(user)
        self._parsing.add_special_tokens(control)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of the text; user-defined tokens are found in it always, control tokens if asked.

        Raises BadRequest for a byte that the vocabulary cannot write.
        """
        if self._missing:
            self._refuse_missing(text.encode("utf-8"))
        encoder = self._parsing if special else self._plain
        # encode() also tracks offsets, which takes two to three times as long.
        ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def piece(self, token_id: int) -> str:
        """Return the token as the file writes it, in the byte alphabet if it is a normal one."""
        return self._plain.id_to_token(token_id) or ""

    def _refuse_missing(self, data: bytes) -> None:
        # Some published vocabularies lack rare bytes; the encoder would drop them without a word.
        for byte in self._missing:
            at = data.find(byte)
            if at >= 0:
                where = len(data[:at].decode("utf-8", "ignore"))
                raise BadRequest(f"text: the model has no token for byte 0x{byte:02X} at character {where}")

    def raw(self, token_id: int) -> bytes:
        """Return the token's bytes; control, unknown and unused tokens have none.

        User-defined tokens and pieces with characters outside the alphabet stand for their own text.
        """
        if token_id in self._silent:
            return b""
        piece = self.piece(token_id)
        if token_id in self._user_defined:
            return piece.encode("utf-8")
        try:
            return piece.translate(_TO_BYTES).encode("latin-1")
        except UnicodeEncodeError:
            return piece.encode("utf-8")


class Tokenizer:
    """Turns text into token ids and back; built once per model, may be used from several threads.

    `adds_bos` and `adds_eos` say what the metadata wants around a text, `stop_ids` which tokens end answers.
    """

    def __init__(self, vocabulary: ByteVocabulary | ByteLevelBpe, roles: TokenRoles) -> None:
        self._vocabulary = vocabulary
        self._raw: dict[int, bytes] = {}  # filled as ids are met: a whole vocabulary is seldom used
        self.vocab_size = vocabulary.size
        self.bos_id = roles.bos_id
        self.eos_id = roles.eos_id
        self.unk_id = roles.unk_id
        self.pad_id = roles.pad_id
        self.adds_bos = roles.adds_bos
        self.adds_eos = roles.adds_eos
        ends = (roles.eos_id, roles.eot_id, roles.eom_id)
        self.stop_ids: frozenset[int] = frozenset(i for i in ends if i is not None)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], source: str) -> Tokenizer:
        """Build the tokenizer that a file's metadata describes; nothing of `metadata` is kept.

        Without `tokenizer.ggml.tokens` it is the byte vocabulary, which adds BOS unless the metadata says no.
        Raises ModelFileError naming `source` and the key for a kind that is not supported or values that
        contradict each other.
        """
        reader = _Reader(metadata, source)
        if PREFIX + "tokens" in metadata:
            vocabulary = _byte_level_bpe(reader)
            return cls(vocabulary, reader.roles(vocabulary.size, TokenRoles()))
        for name in ("merges", "token_type"):
            if PREFIX + name in metadata:
                raise reader.error(name, "is there, but tokenizer.ggml.tokens is missing")
        return cls(ByteVocabulary(), reader.roles(ByteVocabulary.size, ByteVocabulary.ROLES))

    def encode(
        self, text: str, *, add_bos: bool | None = None, add_eos: bool = False, special: bool = False
    ) -> list[int]:
        """Return the token ids of `text`, after BOS if asked (None: as the metadata says).

        With `special`, control tokens written in the text become those tokens; without, their letters are
        ordinary text. A text that begins with BOS itself (a chat template's) needs `add_bos=False`. EOS is
        added only if asked, whatever the metadata says: an answer could not go on after it.
        Raises BadRequest for lone surrogates, a byte that has no token, a BOS or EOS that the model lacks.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            found = f"found the lone surrogate {text[e.start]!r} at character {e.start}"
            raise BadRequest(f"text: expected valid Unicode, {found}") from None
        ids = self._vocabulary.encode(text, special=special)
        if self.adds_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise BadRequest("add_bos: this model has no BOS token")
            ids.insert(0, self.bos_id)
        if add_eos:
            if self.eos_id is None:
                raise BadRequest("add_eos: this model has no EOS token")
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of the ids, U+FFFD for bytes that are no UTF-8.

        Without `skip_special`, tokens that stand for no text are written as their pieces. Raises BadRequest
        for an id outside the vocabulary.
        """
        return self.bytes_of(ids, skip_special=skip_special).decode("utf-8", "replace")

    def bytes_of(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """Return the bytes that `decode` turns into text; raises as it does."""
        if skip_special:
            return b"".join([self.token_bytes(i) for i in ids])
        return b"".join([self.token_bytes(i) or self.id_to_piece(i).encode("utf-8") for i in ids])

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, b"" for control tokens; raises BadRequest for an id outside."""
        raw = self._raw.get(token_id)
        if raw is None:
            raw = self._raw[token_id] = self._vocabulary.raw(self._checked(token_id))
        return raw

    def id_to_piece(self, token_id: int) -> str:
        """Return the token as the vocabulary writes it; raises BadRequest for an id outside."""
        return self._vocabulary.piece(self._checked(token_id))

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise BadRequest(f"token id {token_id} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        return token_id


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


class _Reader:
    """Typed access to the tokenizer's keys; every error names the source and the key."""

    def __init__(self, metadata: Mapping[str, object], source: str) -> None:
        self._metadata = metadata
        self._source = source

    def error(self, name: str, text: str) -> ModelFileError:
        return ModelFileError(f"{self._source}: {PREFIX}{name}: {text}")

    def choice(self, name: str, supported: Collection[str]) -> str:
        """Return the value if it is one of the supported names."""
        names = ", ".join(supported)
        value = self._metadata.get(PREFIX + name)
        if value is None:
            raise self.error(name, f"is missing; supported: {names}")
        if not isinstance(value, str) or value not in supported:
            raise self.error(name, f"{_shown(value)} is not supported; supported: {names}")
        return value

    def array(self, name: str) -> list[object]:
        value = self._metadata.get(PREFIX + name)
        if value is None:
            raise self.error(name, "is missing")
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise self.error(name, f"expected an array, found {_shown(value)}")
        return list(value)

    def strings(self, name: str) -> list[str]:
        values = self.array(name)
        strings = [value for value in values if isinstance(value, str)]
        if len(strings) != len(values):
            index, value = next((i, v) for i, v in enumerate(values) if not isinstance(v, str))
            raise self.error(f"{name}[{index}]", f"expected a string, found {_shown(value)}")
        return strings

    def types(self, size: int) -> list[TokenType]:
        """Return one type per token; all are normal if the file does not say."""
        if PREFIX + "token_type" not in self._metadata:
            return [TokenType.NORMAL] * size
        values = self.array("token_type")
        if len(values) != size:
            raise self.error("token_type", f"expected {size} values, one per token, found {len(values)}")
        known = {int(t): t for t in TokenType}
        types: list[TokenType] = []
        for index, value in enumerate(values):
            token_type = known.get(value) if isinstance(value, int) else None
            if token_type is None:
                raise self.error(f"token_type[{index}]", f"expected 0 to {max(known)}, found {_shown(value)}")
            types.append(token_type)
        return types

    def token_id(self, name: str, size: int, default: int | None) -> int | None:
        value = self._metadata.get(PREFIX + name, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
            raise self.error(name, f"expected a token id of 0 to {size - 1}, found {_shown(value)}")
        return value

    def flag(self, name: str, default: bool, needed: str, token_id: int | None) -> bool:
        value = self._metadata.get(PREFIX + name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, found {_shown(value)}")
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
            adds_bos=self.flag("add_bos_token", defaults.adds_bos, "bos_token_id", bos_id),
            adds_eos=self.flag("add_eos_token", defaults.adds_eos, "eos_token_id", eos_id),
        )


def _byte_level_bpe(reader: _Reader) -> ByteLevelBpe:
    """Check tokens, types and merges against each other and build the vocabulary."""
    reader.choice("model", MODELS)
    splitting = PRE_TOKENIZERS[reader.choice("pre", PRE_TOKENIZERS)]()
    pieces = reader.strings("tokens")
    id_of: dict[str, int] = {}
    for token_id, piece in enumerate(pieces):
        if id_of.setdefault(piece, token_id) != token_id:
            raise reader.error(f"tokens[{token_id}]", f"{_shown(piece)} is also token {id_of[piece]}")
    if not pieces:
        raise reader.error("tokens", "is empty")
    types = reader.types(len(pieces))
    return ByteLevelBpe(pieces, types, _merges(reader, id_of, types), splitting)


def _merges(reader: _Reader, id_of: dict[str, int], types: list[TokenType]) -> list[tuple[str, str]]:
    """Return the merges in order of rank; of two for the same pair the first counts."""
    merges: dict[tuple[str, str], None] = {}
    for rank, line in enumerate(reader.strings("merges")):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise reader.error(f"merges[{rank}]", f"expected two tokens and one space, found {_shown(line)}")
        for piece in (left, right, left + right):
            if piece not in id_of:
                raise reader.error(f"merges[{rank}]", f"{_shown(piece)} is not in {PREFIX}tokens")
        # A control token must never come out of ordinary text, whatever the merges say.
        if types[id_of[left + right]] not in SILENT:
            merges[left, right] = None
    return list(merges)
