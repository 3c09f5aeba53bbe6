"""Streamed answers: tokens to text that is complete so far, and stop strings in it.

In here: `StreamDetokenizer` and `StopMatcher`, one of each per answer, used by one thread. Not in here:
tokens that end an answer (`Tokenizer.stop_ids`).
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence

from ...shm.errors import BadRequest
from .tokenizer import Tokenizer

_new_decoder = codecs.getincrementaldecoder("utf-8")


class StreamDetokenizer:
    """Text of a growing list of tokens: all pieces joined are the text of `tokenizer.bytes_of` all the ids.

    The tokens continue a prompt, so a space at their beginning is text (`Tokenizer.decode` may take it away).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = _new_decoder("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens complete; the start of a split character is held back.

        Raises BadRequest for an id outside the vocabulary; then none of `token_ids` has been taken.
        """
        return self._decoder.decode(self._tokenizer.bytes_of(token_ids, skip_special=self._skip_special))

    def finish(self) -> str:
        """Return what was held back, as U+FFFD: no more tokens follow. Afterwards it is as new."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Cuts a streamed text before the first stop string, however the text is cut into pieces.

    First is the one that is complete first; of two that end at the same character, the longer one. The result
    does not depend on where the pieces begin. All stop strings are followed at once, one step per character
    (Aho and Corasick), so their number costs nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Prepare for `stops`; none passes all text through. Raises BadRequest for an empty stop string."""
        # One node per distinct beginning of a stop string, the root (0) for "".
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match_chars = [0]  # length of the longest stop string that ends at the node
        for index, stop in enumerate(stops):
            if not stop:
                raise BadRequest(f"stop[{index}]: expected at least one character, found an empty string")
            self._insert(stop)
        self._fallback = [0] * len(self._next)  # the node of the longest proper suffix that is a node
        self._link()
        self._node = 0
        self._held = ""  # always the beginning that `_node` stands for
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that can be shown now and whether a stop string was met.

        The stop string and all after it are dropped; once stopped, every further push gives ("", True).
        """
        if self._stopped:
            return "", True
        node = self._node
        for end, char in enumerate(text, start=len(self._held) + 1):
            node = self._step(node, char)
            if self._match_chars[node]:
                shown = (self._held + text)[: end - self._match_chars[node]]
                self._stopped, self._held = True, ""
                return shown, True
        seen = self._held + text
        n_shown = len(seen) - self._depth[node]
        self._node, self._held = node, seen[n_shown:]
        return seen[:n_shown], False

    def finish(self) -> str:
        """Return the text held back in case a stop string had begun: no more text follows."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._next[node].setdefault(char, len(self._next))
            if child == len(self._next):
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._match_chars.append(0)
            node = child
        self._match_chars[node] = len(stop)

    def _link(self) -> None:
        """Set the fallbacks in order of depth: each needs those of shorter beginnings."""
        waiting = deque(self._next[0].values())
        while waiting:
            node = waiting.popleft()
            for char, child in self._next[node].items():
                fallback = self._fallback[child] = self._step(self._fallback[node], char)
                self._match_chars[child] = self._match_chars[child] or self._match_chars[fallback]
                waiting.append(child)

    def _step(self, node: int, char: str) -> int:
        """Return the node of the longest suffix of `node`'s text and `char` that begins a stop string."""
        while node and char not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(char, 0)
