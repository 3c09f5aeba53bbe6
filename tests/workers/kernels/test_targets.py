"""The same bits on every instruction set that this CPU has, and the instructions that were meant."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from sterna.shm.errors import ConfigError
from sterna.workers.kernels import features
from sterna.workers.kernels.cache import cache_dir
from sterna.workers.kernels.target import TARGETS, choose_target, host_features

SCRIPT = Path(__file__).with_name("target_check.py")
TIMEOUT_S = 280
NEEDS = {
    "avx512vnni": ("x86_64", {"avx512f", "avx512bw", "avx512vl", "avx512vnni"}),
    "avxvnni": ("x86_64", {"avx2", "avxvnni"}),
    "avx2": ("x86_64", {"avx2"}),
    "neon": ("aarch64", {"dotprod"}),
}


@dataclass(frozen=True)
class Report:
    """What `target_check` prints."""

    target: str
    digests: dict[str, str]
    assembly: dict[str, str]


def missing(target: str) -> str | None:
    """Return why this machine cannot run `target`, or None."""
    machine, features = NEEDS.get(target, (platform.machine(), set()))
    if platform.machine() != machine:
        return f"{target} is for {machine}, this is {platform.machine()}"
    if target == "avxvnni" and "avx512vnni" in host_features():
        return missing("avx512vnni")  # its instruction is there, in another encoding
    lacking = features - host_features()
    return f"this CPU has no {', '.join(sorted(lacking))}" if lacking else None


def run(arguments: list[str], target: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "STERNA_KERNEL_TARGET": target, "NUMBA_CACHE_DIR": str(folder)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@cache
def report(target: str) -> Report:
    """Return the report of a process that was told to use `target`."""
    process = run([str(SCRIPT)], target, cache_dir(target))
    assert process.returncode == 0, f"{target}: status {process.returncode}\n{process.stderr}"
    return Report(**json.loads(process.stdout))


# Of two alike targets one is left to the slow tests.
@pytest.fixture(
    params=[pytest.param(each, marks=pytest.mark.slow) if each == "avxvnni" else each for each in TARGETS]
)
def checked(request: pytest.FixtureRequest) -> Report:
    """The report of each target that runs here; the others are skipped with the reason."""
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    return report(request.param)


def test_integer_sums_are_exact_and_all_results_those_of_the_generic_target(checked: Report) -> None:
    """The exactness itself is asserted in the other process."""
    generic = report("generic").digests
    assert len(generic) > 40
    different = [name for name, digest in checked.digests.items() if digest != generic[name]]
    assert different == []
    assert checked.digests.keys() == generic.keys()


def count(assembly: str, instruction: str) -> int:
    return len(re.findall(rf"^\s+v?{instruction}\b", assembly, re.MULTILINE))


def test_the_product_uses_the_instruction_it_was_written_for(checked: Report) -> None:
    expected = {
        "avx512vnni": {"pdpbusd"},
        "avxvnni": {"pdpbusd"},
        "avx2": {"pmaddubsw"},
        "neon": {"sdot"},
        "generic": set(),
    }[checked.target]
    # How many of its instructions make 64 bytes. (LLVM joins AVX2's halves where the CPU has AVX-512.)
    width = {"avx512vnni": 1, "avxvnni": 2, "avx2": 1, "neon": 4, "generic": 0}[checked.target]
    groups, tokens = (2, 8) if checked.target == "avx512vnni" else (1, 4)
    minimum = {
        "2-bit, one token": groups * 4,
        "2-bit, by fields": groups * tokens * 4,
        "2-bit, a tile": groups * tokens * 5,
        "8-bit, a tile": groups * tokens,
    }
    assert checked.assembly.keys() == minimum.keys()
    for kernel, text in checked.assembly.items():
        dots = {name: count(text, name) for name in ("pdpbusd", "pmaddubsw", "sdot", "pmullw")}
        used = {name for name, number in dots.items() if number}
        assert used - ({"pmullw"} if checked.target == "generic" else set()) == expected, kernel
        assert sum(dots.values()) >= minimum[kernel] * width, kernel


def test_each_target_computes_in_vectors_of_its_own_width(checked: Report) -> None:
    dots = re.findall(r"pdpbusd\b.*%([xyz]mm)\d+$", "\n".join(checked.assembly.values()), re.MULTILINE)
    assert set(dots) == {"avx512vnni": {"zmm"}, "avxvnni": {"ymm"}}.get(checked.target, set())


def test_a_target_asked_for_is_the_one_that_runs(checked: Report) -> None:
    assert report(checked.target).target == checked.target


@pytest.mark.parametrize(
    ("features", "machine", "target"),
    [
        ({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx2", "f16c", "fma"}, "x86_64", "avx512vnni"),
        ({"avx512f", "avx512bw", "avx512vl", "avx2", "f16c", "fma"}, "x86_64", "avx2"),
        ({"avx512vnni", "avx2", "f16c", "fma"}, "x86_64", "avx2"),
        ({"avxvnni", "avx2", "f16c", "fma"}, "x86_64", "avxvnni"),
        ({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "avxvnni", "avx2"}, "x86_64", "avx512vnni"),
        ({"avxvnni", "avx"}, "x86_64", "generic"),
        ({"avx2", "f16c", "fma"}, "x86_64", "avx2"),
        ({"sse4.2"}, "x86_64", "generic"),
        ({"neon", "dotprod"}, "aarch64", "neon"),
        ({"neon"}, "aarch64", "generic"),
        ({"avx2", "dotprod"}, "riscv64", "generic"),
    ],
)
def test_the_fastest_possible_target_is_chosen(features: set[str], machine: str, target: str) -> None:
    assert choose_target(frozenset(features), machine) == target


@pytest.mark.parametrize(
    ("best", "others"),
    [
        ("avx512vnni", ["avxvnni", "avx2", "generic"]),
        ("avxvnni", ["avx2", "generic"]),
        ("avx2", ["generic"]),
        ("neon", ["generic"]),
        ("generic", []),
    ],
)
def test_lesser_targets_follow_the_best(
    best: str, others: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "choose_target", lambda *_: best)
    assert features.candidates() == [best, *others]


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    process = run(["-c", "import sterna.workers.kernels.target"], "avx1024", tmp_path)
    assert process.returncode != 0
    assert process.stderr.splitlines()[-1].endswith(
        f"{ConfigError.__name__}: STERNA_KERNEL_TARGET=avx1024: expected one of {', '.join(TARGETS)}"
    )


def test_targets_do_not_share_compiled_kernels() -> None:
    """Numba's key knows the CPU and not the target: one folder would run the first one's code as all."""
    code = "from sterna.workers.kernels.cache import cache_dir; print(cache_dir().name)"
    folders = set()
    for target in ("", *TARGETS):
        environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "STERNA_KERNEL_TARGET": target},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        folders.add(done.stdout.strip())
    assert len(folders) >= len(TARGETS)
