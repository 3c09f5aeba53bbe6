"""Which instruction sets this machine offers to the kernels. Chooses nothing by being imported."""

from __future__ import annotations

import os
import platform

import llvmlite.binding as llvm

TARGETS = ("avx512vnni", "avxvnni", "avx2", "neon", "generic")


def host_features() -> frozenset[str]:
    """Return the CPU features that Numba compiles for (its override variable counts)."""
    forced = os.environ.get("NUMBA_CPU_FEATURES")
    if forced is not None:
        return frozenset(word[1:] for word in forced.split(",") if word.startswith("+"))
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def choose_target(features: frozenset[str], machine: str) -> str:
    """Return the fastest of TARGETS that `features` allow on `machine` (as platform.machine())."""
    if machine == "x86_64":
        if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features:
            return "avx512vnni"
        if {"avx2", "avxvnni"} <= features:
            return "avxvnni"
        if "avx2" in features:
            return "avx2"
    if machine == "aarch64" and "dotprod" in features:
        return "neon"
    return "generic"


def candidates() -> list[str]:
    """Return the targets to try on this machine, the best first."""
    best = choose_target(host_features(), platform.machine())
    # avx512vnni includes the instruction of avxvnni, in another encoding.
    lesser = {
        "avx512vnni": ["avxvnni", "avx2", "generic"],
        "avxvnni": ["avx2", "generic"],
        "avx2": ["generic"],
        "neon": ["generic"],
        "generic": [],
    }
    return [best, *lesser[best]]
