"""Pieces with scores (`tokenizer.ggml.model` = `llama`), as SentencePiece's BPE models are written to GGUF.

In here: `ScoredPieces`. Its rules are those of llama.cpp's SPM tokenizer: spaces are written as U+2581, one
is put before each text, neighbours that form a token merge, best score first, and characters without a token
become one byte token per byte. Text is not normalised and no space removed; `remove_extra_whitespaces` is
for another model. Not in here: special tokens (`special_tokens.py`).
"""

from __future__ import annotations

import re
from typing import Final

from tokenizers import Regex
from tokenizers import Tokenizer as Encoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split

from ...shm.errors import BadRequest
from .metadata import WRITTEN, MetadataReader, TokenRoles, TokenType, shown
from .vocabulary import encoded

SPACE: Final = "\u2581"
# Every cut of a piece is tried: SentencePiece itself makes none of more than 16 unless told otherwise.
MAX_PIECE_CHARS: Final = 1024
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")
# Unknown, BOS, EOS: what SentencePiece gives a model unless told otherwise, and llama.cpp assumes.
_USUAL: Final = (0, 1, 2)


class ScoredPieces:
    """BPE over characters whose merges follow from the pieces' scores, with byte tokens for the rest."""

    def __init__(
        self, pieces: list[str], types: list[TokenType], scores: list[float], *, space_prefix: bool
    ) -> None:
        """Build from values that have been checked against each other."""
        vocab = {piece: i for i, piece in enumerate(pieces) if types[i] in WRITTEN}
        self.size = len(pieces)
        self._prefix = SPACE if space_prefix else ""
        self._others = {i: piece for i, piece in enumerate(pieces) if types[i] not in WRITTEN}
        self._user_defined = frozenset(i for i, t in enumerate(types) if t is TokenType.USER_DEFINED)
        self._byte_ids = {int(m[1], 16): i for i, piece in enumerate(pieces) if (m := _BYTE.fullmatch(piece))}
        self._bytes = {i: bytes((b,)) for b, i in self._byte_ids.items() if types[i] is TokenType.BYTE}
        self._chars = frozenset(piece for piece in vocab if len(piece) == 1)
        # Letters that occur in pieces only: they must be there to merge, ids beyond the last stand for them.
        letters = sorted(set("".join(vocab)) - self._chars)
        self._letters = {self.size + at: letter for at, letter in enumerate(letters)}
        merges = _merges(vocab | {letter: i for i, letter in self._letters.items()}, scores)
        vocab |= {letter: i for i, letter in self._letters.items()}
        vocab |= {f"<0x{byte:02X}>": i for byte, i in self._byte_ids.items()}
        self._encoder = Encoder(BPE(vocab=vocab, merges=merges, byte_fallback=True))
        self._encoder.pre_tokenizer = Split(Regex(_words(vocab)), "isolated")

    @classmethod
    def read(cls, reader: MetadataReader, pieces: list[str], types: list[TokenType]) -> ScoredPieces:
        """Build from the file's scores; raises ModelFileError."""
        if not reader.has("token_type"):
            types = [TokenType.BYTE if _BYTE.fullmatch(p) else t for p, t in zip(pieces, types, strict=True)]
        for token_id, (piece, token_type) in enumerate(zip(pieces, types, strict=True)):
            if token_type is TokenType.BYTE and not _BYTE.fullmatch(piece):
                wrong = f"is a byte, expected <0x00> to <0xFF>, found {shown(piece)}"
                raise reader.error(f"tokens[{token_id}]", wrong)
            if len(piece) > MAX_PIECE_CHARS:
                raise reader.error(f"tokens[{token_id}]", f"has more than {MAX_PIECE_CHARS} characters")
        space_prefix = reader.flag("add_space_prefix", True)
        return cls(pieces, types, reader.scores(len(pieces)), space_prefix=space_prefix)

    @staticmethod
    def roles(types: list[TokenType]) -> TokenRoles:
        """Return what holds where the file does not say: BOS is added, the usual ids if they are special."""
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        unk_id, bos_id, eos_id = (i if i < len(types) and types[i] in special else None for i in _USUAL)
        return TokenRoles(unk_id=unk_id, bos_id=bos_id, eos_id=eos_id, adds_bos=True)

    @property
    def prefix(self) -> bytes:
        """The bytes that `encode` puts before each text that is not empty: a space or nothing."""
        return b" " if self._prefix else b""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; raises BadRequest for a byte that the vocabulary cannot write."""
        spelled = [(self._prefix + text).replace(" ", SPACE) if text else "" for text in texts]
        if len(self._byte_ids) < 256:
            for char in set().union(*spelled) - self._chars - set(self._letters.values()):
                self._in_bytes(char)
        found = encoded(self._encoder, spelled)
        return [self._without_letters(ids) for ids in found] if self._letters else found

    def _without_letters(self, ids: list[int]) -> list[int]:
        """Write letters that no piece has joined as their bytes."""
        last = self.size - 1
        return [i for t in ids for i in ((t,) if t <= last else self._in_bytes(self._letters[t]))]

    def _in_bytes(self, char: str) -> list[int]:
        found = [(byte, self._byte_ids.get(byte)) for byte in char.encode("utf-8")]
        for byte, token_id in found:
            if token_id is None:
                raise BadRequest(f"text: the model has no token for byte 0x{byte:02X} of {char!r}")
        return [token_id for _, token_id in found if token_id is not None]

    def piece(self, token_id: int) -> str:
        """Return the token as the file writes it."""
        other = self._others.get(token_id)
        return (self._encoder.id_to_token(token_id) or "") if other is None else other

    def raw(self, token_id: int) -> bytes:
        """Return the token's bytes; a user-defined token stands for its own text."""
        if token_id in self._others:
            return self._bytes.get(token_id, b"")
        piece = self.piece(token_id)
        return (piece if token_id in self._user_defined else piece.replace(SPACE, " ")).encode("utf-8")


def _merges(id_of: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return every way to make a piece of two, best score first.

    Two ways to make the same piece: first the one whose left part is longer. (The rule is the leftmost
    position, which no order of merges can say; it matters only where a piece overlaps itself.)
    """
    found: list[tuple[float, int, str, str]] = []
    for piece, token_id in id_of.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in id_of and right in id_of:
                found.append((-scores[token_id], -cut, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def _words(pieces: dict[str, int]) -> str:
    """Return an expression for parts of a text that no piece reaches across: they merge by themselves.

    A text is cut before a space unless some piece has a space after the same character. Without the cuts the
    result would be the same, but nothing could be found again in the encoder's cache of words.
    """
    before = {char for piece in pieces for char in re.findall(f"([^{SPACE}]){SPACE}", piece)}
    inside = "".join(rf"\x{{{ord(char):X}}}" for char in sorted(before))
    further = rf"|(?<=[{inside}]){SPACE}+" if before else ""
    return f"{SPACE}*(?:[^{SPACE}]+{further})*"
