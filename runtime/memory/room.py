"""How much memory may be had here: what the system has free, what cgroups allow, what a preset grants.

In here: reading /proc and /sys (below a folder that tests make), and the rule that turns it and two settings
into the budget. Not in here: what the budget is spent on (`budget.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...shm.errors import OutOfResources
from ..sizes import format_given, format_size

_GIB, _MIB = 2**30, 2**20

# What ruvllm grants each class of machine (memory bytes of its tier mapper, ADR-092).
PRESETS = {
    "raspberry-pi-5": 6 * _GIB,
    "mobile": 2 * _GIB,
    "desktop": 12 * _GIB,
    "wasm-browser": 1 * _GIB,
    "custom": 4 * _GIB,
}

# A system runs more than us: what others need next must not come out of swap. A cgroup's limit is already
# our share, and only what the kernel itself charges to it (page tables, sockets, pages being read) is left.
_SYSTEM_RESERVE = (256 * _MIB, 0.10)
_CGROUP_RESERVE = (16 * _MIB, 0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes that can be had now, of `total`, bytes to leave alone of them, and who says so."""

    available: int
    total: int
    reserve: int
    source: str
    limited: bool
    """Whether a cgroup's limit is what ends it: beyond that processes are killed, not swapped."""

    @property
    def usable(self) -> int:
        """What to take at most."""
        return max(0, self.available - self.reserve)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes for everything that Sterna uses, and one line on where the number is from."""

    nbytes: int
    why: str


def read_room(root: Path = Path("/")) -> Room:
    """Return the memory that can be had: the least of the system's and of every cgroup above this process.

    Page cache counts as free, also the cgroup's own: it is given up for us (and what we read of the model
    does not need it). Raises OutOfResources when the system does not say.
    """
    meminfo = _meminfo(root)
    available = meminfo.get("MemAvailable")
    if available is None:
        raise OutOfResources("/proc/meminfo does not say how much memory is available")
    total = meminfo.get("MemTotal", available)
    rooms = [_room(available, total, _SYSTEM_RESERVE, "free on this machine", False)]
    for left, limit, name in _cgroup_rooms(root):
        rooms.append(_room(left, limit, _CGROUP_RESERVE, f"left by cgroup {name}", True))
    return min(rooms, key=lambda room: room.usable)


def own_nbytes(root: Path = Path("/")) -> int:
    """Return the memory that this process has already: it is no longer free, and still in its budget."""
    size = (_lines(root / "proc/self/statm") or ["0 0 0"])[0].split()
    return (int(size[1]) - int(size[2])) * os.sysconf("SC_PAGE_SIZE")


def choose_budget(
    memory: int | None, preset: str, room: Room, own: int = 0, root: Path = Path("/")
) -> Budget:
    """Return what to work with; `memory` is the setting, None for auto; `own` what this process has of it.

    A size that is set is taken as it is; raises OutOfResources where a cgroup would kill for it. Auto is
    what can be had without the reserve, and no more than the preset grants.
    """
    if memory is not None:
        if room.limited and memory > room.available + own:
            raise OutOfResources(
                f"memory is {format_given(memory)}, but {format_size(room.available)} are {room.source}"
            )
        return Budget(nbytes=memory, why="as set")
    if preset == "auto" and _is_pi_5(root):
        preset = "raspberry-pi-5"
    granted = PRESETS.get(preset)
    if granted is not None and granted <= room.usable + own:
        return Budget(nbytes=granted, why=f"preset {preset}")
    return Budget(
        nbytes=room.usable + own,
        why=f"{format_size(room.available)} {room.source}, less a reserve of {format_size(room.reserve)}",
    )


def _room(available: int, total: int, reserve: tuple[int, float], source: str, limited: bool) -> Room:
    least, share = reserve
    return Room(
        available=available,
        total=total,
        reserve=max(least, int(share * available)),
        source=source,
        limited=limited,
    )


def _is_pi_5(root: Path) -> bool:
    try:
        return "Raspberry Pi 5" in (root / "proc/device-tree/model").read_text(errors="replace")
    except OSError:
        return False


def _meminfo(root: Path) -> dict[str, int]:
    found = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            found[name] = int(words[0]) << 10
    return found


# ---- cgroups ----


def cgroup_folders(root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """Yield (folder, version) of every memory cgroup above this process, leaf first.

    Within a container only what is mounted there: its root is then the container's own cgroup.
    """
    paths = {2: "", 1: ""}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        mount, filesystem = left.split(), right.split()
        if len(mount) < 5 or len(filesystem) < 3 or filesystem[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if filesystem[0] == "cgroup2" else 1
        if version == 1 and "memory" not in filesystem[2].split(","):
            continue
        top = root / mount[4].lstrip("/")
        folder = top / _below(paths[version], mount[3])
        yield from ((each, version) for each in (folder, *folder.parents) if each.is_relative_to(top))


def _below(path: str, mounted: str) -> str:
    """Return `path` as seen from what is mounted: its own root where the two have nothing in common."""
    try:
        return str(PurePosixPath(path).relative_to(mounted))
    except ValueError:
        return "."


def _cgroup_rooms(root: Path) -> Iterator[tuple[int, int, str]]:
    """Yield (bytes left, limit, name) of each memory cgroup that has a limit."""
    for folder, version in cgroup_folders(root):
        if version == 2:
            limits = [_number(folder / "memory.max"), _number(folder / "memory.high")]
            used, keys = _number(folder / "memory.current"), ("inactive_file", "active_file")
        else:
            limits = [_number(folder / "memory.limit_in_bytes")]
            used, keys = (
                _number(folder / "memory.usage_in_bytes"),
                ("total_inactive_file", "total_active_file"),
            )
        known = [limit for limit in limits if limit is not None]
        if not known or used is None:
            continue
        # Not "file": that counts shared memory too, which nobody can take from us.
        cache = sum(value for key, value in _statistics(folder / "memory.stat") if key in keys)
        yield max(0, min(known) - max(0, used - cache)), min(known), str(folder)


def _statistics(path: Path) -> Iterator[tuple[str, int]]:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if value.isdigit():
            yield key, int(value)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)[:1])
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
