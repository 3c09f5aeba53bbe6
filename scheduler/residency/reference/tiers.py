"""TierMapper: which experts belong into which memory, by how much and how recently they are used.

It keeps the map and suggests changes; it moves nothing. The presets are in hardware.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....shm.errors import ConfigError
from .hardware import PRESETS, HardwareConfig, MemoryTier

__all__ = ["PRESETS", "ExpertRecord", "HardwareConfig", "MemoryTier", "TierMapper"]

Change = tuple[int, MemoryTier]

_STORAGE_LATENCY_US = 100
_WEIGHT_SHARE = np.float32(0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRecord:
    """What is known of one expert; `last_access` is a value of the mapper's clock, 0 if never."""

    tier: MemoryTier
    count: int
    last_access: int
    average_weight: float
    pinned: bool


class TierMapper:
    """A tier per expert, within the bytes of each.

    priority = ln(count + 1) + recency + 2 * average weight, recency = exp(-(clock - last) / tau)
    with the clock counting accesses. A change of tier must gain: an expert displaces another only if its
    priority exceeds (1 + hysteresis) times the other's.

    `compat` is ruvllm's (ADR-092): capacity in slots that nothing enforces, recency 1 / (1 + 0.001 / last),
    which is 1 for whatever was ever used, and its rule of suggestions, which demotes every expert in SRAM.
    """

    def __init__(
        self,
        config: HardwareConfig,
        num_experts: int,
        *,
        expert_bytes: npt.ArrayLike | None = None,
        tau: float = 4096.0,
        hysteresis: float = 0.1,
        compat: bool = False,
    ) -> None:
        """Take bytes per expert, all or each (by default the config's); raise ConfigError if out of range."""
        if not (tau > 0.0 and 0.0 <= hysteresis < math.inf):
            raise ConfigError(f"tau {tau}: above 0; hysteresis {hysteresis}: 0 or more")
        self.config = config
        self.compat = compat
        self._tau, self._hysteresis = tau, hysteresis
        sizes = np.asarray(config.expert_bytes if expert_bytes is None else expert_bytes, np.int64)
        if sizes.shape not in {(), (num_experts,)} or (sizes < 0).any():
            raise ConfigError(f"expert_bytes: one number of 0 or more, or {num_experts}")
        # In slots everything is as large as a slot.
        self._sizes = np.broadcast_to(np.int64(1) if compat else sizes, (num_experts,))
        self._capacity = (
            (config.sram_slots, config.dram_slots) if compat else (config.sram_bytes, config.dram_bytes)
        )
        self.tiers: npt.NDArray[np.uint8] = np.full(num_experts, MemoryTier.STORAGE, np.uint8)
        self.pinned: npt.NDArray[np.bool_] = np.zeros(num_experts, np.bool_)
        self._counts = np.zeros(num_experts, np.int64)
        self._last = np.zeros(num_experts, np.int64)
        self._weights = np.zeros(num_experts, np.float32)
        self._clock = 0
        self._latency_us = (0, 0, _STORAGE_LATENCY_US)

    def _inside(self, expert_id: int) -> bool:
        return 0 <= expert_id < len(self.tiers)

    def capacity(self, tier: MemoryTier) -> int | None:
        """Return the bytes (compat: slots) of a tier; None for storage, which has no end."""
        return self._capacity[tier] if tier < MemoryTier.STORAGE else None

    def used(self, tier: MemoryTier) -> int:
        """Return the bytes (compat: slots) of the experts in a tier."""
        return int(self._sizes[self.tiers == tier].sum())

    def available(self, tier: MemoryTier) -> int | None:
        """Return what is free in a tier, never below 0; None for storage."""
        capacity = self.capacity(tier)
        return None if capacity is None else max(capacity - self.used(tier), 0)

    def assign_tier(self, expert_id: int, tier: MemoryTier) -> bool:
        """Move an expert; return False, and move nothing, if it is out of range or does not fit."""
        return self._inside(expert_id) and self.apply([(expert_id, tier)])

    def apply(self, changes: Iterable[Change]) -> bool:
        """Move all or none; return False if a tier would then hold more than it has (never in compat)."""
        tiers = self.tiers.copy()
        for expert_id, tier in changes:
            tiers[expert_id] = tier
        if not self.compat:
            for tier in (MemoryTier.SRAM, MemoryTier.DRAM):
                used = int(self._sizes[tiers == tier].sum())
                if used > self._capacity[tier] and used > self.used(tier):
                    return False
        self.tiers[:] = tiers
        return True

    def get_tier(self, expert_id: int) -> MemoryTier:
        """Return where an expert is, STORAGE for an id out of range."""
        return MemoryTier(int(self.tiers[expert_id])) if self._inside(expert_id) else MemoryTier.STORAGE

    def set_latencies_us(self, sram: int, dram: int, storage: int) -> None:
        """Set what bringing an expert in from each tier takes."""
        self._latency_us = (sram, dram, storage)

    def estimate_paging_latency(self, expert_id: int) -> int:
        """Return the microseconds of the expert's tier."""
        return self._latency_us[self.get_tier(expert_id)]

    def record_access(self, expert_id: int, weight: float) -> None:
        """Note that an expert was used with a mixing weight; the clock advances. Out of range: nothing."""
        if not self._inside(expert_id):
            return
        self._clock += 1
        self._counts[expert_id] += 1
        self._last[expert_id] = self._clock
        share, rest = _WEIGHT_SHARE, np.float32(1.0) - _WEIGHT_SHARE
        self._weights[expert_id] = share * np.float32(weight) + rest * self._weights[expert_id]

    def record(self, expert_id: int) -> ExpertRecord:
        """Return what is known of an expert in range."""
        return ExpertRecord(
            tier=self.get_tier(expert_id),
            count=int(self._counts[expert_id]),
            last_access=int(self._last[expert_id]),
            average_weight=float(self._weights[expert_id]),
            pinned=bool(self.pinned[expert_id]),
        )

    def priorities(self) -> npt.NDArray[np.float32]:
        """Return (experts,): how much each deserves fast memory, 0 for those never used."""
        used = self._counts > 0
        if self.compat:
            last = np.maximum(self._last, 1).astype(np.float32)
            recency = np.float32(1.0) / (np.float32(1.0) + np.float32(0.001) / last)
        else:
            recency = np.exp((self._last - self._clock) / self._tau).astype(np.float32)
        counts = np.log((self._counts + 1).astype(np.float32))
        weighted = counts + np.where(used, recency, np.float32(0.0)) + np.float32(2.0) * self._weights
        return np.asarray(weighted, np.float32)

    def priority(self, expert_id: int) -> float:
        """Return the priority of an expert in range."""
        return float(self.priorities()[expert_id])

    def pin(self, expert_id: int) -> None:
        """Keep an expert where it is, whatever is suggested; out of range: nothing."""
        if self._inside(expert_id):
            self.pinned[expert_id] = True

    def unpin(self, expert_id: int) -> None:
        """Let suggestions move an expert again; out of range: nothing."""
        if self._inside(expert_id):
            self.pinned[expert_id] = False

    def reset_affinity(self) -> None:
        """Forget all use; tiers stay, and so do pins (not in compat)."""
        self._counts[:] = 0
        self._last[:] = 0
        self._weights[:] = 0
        self._clock = 0
        if self.compat:
            self.pinned[:] = False

    def experts_in_tier(self, tier: MemoryTier) -> list[int]:
        """Return the ids in a tier in ascending order."""
        ids: list[int] = np.flatnonzero(self.tiers == tier).tolist()
        return ids

    def tier_summary(self) -> dict[MemoryTier, int]:
        """Return how many experts each tier holds."""
        return {tier: int((self.tiers == tier).sum()) for tier in MemoryTier}

    def suggest_tier_changes(self) -> list[Change]:
        """Return the changes that `apply` may make together; it changes nothing itself.

        Fast tiers are filled with the unpinned experts of highest priority that fit, those already there
        counting (1 + hysteresis) times; what is displaced goes one tier down if it fits there. Experts
        never used are not promoted. Demotions first, then promotions, best first.
        """
        priority = self.priorities()
        if self.compat:
            return self._suggest_as_ruvllm(priority)
        target = np.where(self.pinned, self.tiers, MemoryTier.STORAGE).astype(np.uint8)
        for tier in (MemoryTier.SRAM, MemoryTier.DRAM):
            left = self._capacity[tier] - int(self._sizes[target == tier].sum())
            here = self.tiers <= tier
            worth = np.where(here, priority * np.float32(1.0 + self._hysteresis), priority)
            free = ~self.pinned & (target == MemoryTier.STORAGE) & (here | (priority > 0))
            for expert_id in np.lexsort((~here, -worth)).tolist():
                if free[expert_id] and self._sizes[expert_id] <= left:
                    target[expert_id] = tier
                    left -= int(self._sizes[expert_id])
        changed = np.flatnonzero(target != self.tiers)
        promoted = target[changed] < self.tiers[changed]
        order = changed[np.lexsort((changed, -priority[changed], promoted))]
        return [(e, MemoryTier(int(target[e]))) for e in order.tolist()]

    def _suggest_as_ruvllm(self, priority: npt.NDArray[np.float32]) -> list[Change]:
        """Return promotions into free SRAM slots, then the demotion of every other expert in SRAM."""
        ranked = [e for e in np.argsort(-priority, kind="stable").tolist() if not self.pinned[e]]
        free = self.available(MemoryTier.SRAM) or 0
        absent = [e for e in ranked if self.tiers[e] != MemoryTier.SRAM]
        changes = [(e, MemoryTier.SRAM) for e in absent[:free]]
        below = MemoryTier.DRAM if self.available(MemoryTier.DRAM) else MemoryTier.STORAGE
        return changes + [(e, below) for e in reversed(ranked) if self.tiers[e] == MemoryTier.SRAM]
