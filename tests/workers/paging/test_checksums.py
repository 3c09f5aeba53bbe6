"""Checksums of experts: over what, and how they outlive a process, and what their file may hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sterna.workers.paging.checksums import Checksums, combined, digest

MODEL = (1, 2, 3, 4)


def kept(folder: Path, model: tuple[int, ...] = MODEL, path: str = "m.gguf") -> Checksums:
    return Checksums(str(folder), model, path)


def file_of(folder: Path) -> Path:
    (found,) = (folder / "checksums").iterdir()
    return found


@given(st.lists(st.binary(max_size=100), min_size=3, max_size=3), st.data())
def test_it_tells_any_change_of_a_slab_or_of_their_order(parts: list[bytes], data: st.DataObject) -> None:
    arrays = [np.frombuffer(part, np.uint8) for part in parts]
    digests = [digest(array) for array in arrays]
    assert digests == [xxhash.xxh3_64_intdigest(part) for part in parts]
    other = data.draw(st.permutations(digests))
    assert (combined(other) == combined(digests)) == (other == digests)
    assert combined(digests) != 0


def test_it_is_remembered_for_the_same_file_and_expert_only(tmp_path: Path) -> None:
    with_file = kept(tmp_path)
    assert with_file.known(3, 7) == 0
    with_file.record(3, 7, 2**64 - 1)
    with_file.record(46, 255, 5)
    again = kept(tmp_path)
    assert (again.known(3, 7), again.known(46, 255)) == (2**64 - 1, 5)
    assert (again.known(3, 8), again.known(4, 7), again.known(60, 0)) == (0, 0, 0)
    for other in (kept(tmp_path, (1, 2, 3, 5)), kept(tmp_path, path="n.gguf")):
        assert other.known(3, 7) == 0
        other.close()
    with_file.close()
    again.close()
    assert file_of_size_on_disk(tmp_path) < 100_000


def file_of_size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (folder / "checksums").iterdir())


def test_two_processes_write_their_own(tmp_path: Path) -> None:
    one, other = kept(tmp_path), kept(tmp_path)
    for expert in range(0, 64, 2):
        one.record(1, expert, expert + 1)
        other.record(1, expert + 1, expert + 2)
    assert [kept(tmp_path).known(1, expert) for expert in range(64)] == list(range(1, 65))
    assert one.known(1, 5) == 6


@pytest.mark.parametrize("damage", ["flip", "cut", "garbage", "other model's"])
def test_a_damaged_file_means_unknown(tmp_path: Path, damage: str) -> None:
    kept(tmp_path).record(1, 2, 77)
    path = file_of(tmp_path)
    whole = path.read_bytes()
    if damage == "flip":
        for at in range(len(whole) - 16, len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            assert kept(tmp_path).known(1, 2) == 0
    elif damage == "cut":
        os.truncate(path, len(whole) - 1)
    elif damage == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(len(whole)))
    else:
        kept(tmp_path, path="other").record(1, 2, 78)
        (other,) = (each for each in (tmp_path / "checksums").iterdir() if each != path)
        other.replace(path)
    fresh = kept(tmp_path)
    assert fresh.known(1, 2) == 0
    fresh.record(1, 2, 79)
    assert kept(tmp_path).known(1, 2) == 79


@pytest.mark.parametrize("folder", ["", "/proc/nowhere", "/dev/null"])
def test_without_a_folder_they_are_kept_in_memory(folder: str) -> None:
    made = Checksums(folder, MODEL, "m.gguf")
    made.record(0, 1, 9)
    assert made.known(0, 1) == 9


def test_a_file_that_cannot_be_written_any_more_is_no_error(tmp_path: Path) -> None:
    made = kept(tmp_path)
    made.record(0, 1, 9)
    made.close()
    made.record(0, 2, 8)
    assert (made.known(0, 1), made.known(0, 2)) == (9, 8)
