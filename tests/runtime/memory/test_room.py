"""How much memory may be had: /proc and cgroups as files in a folder of the test's own."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from sterna.runtime.memory.pressure import Governor, Pressure, read_pressure
from sterna.runtime.memory.room import PRESETS, Room, cgroup_folders, choose_budget, own_nbytes, read_room
from sterna.shm.errors import OutOfResources

MIB, GIB = 2**20, 2**30
V2_MOUNT = "30 24 0:26 {root} /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "32 31 0:29 {root} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
CPU_MOUNT = "33 31 0:3 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(root: Path, available: int = 8 * GIB, files: dict[str, str] | None = None) -> Path:
    meminfo = f"MemTotal: {16 * GIB >> 10} kB\nMemAvailable: {available >> 10} kB\nHugePages_Total: 0\n"
    return write(root, {"proc/meminfo": meminfo, "proc/self/statm": "900 700 200 1 0 1 0\n", **(files or {})})


def cgroup_v2(path: str, maximum: str, current: int, cache: int = 0, high: str = "max") -> dict[str, str]:
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": f"{maximum}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{current}\n",
        # "file" holds shared memory too, which is not to be counted as free.
        f"{folder}/memory.stat": f"anon 5\nfile {cache + 7 * GIB}\ninactive_file {cache}\nactive_file 0\n",
    }


def test_without_cgroups_the_system_says(tmp_path: Path) -> None:
    room = read_room(machine(tmp_path))
    assert (room.available, room.total, room.limited) == (8 * GIB, 16 * GIB, False)
    assert room.reserve == 8 * GIB // 10
    small = read_room(machine(tmp_path, available=GIB))
    assert small.usable == GIB - 256 * MIB
    assert read_room(machine(tmp_path, available=100 * MIB)).usable == 0
    assert own_nbytes(tmp_path) == 500 * os.sysconf("SC_PAGE_SIZE")


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 5 kB\n"})
    with pytest.raises(OutOfResources, match="does not say"):
        read_room(tmp_path)


def test_the_tightest_cgroup_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a.slice/b.scope\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        **cgroup_v2("/a.slice/b.scope", "max", 100 * MIB),
        **cgroup_v2("/a.slice", str(2 * GIB), GIB, cache=300 * MIB),
    }
    room = read_room(machine(tmp_path, files=files))
    assert (room.available, room.total, room.limited) == (GIB + 300 * MIB, 2 * GIB, True)
    assert room.source == f"left by cgroup {tmp_path}/sys/fs/cgroup/a.slice"
    high = cgroup_v2("/a.slice/b.scope", str(4 * GIB), 100 * MIB, high=str(500 * MIB))
    assert read_room(write(tmp_path, high)).available == 400 * MIB


def test_a_container_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    """With a namespace the path is /; without one it names what is not mounted here."""
    for path in ("/", "/docker/123"):
        files = {
            "proc/self/cgroup": f"0::{path}\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/docker/123" if path != "/" else "/"),
            **cgroup_v2("", str(700 * MIB), 200 * MIB),
        }
        assert read_room(machine(tmp_path, files=files)).available == 500 * MIB


def test_version_1(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/x/y"
    files = {
        "proc/self/cgroup": "5:devices:/x\n4:memory:/x/y\n0::/\n",
        "proc/self/mountinfo": CPU_MOUNT + V1_MOUNT.format(root="/"),
        f"{folder}/memory.limit_in_bytes": f"{3 * GIB}\n",
        f"{folder}/memory.usage_in_bytes": f"{GIB}\n",
        f"{folder}/memory.stat": f"total_inactive_file {100 * MIB}\ntotal_active_file {50 * MIB}\ncache 9\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
    }
    room = read_room(machine(tmp_path, files=files))
    assert (room.available, room.limited) == (2 * GIB + 150 * MIB, True)
    assert [version for _, version in cgroup_folders(tmp_path)] == [1, 1, 1]


def room(usable: int, *, limited: bool = False) -> Room:
    return Room(available=usable + 100, total=2 * usable, reserve=100, source="here", limited=limited)


def test_budget_as_set_by_preset_or_by_what_is_free(tmp_path: Path) -> None:
    assert choose_budget(5 * GIB, "mobile", room(GIB)).nbytes == 5 * GIB
    assert choose_budget(None, "auto", room(9 * GIB), root=tmp_path).nbytes == 9 * GIB
    assert choose_budget(None, "auto", room(9 * GIB), own=7, root=tmp_path).nbytes == 9 * GIB + 7
    for preset, granted in PRESETS.items():
        assert choose_budget(None, preset, room(20 * GIB)).nbytes == granted
        assert choose_budget(None, preset, room(GIB // 2)).nbytes == GIB // 2
    write(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    budget = choose_budget(None, "auto", room(7 * GIB), root=tmp_path)
    assert (budget.nbytes, budget.why) == (6 * GIB, "preset raspberry-pi-5")


def test_more_than_a_cgroup_grants_is_refused() -> None:
    assert choose_budget(GIB, "auto", room(GIB, limited=True)).nbytes == GIB
    with pytest.raises(OutOfResources, match=r"memory is 2 GiB, but 1 GiB are here"):
        choose_budget(2 * GIB, "auto", room(GIB, limited=True))


# ---- pressure ----


def test_pressure_is_read_from_the_machine_and_the_cgroup(tmp_path: Path) -> None:
    some = "some avg10={} avg60=0.00 avg300=0.00 total=0\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n"
    files = {
        "proc/self/cgroup": "0::/a\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "proc/pressure/memory": some.format("3.50"),
    }
    machine(tmp_path, available=4 * GIB, files=files)
    assert read_pressure(read_room(tmp_path), tmp_path) == Pressure(stalled=3.5, free_share=0.25)
    write(tmp_path, {"sys/fs/cgroup/a/memory.pressure": some.format("12.25")})
    write(tmp_path, cgroup_v2("/a", str(GIB), GIB))
    assert read_pressure(read_room(tmp_path), tmp_path) == Pressure(stalled=12.25, free_share=1.0)


CALM, NEITHER = Pressure(stalled=0.0, free_share=0.5), Pressure(stalled=5.0, free_share=0.5)
STALLED, SHORT = Pressure(stalled=20.0, free_share=0.5), Pressure(stalled=0.0, free_share=0.04)


def follow(governor: Governor, readings: list[Pressure], start_s: float) -> list[int]:
    """Give one reading a second and carry out what is decided; return the slots after each."""
    slots = []
    for second, reading in enumerate(readings):
        wanted = governor.decide(reading, start_s + second)
        if wanted != governor.slots:
            governor.settle(wanted, start_s + second)
        slots.append(governor.slots)
    return slots


@pytest.mark.parametrize("pressed", [STALLED, SHORT])
def test_it_shrinks_by_a_tenth_every_ten_seconds_down_to_the_floor(pressed: Pressure) -> None:
    governor = Governor(least=30, most=200, now_s=0.0)
    slots = follow(governor, [pressed] * 100, 0.0)
    assert slots[9:12] == [200, 180, 180]
    assert slots[19:22] == [180, 160, 160]
    assert min(slots) == slots[-1] == 30
    assert all(b <= a for a, b in itertools.pairwise(slots))


def test_it_grows_back_slowly_and_only_while_it_is_calm() -> None:
    governor = Governor(least=30, most=200, now_s=0.0)
    assert follow(governor, [STALLED] * 21, 0.0)[-1] == 160
    assert set(follow(governor, [NEITHER] * 200, 21.0)) == {160}
    slots = follow(governor, [CALM] * 300, 221.0)
    assert slots[58:60] == [160, 170]
    assert slots[-1] == 200
    assert governor.decide(CALM, 10_000.0) == 200


def test_a_single_reading_changes_nothing_at_once() -> None:
    governor = Governor(least=30, most=200, now_s=0.0)
    assert follow(governor, [STALLED, CALM, STALLED, CALM, CALM], 0.0) == [200] * 5
    governor.restart(50, 5.0)
    assert governor.decide(STALLED, 6.0) == 50
    assert governor.decide(STALLED, 15.0) == 45
