"""Vocabularies that write a text as its bytes: byte-level BPE (`gpt2`), and one token per byte.

In here: `ByteLevelBpe` and `ByteVocabulary`, which encode texts without special tokens and know each token's
bytes. Not in here: how text is cut into words (`pre_tokenizers.py`), special tokens (`special_tokens.py`),
pieces with scores (`sentencepiece.py`).
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from functools import cache
from itertools import pairwise
from typing import Final, Protocol

from tokenizers import Tokenizer as Encoder
from tokenizers.models import BPE

from ...shm.errors import BadRequest
from .metadata import PREFIX, WRITTEN, MetadataReader, TokenRoles, TokenType, shown
from .pre_tokenizers import PRE_TOKENIZERS, Splitting

# One text at a time is encoded here, so a pool of threads per process would only cost memory.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Vocabulary(Protocol):
    """What `Tokenizer` needs of a tokenizer model; ids and texts given to it are checked by the caller."""

    size: int

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, in which no special token is looked for.

        Raises BadRequest for a character that the vocabulary cannot write.
        """

    def piece(self, token_id: int) -> str:
        """Return the token as the file writes it."""

    def raw(self, token_id: int) -> bytes:
        """Return the bytes of text that the token stands for; control, unknown, unused tokens have none."""


class ByteVocabulary:
    """PAD 0, BOS 1, EOS 2, UNK 3 and byte b as id 4 + b: every text is one token per UTF-8 byte."""

    SPECIAL: Final = ["<PAD>", "<BOS>", "<EOS>", "<UNK>"]
    ROLES: Final = TokenRoles(bos_id=1, eos_id=2, pad_id=0, unk_id=3, adds_bos=True)

    def __init__(self) -> None:
        self.size = 4 + 256

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return one id per byte of each text's UTF-8 form."""
        return [[4 + byte for byte in text.encode("utf-8")] for text in texts]

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


ALPHABET: Final = _byte_alphabet()
# The stand-in makes encode("latin-1") fail for characters below 256 that no byte is written as.
_TO_BYTES: Final = dict.fromkeys(range(256), 0xFFFD) | {ord(c): b for b, c in enumerate(ALPHABET)}


class ByteLevelBpe:
    """Byte-level BPE: pieces are written in an alphabet of 256 characters, one for each byte."""

    def __init__(
        self, pieces: list[str], types: list[TokenType], merges: list[tuple[str, str]], splitting: Splitting
    ) -> None:
        """Build from values that have been checked against each other."""
        # Only tokens of ordinary text: no other can come out of one, whatever merges and words there are.
        vocab = {piece: i for i, piece in enumerate(pieces) if types[i] in WRITTEN}
        self.size = len(pieces)
        unnamed = _unnamed_results(merges, vocab, self.size)
        merges = [pair for pair in merges if all(part in vocab or part in unnamed for part in pair)]
        self.adds_bos = splitting.adds_bos
        self._others = {i: piece for i, piece in enumerate(pieces) if types[i] not in WRITTEN}
        self._user_defined = frozenset(i for i, t in enumerate(types) if t is TokenType.USER_DEFINED)
        self._missing = bytes(b for b, c in enumerate(ALPHABET) if c not in vocab)
        self._right_aligned = splitting.right_aligned
        if self._right_aligned:
            _number_runs()  # here: half a second, which no request should wait for
        every = vocab | unnamed
        self._pieces_of = _pieces_of_unnamed(every, merges, unnamed) if unnamed else {}
        self._encoder = Encoder(BPE(vocab=every, merges=merges, ignore_merges=splitting.ignore_merges))
        self._encoder.pre_tokenizer = splitting.pre_tokenizer()

    @classmethod
    def read(cls, reader: MetadataReader, pieces: list[str], types: list[TokenType]) -> ByteLevelBpe:
        """Build from the file's merges and the name of its pre-tokenizer; raises ModelFileError."""
        splitting = PRE_TOKENIZERS[reader.choice("pre", PRE_TOKENIZERS)]
        return cls(pieces, types, _merges(reader, pieces, types), splitting)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; raises BadRequest for a byte that the vocabulary cannot write."""
        if self._missing:
            self._refuse_missing(texts)
        if self._right_aligned:
            return [[i for ids in self._encode(digits_in_threes(text)) for i in ids] for text in texts]
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        found = encoded(self._encoder, texts)
        if not self._pieces_of:
            return found
        return [[i for each in ids for i in self._pieces_of.get(each, (each,))] for ids in found]

    def piece(self, token_id: int) -> str:
        """Return the token as the file writes it, in the byte alphabet if it is a normal one."""
        other = self._others.get(token_id)
        return (self._encoder.id_to_token(token_id) or "") if other is None else other

    def _refuse_missing(self, texts: list[str]) -> None:
        # Some published vocabularies lack rare bytes; the encoder would drop them without a word.
        for text in texts:
            data = text.encode("utf-8")
            for byte in self._missing:
                at = data.find(byte)
                if at >= 0:
                    char = text[len(data[:at].decode("utf-8", "ignore"))]
                    raise BadRequest(f"text: the model has no token for byte 0x{byte:02X} of {char!r}")

    def raw(self, token_id: int) -> bytes:
        """Return the token's bytes.

        User-defined tokens and pieces with characters outside the alphabet stand for their own text.
        """
        if token_id in self._others:
            return b""
        piece = self.piece(token_id)
        if token_id in self._user_defined:
            return piece.encode("utf-8")
        try:
            return piece.translate(_TO_BYTES).encode("latin-1")
        except UnicodeEncodeError:
            return piece.encode("utf-8")


def encoded(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text.

    Raises BadRequest where an expression gives up: after ten million steps back within one match, which only
    runs of millions of like characters take.
    """
    try:
        # encode() also tracks offsets, which takes two to three times as long.
        return [e.ids for e in encoder.encode_batch_fast(texts, add_special_tokens=False)]
    except BaseException as e:
        # The class of the encoder's panics has no public name and is no Exception: it would end the process.
        if type(e).__name__ != "PanicException":
            raise
        raise BadRequest("text: holds too long a run of like characters to be cut into words") from None


