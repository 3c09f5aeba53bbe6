"""When to give memory back: what the system says about its shortage, and the decision. No task, no engine.

`read_pressure` reads the kernel's pressure stall figures of the machine and of our cgroup; `Governor` turns
one reading a second into a number of slots, with time and readings as arguments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .room import Room, cgroup_folders

# Of the last ten seconds, percent in which somebody waited for memory.
STALLED = 10.0
CALM = 1.0
# Of the machine's memory; a cgroup is filled on purpose, there only waiting counts.
SHORT_SHARE = 0.05
AMPLE_SHARE = 0.10
SHRINK_STEP = 0.10
GROW_STEP = 0.05
SHRINK_EVERY_S = 10.0
CALM_S = 60.0

_SOME = re.compile(r"^some avg10=(\d+\.\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """One reading: percent of the last ten seconds stalled, free share of the memory (1 in a cgroup)."""

    stalled: float
    free_share: float

    @property
    def pressed(self) -> bool:
        """Whether memory should be given back."""
        return self.stalled > STALLED or self.free_share < SHORT_SHARE

    @property
    def calm(self) -> bool:
        """Whether memory may be taken again; between the two nothing changes."""
        return self.stalled < CALM and self.free_share > AMPLE_SHARE


def read_pressure(room: Room, root: Path = Path("/")) -> Pressure:
    """Return what is known now; a kernel without pressure figures counts as not stalled."""
    files = [root / "proc/pressure/memory"]
    files += [folder / "memory.pressure" for folder, version in cgroup_folders(root) if version == 2]
    share = 1.0 if room.limited else room.available / max(1, room.total)
    return Pressure(stalled=max(map(_stalled, files)), free_share=share)


def _stalled(path: Path) -> float:
    try:
        found = _SOME.search(path.read_text())
    except OSError:  # not switched on, or not there
        return 0.0
    return float(found[1]) if found else 0.0


class Governor:
    """Says how many slots to use. `least` is never gone below; `most` may change, as the user sets it."""

    def __init__(self, least: int, most: int, now_s: float) -> None:
        self._least = least
        self._most = most
        self._changed_s = now_s
        self._stirred_s = now_s  # when it was last not calm
        self.slots = most

    def restart(self, most: int, now_s: float) -> None:
        """Begin again with `most` slots in use."""
        self.slots = self._most = most
        self._changed_s = self._stirred_s = now_s

    def decide(self, pressure: Pressure, now_s: float) -> int:
        """Return how many slots there should be; the caller carries it out and calls `settle`."""
        if not pressure.calm:
            self._stirred_s = now_s
        if pressure.pressed and now_s - self._changed_s >= SHRINK_EVERY_S:
            return max(min(self._least, self.slots), self.slots - max(1, int(SHRINK_STEP * self._most)))
        if now_s - max(self._stirred_s, self._changed_s) >= CALM_S:
            return min(self._most, self.slots + max(1, int(GROW_STEP * self._most)))
        return self.slots

    def settle(self, slots: int, now_s: float) -> None:
        """Note that `slots` are in use since now, or, with the same number, that nothing could be done."""
        self.slots = slots
        self._changed_s = now_s
