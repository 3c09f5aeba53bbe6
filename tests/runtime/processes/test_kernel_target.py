"""The kernels' target is proven in a child, remembered, and the next best taken where one fails."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import platformdirs
import pytest

from sterna.runtime.processes import kernel_target
from sterna.runtime.processes.kernel_target import VARIABLE, proven_target
from sterna.shm.errors import ConfigError, StartFailed
from sterna.workers.kernels import features
from sterna.workers.kernels.cache import cache_dir, cache_root, sources_digest

ABORTS = f"import os; os.environ['{VARIABLE}'] in ('avx512vnni', 'avx2') and os.abort()"


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A root of its own, and no target forced."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert cache_root() == tmp_path
    return tmp_path


def offer(monkeypatch: pytest.MonkeyPatch, *targets: str) -> None:
    monkeypatch.setattr(features, "candidates", lambda: list(targets))


def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a further child impossible: it would not start."""
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")


def memories(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in root.glob("target-*")}


def kernels_kept_between_runs(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Put this target's compiled kernels where other runs of this test left theirs: they take a while."""
    monkeypatch.setenv(VARIABLE, "generic")
    name = f"proven-{sources_digest()}"
    kept = platformdirs.user_cache_path("sterna-tests")
    for old in kept.glob("proven-*"):
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)
    (kept / name).mkdir(parents=True, exist_ok=True)
    cache_dir().symlink_to(kept / name)
    monkeypatch.delenv(VARIABLE)
    assert len(list(root.iterdir())) == 1


@pytest.mark.slow
def test_a_refused_target_gives_way_to_one_that_passes_the_self_test(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """Both children are real: the first ends with ConfigError, the second computes."""
    kernels_kept_between_runs(monkeypatch, root)
    offer(monkeypatch, "avx1024", "generic")
    assert proven_target() == "generic"
    assert list(memories(root).values()) == ["generic"]
    assert VARIABLE not in os.environ
    compiled = [path for path in root.glob("kernels-*/**/*.nbi") if "ternary.gemm" in path.name]
    assert compiled, "the child's kernels lie where a process of that target looks for them"


def test_a_target_whose_child_is_killed_gives_way(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(kernel_target, "_CODE", ABORTS)
    offer(monkeypatch, "avx512vnni", "avx2", "generic")
    assert proven_target() == "generic"
    assert list(memories(root).values()) == ["generic"]


def test_the_best_that_works_is_taken_and_no_lesser_tried(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    tried = root / "tried"
    code = f"import os; open({str(tried)!r}, 'a').write(os.environ['{VARIABLE}'] + ' ')"
    monkeypatch.setattr(kernel_target, "_CODE", code)
    offer(monkeypatch, "avx2", "generic")
    assert proven_target() == "avx2"
    assert tried.read_text() == "avx2 "


def test_what_passed_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_target, "_CODE", ABORTS)
    offer(monkeypatch, "avx2", "generic")
    assert proven_target() == "generic"
    no_child(monkeypatch)
    assert proven_target() == "generic"


def test_other_kernels_are_tried_anew(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(kernel_target, "_CODE", ABORTS)
    offer(monkeypatch, "avx2", "generic")
    proven_target()
    monkeypatch.setattr(kernel_target, "sources_digest", lambda: "0123456789abcdef")
    monkeypatch.setattr(kernel_target, "_CODE", "pass")
    assert proven_target() == "avx2"
    assert sorted(memories(root).values()) == ["avx2", "generic"]


@pytest.mark.parametrize("text", ["", "avx1024", "generic\n\0"])
def test_a_damaged_memory_is_no_memory(monkeypatch: pytest.MonkeyPatch, root: Path, text: str) -> None:
    monkeypatch.setattr(kernel_target, "_CODE", "pass")
    offer(monkeypatch, "avx2", "generic")
    proven_target()
    (memory,) = root.glob("target-*")
    memory.write_text(text)
    assert proven_target() == "avx2"
    assert memory.read_text() == "avx2"


def test_no_file_of_the_current_folder_takes_part_in_the_proof(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "random.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(here)
    monkeypatch.setattr(kernel_target, "_CODE", "import random; random.Random")
    offer(monkeypatch, "generic")
    assert proven_target() == "generic"
    assert not (here / "ran").exists()


@pytest.mark.parametrize("forced", ["generic", "avx2", "avx1024"])
def test_a_forced_target_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, root: Path, forced: str) -> None:
    """Whether it is one is said by whoever imports the kernels."""
    monkeypatch.setenv(VARIABLE, forced)
    offer(monkeypatch, "avx2", "generic")
    no_child(monkeypatch)
    assert proven_target() == forced
    assert os.environ[VARIABLE] == forced
    assert memories(root) == {}


def test_a_forced_target_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "neon")
    offer(monkeypatch, "avx2", "generic")
    with pytest.raises(ConfigError, match=r"^STERNA_KERNEL_TARGET=neon: .* expected one of avx2, generic$"):
        proven_target()


def test_where_none_works_the_start_fails_and_says_how_each_did(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    code = (
        f"import os, sys; target = os.environ['{VARIABLE}']; "
        "sys.exit(f'{target} is wrong') if target == 'generic' else os.abort()"
    )
    monkeypatch.setattr(kernel_target, "_CODE", code)
    offer(monkeypatch, "avx2", "generic")
    with pytest.raises(StartFailed) as caught:
        proven_target()
    text = str(caught.value)
    assert text.startswith("no kernel computes correctly on this CPU (avx2: ")
    assert "ended with status -6; generic: generic is wrong)" in text
    assert "\n" not in text
    assert memories(root) == {}
    assert VARIABLE not in os.environ


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_target, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(kernel_target, "_CODE", "import time; time.sleep(60)")
    offer(monkeypatch, "generic")
    with pytest.raises(StartFailed, match=r"generic: the self-test took longer than 1 s\)$"):
        proven_target()


def test_candidates_begin_with_the_fastest_and_end_with_what_runs_anywhere() -> None:
    found = features.candidates()
    assert found[-1] == "generic"
    order = [features.TARGETS.index(target) for target in found]
    assert order == sorted(set(order))


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "CACHE_DIRECTORY"])
def test_a_chosen_folder_is_the_root_of_kernels_by_digest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "chosen"))
    assert cache_root() == tmp_path / "chosen"
    assert cache_dir() == tmp_path / "chosen" / f"kernels-{sources_digest()}"


def test_no_chosen_folder_means_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    assert cache_root() == platformdirs.user_cache_path("sterna")
