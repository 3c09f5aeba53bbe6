"""HardwareConfig and PRESETS: how much memory of each speed a class of machines has. Imports no numpy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class MemoryTier(IntEnum):
    """Where an expert is; the lower, the faster."""

    SRAM = 0
    DRAM = 1
    STORAGE = 2

    @property
    def label(self) -> str:
        """What people read."""
        return ("SRAM (L2/L3 Cache)", "DRAM (Main Memory)", "Storage (Flash/NVMe)")[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareConfig:
    """Bytes of both fast tiers and how many experts of `expert_bytes` each is meant to hold.

    The slots of the default are ruvllm's (ADR-092) and do not follow from its bytes; `for_experts` gives
    those that do.
    """

    name: str = "Custom"
    sram_bytes: int = 8 * MIB
    dram_bytes: int = 4 * GIB
    expert_bytes: int = 34_000_000
    sram_slots: int = 2
    dram_slots: int = 8

    def for_experts(self, expert_bytes: int) -> Self:
        """Return the same memory in slots of `expert_bytes`."""
        size = max(expert_bytes, 1)
        return type(self)(
            name=self.name,
            sram_bytes=self.sram_bytes,
            dram_bytes=self.dram_bytes,
            expert_bytes=expert_bytes,
            sram_slots=self.sram_bytes // size,
            dram_slots=self.dram_bytes // size,
        )

    @property
    def total_budget(self) -> int:
        """Bytes of both fast tiers."""
        return self.sram_bytes + self.dram_bytes

    @property
    def total_slots(self) -> int:
        """Slots of both fast tiers."""
        return self.sram_slots + self.dram_slots


def _preset(name: str, sram_mib: int, dram_gib: int) -> HardwareConfig:
    memory = HardwareConfig(name=name, sram_bytes=sram_mib * MIB, dram_bytes=dram_gib * GIB)
    return memory.for_experts(memory.expert_bytes)


PRESETS: dict[str, HardwareConfig] = {
    "raspberry-pi-5": _preset("Raspberry Pi 5", 2, 6),
    "mobile": _preset("Mobile Device", 4, 2),
    "desktop": _preset("Desktop Workstation", 32, 12),
    "wasm-browser": _preset("WASM Browser", 2, 1),
    "custom": HardwareConfig(),
}
