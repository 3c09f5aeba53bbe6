"""Which instructions the kernels may use on this machine."""

from __future__ import annotations

import os
import platform

import llvmlite.binding as llvm

from ...shm.errors import ConfigError

TARGETS = ("avx512vnni", "avx2", "neon", "generic")


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
        if "avx2" in features:
            return "avx2"
    if machine == "aarch64" and "dotprod" in features:
        return "neon"
    return "generic"


def _selected() -> str:
    forced = os.environ.get("STERNA_KERNEL_TARGET")
    if not forced:
        return choose_target(host_features(), platform.machine())
    if forced not in TARGETS:
        raise ConfigError(f"STERNA_KERNEL_TARGET={forced}: expected one of {', '.join(TARGETS)}")
    return forced


TARGET = _selected()
