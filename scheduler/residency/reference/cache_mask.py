"""CacheMask: which experts of a layer are resident, one bit each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import numpy as np
import numpy.typing as npt


class CacheMask:
    """A set of expert ids below `num_experts`; an id out of range is never in it and cannot be set.

    `words`: uint64 (ceil(num_experts / 64),), bit e % 64 of word e // 64 for expert e. The array stays the
    same object as long as the mask lives, so that kernels may keep it. Little-endian machines only.
    """

    __slots__ = ("num_experts", "words")

    def __init__(self, num_experts: int, words: npt.NDArray[np.uint64] | None = None) -> None:
        """Keep the set in `words`, as it is there, or in an array of its own, empty."""
        self.num_experts = num_experts
        size = -(-num_experts // 64)
        self.words: npt.NDArray[np.uint64] = np.zeros(size, np.uint64) if words is None else words[:size]

    @classmethod
    def of(cls, num_experts: int, expert_ids: Iterable[int]) -> Self:
        """Return the mask that holds `expert_ids`."""
        mask = cls(num_experts)
        mask.replace(expert_ids)
        return mask

    def set(self, expert_id: int, resident: bool) -> None:
        """Put `expert_id` in, or take it out."""
        if not 0 <= expert_id < self.num_experts:
            return
        bit = np.uint64(1) << np.uint64(expert_id % 64)
        if resident:
            self.words[expert_id // 64] |= bit
        else:
            self.words[expert_id // 64] &= ~bit

    def is_set(self, expert_id: int) -> bool:
        """Return whether `expert_id` is in the set."""
        if not 0 <= expert_id < self.num_experts:
            return False
        return bool(int(self.words[expert_id // 64]) >> (expert_id % 64) & 1)

    def replace(self, expert_ids: Iterable[int]) -> None:
        """Make `expert_ids` the whole set."""
        self.clear()
        for expert_id in expert_ids:
            self.set(expert_id, True)

    def replace_flags(self, resident: npt.NDArray[np.bool_]) -> None:
        """Make the experts whose flag is true the whole set; `resident`: bool (num_experts,)."""
        packed = np.packbits(resident[: self.num_experts], bitorder="little")
        self.clear()
        self.words.view(np.uint8)[: len(packed)] = packed

    def flags(self) -> npt.NDArray[np.bool_]:
        """Return bool (num_experts,): whether each is in the set."""
        bits = np.unpackbits(self.words.view(np.uint8), count=self.num_experts, bitorder="little")
        return bits.astype(np.bool_)

    def count(self) -> int:
        """Return how many are in the set."""
        return int(np.bitwise_count(self.words).sum())

    def clear(self) -> None:
        """Empty the set."""
        self.words[:] = 0

    def ids(self) -> list[int]:
        """Return the set in ascending order."""
        ids: list[int] = np.flatnonzero(self.flags()).tolist()
        return ids
