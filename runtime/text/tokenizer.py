"""Text to token ids and back, from the tokenizer metadata of a GGUF file.

In here: `Tokenizer`, the same for all tokenizer models. Not in here: the models (`vocabulary.py`,
`sentencepiece.py`), special tokens (`special_tokens.py`), streamed text and stop strings (`detokenizer.py`),
chat templates, and whether the vocabulary fits the model (the engine checks that). `add_sep_token` has no
meaning for these models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from ...shm.errors import BadRequest
from .metadata import MetadataReader, TokenRoles, TokenType
from .sentencepiece import ScoredPieces
from .special_tokens import SpecialTokens, answer_ends
from .vocabulary import ByteLevelBpe, ByteVocabulary, Vocabulary

# By `tokenizer.ggml.model`. Not supported: bert, t5, rwkv, plamo2, gemma4, hybriddna, whitespace, none.
MODELS: Final = ("gpt2", "llama")


class Tokenizer:
    """Turns text into token ids and back; built once per model, may be used from several threads.

    `adds_bos` and `adds_eos` say what the metadata wants around a text, `stop_ids` which tokens end answers.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        roles: TokenRoles,
        special: SpecialTokens,
        *,
        ends: Iterable[int] = (),
        visible: Iterable[int] = (),
    ) -> None:
        """Put the parts together.

        `ends` are ids that end an answer besides those of `roles`, `visible` control tokens that are text.
        """
        self._vocabulary = vocabulary
        self._special = special
        # Filled as ids are met: a whole vocabulary is seldom used.
        self._raw = {i: vocabulary.piece(i).encode("utf-8") for i in visible}
        self._prefix = vocabulary.prefix if isinstance(vocabulary, ScoredPieces) else b""
        self.vocab_size = vocabulary.size
        self.bos_id = roles.bos_id
        self.eos_id = roles.eos_id
        self.unk_id = roles.unk_id
        self.pad_id = roles.pad_id
        self.adds_bos = roles.adds_bos
        self.adds_eos = roles.adds_eos
        stops = (roles.eos_id, roles.eot_id, roles.eom_id, *ends)
        self.stop_ids: frozenset[int] = frozenset(i for i in stops if i is not None)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], source: str) -> Tokenizer:
        """Build the tokenizer that a file's metadata describes; nothing of `metadata` is kept.

        Without `tokenizer.ggml.model` and `.tokens` it is the byte vocabulary, which adds BOS unless the
        metadata says no. Raises ModelFileError naming `source` and the key for a model that is not supported
        or values that contradict each other.
        """
        reader = MetadataReader(metadata, source)
        if reader.has("tokens") or reader.has("model"):
            return cls._of_tokens(reader)
        for name in ("merges", "token_type", "scores"):
            if reader.has(name):
                raise reader.error(name, "is there, but tokenizer.ggml.tokens is missing")
        vocabulary = ByteVocabulary()
        special = SpecialTokens(vocabulary.SPECIAL, [TokenType.CONTROL] * len(vocabulary.SPECIAL))
        return cls(vocabulary, reader.roles(vocabulary.size, vocabulary.ROLES), special)

    @classmethod
    def _of_tokens(cls, reader: MetadataReader) -> Tokenizer:
        model = reader.choice("model", MODELS)
        pieces = reader.pieces()
        types = reader.types(pieces)
        ends, visible = answer_ends(pieces, types)
        for token_id in ends:
            types[token_id] = TokenType.CONTROL  # some files mark them as text by mistake
        vocabulary: ByteLevelBpe | ScoredPieces
        if model == "llama":
            vocabulary = ScoredPieces.read(reader, pieces, types)
            roles = reader.roles(vocabulary.size, vocabulary.roles(types))
        else:
            vocabulary = ByteLevelBpe.read(reader, pieces, types)
            roles = reader.roles(vocabulary.size, TokenRoles(adds_bos=vocabulary.adds_bos))
        special = SpecialTokens(pieces, types, **_strips(reader, pieces, types))
        return cls(vocabulary, roles, special, ends=ends, visible=visible)

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
        texts, tokens = self._special.split(text, special=special)
        parts = self._vocabulary.encode(texts)
        ids = parts[0]
        for token, part in zip(tokens, parts[1:], strict=True):
            ids.append(token)
            ids.extend(part)
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

        It is a whole text: the space that `encode` puts before texts for some models is taken away, also
        after BOS. Without `skip_special`, tokens that stand for no text are written as their pieces. Raises
        BadRequest for an id outside the vocabulary.
        """
        given = list(ids)
        text = self.bytes_of(given, skip_special=skip_special)
        if self._prefix and given:
            # Where the first text begins: behind BOS, if that is written out.
            bos = self.bytes_of(given[:1], skip_special=skip_special) if given[0] == self.bos_id else b""
            text = bos + text[len(bos) :].removeprefix(self._prefix)
        return text.decode("utf-8", "replace")

    def bytes_of(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """Return the bytes of ids that continue a text, leading spaces included; raises as `decode` does."""
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


def _strips(reader: MetadataReader, pieces: list[str], types: list[TokenType]) -> dict[str, list[str]]:
    """Return which special tokens take the spaces beside them: files do not say, so by name as llama.cpp."""
    name = reader.model_name()
    if "phi-3" in name or "phi3" in name:
        kept = {"<unk>", "<s>", "<|endoftext|>"}
        found = [p for p, t in zip(pieces, types, strict=True) if t is not TokenType.NORMAL and p not in kept]
        return {"strips_right": found}
    if reader.names("pre", ("jina-v2-de", "jina-v2-es", "jina-v2-code")):
        return {"strips_left": ["<mask>"]}
    return {"strips_left": ["[MASK]"]} if "modern-bert" in name else {}
