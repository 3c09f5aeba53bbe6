"""Limits that hold, caches that are cold, counters that count, and the table that is made of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory
import memory_cgroup
from memory_cgroup import MemoryCgroup, Usage, cached_share, make_cold
from memory_runs import Measurement

MIB = 1 << 20


@pytest.fixture
def _cgroups() -> None:
    if reason := memory_cgroup.why_no_cgroup():
        pytest.skip(reason)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    filesystem = subprocess.run(
        ["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True
    )
    if filesystem.stdout.strip() in ("tmpfs", "ramfs", "overlayfs"):
        pytest.skip(f"{tmp_path} is on {filesystem.stdout.strip()}, which has no cache to drop")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB))
    return path


def python(code: str, group: MemoryCgroup) -> int:
    command = group.command_inside([sys.executable, "-c", code])
    return subprocess.run(command, check=False, timeout=60, stderr=subprocess.DEVNULL).returncode


@pytest.mark.usefixtures("_cgroups")
def test_a_process_beyond_the_limit_is_killed_and_one_within_is_not() -> None:
    with MemoryCgroup(64 * MIB) as group:
        assert python("x = b'1' * (8 << 20)", group) == 0
        assert python("x = b'1' * (128 << 20)", group) == -9
        peak = group.peak_bytes
        assert peak is None or 32 * MIB < peak <= 64 * MIB


@pytest.mark.usefixtures("_cgroups")
@pytest.mark.parametrize("limit", [None, 4 * MIB])
def test_what_a_limit_makes_a_process_read_again_is_counted(file: Path, limit: int | None) -> None:
    make_cold(file)
    with MemoryCgroup(limit) as group:
        command = group.command_inside(["sh", "-c", 'cat "$1" "$1" > /dev/null', "sh", str(file)])
        subprocess.run(command, check=True, timeout=60)
        assert (group.reread_bytes > 2 * MIB) == (limit is not None)


@pytest.mark.usefixtures("_cgroups")
def test_nothing_of_a_group_is_left() -> None:
    with MemoryCgroup(None) as group:
        child = subprocess.Popen(group.command_inside(["sleep", "100"]))
        folder = group._folder
        while str(child.pid) not in (folder / "cgroup.procs").read_text().split():
            assert child.poll() is None
    assert child.wait(10) == -9
    assert not folder.exists()


def test_a_cold_file_is_not_cached_and_reading_it_counts(file: Path) -> None:
    file.read_bytes()
    assert cached_share(file) == 1.0
    assert make_cold(file) == 0.0
    code = f"import sys; open({str(file)!r}, 'rb').read(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        before = Usage.of(child.pid)
        assert child.stdout is not None
        child.stdout.readline()
        used = Usage.of(child.pid) - before
        child.communicate()
    assert used.read_bytes >= 8 * MIB
    assert cached_share(file) == 1.0


@pytest.mark.parametrize(
    ("text", "limit"),
    [("700MiB", 700 * MIB), ("1.5 GiB", 1536 * MIB), ("2GB", 2 * 10**9), ("4096", 4096), ("none", None)],
)
def test_limits_are_read(text: str, limit: int | None) -> None:
    assert memory.parse_limit(text) == limit


def test_other_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="700 bananas"):
        memory.parse_limit("700 bananas")


def test_medians_leave_out_failed_runs_and_the_ratio_is_to_the_same_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [Measurement(runner="ours", limit_bytes=MIB, answer_rate=rate) for rate in (6.0, 10.0, 8.0)]
    runs.append(Measurement(runner="ours", limit_bytes=MIB, error="was killed"))
    runs += [
        Measurement(runner="llama.cpp", limit_bytes=limit, answer_rate=r)
        for limit, r in ((MIB, 2), (None, 64))
    ]
    rows = memory.summary(runs)
    assert [row.answer_rate for row in rows] == [8.0, 2, 64]
    memory.print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:7] == ["1", "MiB", "ours", "-", "8.00", "4.00", "-"]
    assert lines[4] == "1 MiB, ours: was killed"