@cache
def _number_runs() -> re.Pattern[str]:
    """Return an expression for runs of characters of category N; `re` knows only decimal digits."""
    numbers = (c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "N")
    return re.compile("[" + "".join(numbers) + "]+")


def digits_in_threes(text: str) -> list[str]:
    """Cut runs of digits into groups of three, counted from their right end.

    Published as expressions that look ahead to the end of the run from every digit: quadratic time.
    """
    parts: list[str] = []
    done = 0
    for run in _number_runs().finditer(text):
        start, end = run.span()
        parts.append(text[done:start])
        cuts = [start, *range(start + ((end - start) % 3 or 3), end, 3), end]
        parts.extend(text[a:b] for a, b in pairwise(cuts))
        done = end
    return [part for part in (*parts, text[done:]) if part]


def _unnamed_results(merges: list[tuple[str, str]], vocab: dict[str, int], size: int) -> dict[str, int]:
    """Return an id from `size` on for each result of a merge that is no token."""
    results = dict.fromkeys(left + right for left, right in merges)
    return {piece: size + i for i, piece in enumerate(each for each in results if each not in vocab)}


def _pieces_of_unnamed(
    vocab: dict[str, int], merges: list[tuple[str, str]], unnamed: dict[str, int]
) -> dict[int, tuple[int, ...]]:
    """Return the tokens that stand for each result of a merge that is no token itself.

    Such a merge joins its parts like any other, and what it made may be part of a later merge. What is left
    of it in the end falls apart into the tokens of its bytes. llama.cpp does the same, but for bytes outside
    ASCII, which it loses there: here no byte of a text is ever lost.
    """
    # A word that is looked up whole (`ignore_merges`) must not end as a result that merges never reach.
    encoder = Encoder(BPE(vocab=vocab, merges=merges))
    piece_of = {i: piece for piece, i in unnamed.items()}

    def tokens(token_id: int) -> list[int]:
        piece = piece_of.get(token_id)
        return [token_id] if piece is None else [vocab[char] for char in piece if char in vocab]

    return {
        i: tuple(each for found in encoder.encode(piece).ids for each in tokens(found))
        for piece, i in unnamed.items()
    }


def _merges(reader: MetadataReader, pieces: list[str], types: list[TokenType]) -> list[tuple[str, str]]:
    """Return the merges in order of rank; of two for the same pair the first counts.

    Raises ModelFileError for a merge with a part that is neither a token nor made by a merge.
    """
    known = set(pieces)
    silent = {piece for piece, token_type in zip(pieces, types, strict=True) if token_type not in WRITTEN}
    merges: dict[tuple[str, str], None] = {}
    lines = reader.strings("merges")
    made = known.union(line.replace(" ", "", 1) for line in lines)
    for rank, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise reader.error(f"merges[{rank}]", f"expected two tokens and one space, found {shown(line)}")
        if not made.issuperset((left, right)):
            missing = left if left not in made else right
            raise reader.error(f"merges[{rank}]", f"{shown(missing)} is not in {PREFIX}tokens")
        if silent.isdisjoint((left, right, left + right)):
            merges[left, right] = None
    return list(merges)


def merges_without_token(reader: MetadataReader) -> str:
    """Return a line on merges whose result is no token, "" if there are none; the file has been checked."""
    if not reader.names("model", ("gpt2",)):
        return ""
    known = set(reader.strings("tokens"))
    lines = enumerate(reader.strings("merges"))
    lost = [(rank, line) for rank, line in lines if line.replace(" ", "", 1) not in known]
    if not lost:
        return ""
    rank, line = lost[0]
    result = line.replace(" ", "", 1)
    more = f" ({len(lost)} such merges)" if len(lost) > 1 else ""
    return (
        f"{PREFIX}merges[{rank}]: {shown(line)} makes {shown(result)}, which is not in {PREFIX}tokens{more}: "
        "such text is written byte by byte"
    )
