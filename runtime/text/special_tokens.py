"""Tokens that are found as a whole in a text before anything else, and tokens that end an answer.

In here: `SpecialTokens`, which cuts a text at them, and the names by which tokens are known to end an answer.
Not in here: ids from the metadata (`metadata.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from .metadata import TokenType

# What C's isspace takes: llama.cpp strips no other spaces beside a token.
_SPACE: Final = " \t\n\v\f\r"
_MAX_DEPTH: Final = 4

# Texts of tokens after which a model has nothing more to say. Metadata names at most three of them, many
# models have more: llama.cpp stops at all of these (src/llama-vocab.cpp), whatever their type.
_TURN_ENDS: Final = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
    "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "[e~[ <\uff5cend\u2581of\u2581sentence\uff5c>"
)
# Of fill-in-the-middle: padding, the next repository and the next file end an answer too.
_CODE_ENDS: Final = (
    "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> "
    "<|file_sep|>"
)
ENDS: Final = frozenset(_TURN_ENDS.split() + _CODE_ENDS.split())
# gpt-oss and its like write an answer in parts between these: whoever reads it needs to see them.
_PARTS: Final = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
_END_OF_PART: Final = "<|end|>"
_TAG: Final = "</s>"
_EOS: Final = 2  # the id that it has where it ends texts, also if marked as text


def answer_ends(pieces: list[str], types: list[TokenType]) -> tuple[set[int], set[int]]:
    """Return the ids of tokens that end an answer and of control tokens that are part of its text.

    In models that end an answer with <|return|> or <|call|> (or <|flush|> and <|calls|>), <|end|> only ends
    one of its parts, as in llama.cpp.
    """
    known = ENDS | _PARTS
    id_of = {piece: token_id for token_id, piece in enumerate(pieces) if piece in known}
    # Unlike llama.cpp: in many vocabularies (Qwen's, Gemma's) this is an HTML tag, for crossed-out text.
    tag = id_of.get(_TAG)
    if tag is not None and tag != _EOS and types[tag] is not TokenType.CONTROL:
        del id_of[_TAG]
    found = ENDS & id_of.keys()
    visible = _PARTS & id_of.keys()
    harmony = {"<|return|>", "<|call|>"} <= found
    solar = "<|flush|>" in found and bool({"<|call|>", "<|calls|>"} & found)
    if _END_OF_PART in found and (harmony or solar):
        found -= {_END_OF_PART}
        visible |= {_END_OF_PART}
    return {id_of[text] for text in found}, {id_of[text] for text in visible}


class SpecialTokens:
    """Cuts texts at special tokens: the first that begins, of those that begin together the longest.

    User-defined tokens are found in every text, control and unknown tokens only when asked for.
    """

    def __init__(
        self,
        pieces: list[str],
        types: Iterable[TokenType],
        *,
        strips_left: Iterable[str] = (),
        strips_right: Iterable[str] = (),
    ) -> None:
        """Prepare for the tokens of these types; `strips_*` are texts that take the spaces beside them."""
        ids: dict[TokenType, list[int]] = {}
        for token_id, token_type in enumerate(types):
            if token_type is not TokenType.NORMAL:
                ids.setdefault(token_type, []).append(token_id)
        user = {pieces[i]: i for i in ids.get(TokenType.USER_DEFINED, ()) if pieces[i]}
        control = [i for t in (TokenType.CONTROL, TokenType.UNKNOWN) for i in ids.get(t, ()) if pieces[i]]
        self._id_of = {pieces[i]: i for i in control} | user
        self._strips_left = frozenset(strips_left)
        self._strips_right = frozenset(strips_right)
        self._always = _pattern(user)
        self._asked = _pattern(self._id_of)

    def split(self, text: str, *, special: bool) -> tuple[list[str], list[int]]:
        """Return n + 1 texts, which may be empty, and the ids of the n tokens that stand between them."""
        pattern = self._asked if special else self._always
        if pattern is None:
            return [text], []
        parts = pattern.split(text)
        texts, tokens = parts[::2], parts[1::2]
        if self._strips_left or self._strips_right:
            for index, token in enumerate(tokens):
                if token in self._strips_left:
                    texts[index] = texts[index].rstrip(_SPACE)
                if token in self._strips_right:
                    texts[index + 1] = texts[index + 1].lstrip(_SPACE)
        return texts, [self._id_of[token] for token in tokens]


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    words = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile(f"({_longest_of(words, 0)})") if words else None


def _longest_of(words: list[str], depth: int) -> str:
    """Return an expression for the longest of the words, which are sorted by length, longest first.

    Words are grouped by their beginning, so that thousands of tokens that begin alike cost nothing where
    a text does not begin like them; only to some depth, because compiling recurses.
    """
    if depth == _MAX_DEPTH or len(words) == 1:
        return "(?:" + "|".join(map(re.escape, words)) + ")"
    first, last = min(words), max(words)
    alike = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    common = first[: next(alike, min(len(first), len(last)))]
    rests = [word[len(common) :] for word in words]
    groups: dict[str, list[str]] = {}
    for rest in rests:
        if rest:
            groups.setdefault(rest[0], []).append(rest)
    inside = "|".join(_longest_of(group, depth + 1) for group in groups.values())
    return f"{re.escape(common)}(?:{inside}){'?' if '' in rests else ''}"
