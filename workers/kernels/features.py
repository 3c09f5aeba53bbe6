"""Which instruction sets this machine offers to the kernels. Chooses nothing by being imported."""

from __future__ import annotations

import ctypes
import os
import platform

import llvmlite.binding as llvm

TARGETS = ("avx512vnni", "avxvnni", "avx2", "neon", "generic")
_AT_HWCAP, _HWCAP_ASIMDDP = 16, 1 << 20  # linux/auxvec.h, asm/hwcap.h of arm64


def host_features() -> frozenset[str]:
    """Return the CPU features that Numba compiles for (its override variable counts)."""
    forced = os.environ.get("NUMBA_CPU_FEATURES")
    if forced is not None:
        return frozenset(word[1:] for word in forced.split(",") if word.startswith("+"))
    found = {name for name, present in llvm.get_host_cpu_features().items() if present}
    # LLVM reads the features of an ARM CPU from /proc/cpuinfo and leaves this one out there.
    if platform.machine() == "aarch64" and _hwcap() & _HWCAP_ASIMDDP:
        found.add("dotprod")
    return frozenset(found)


def _hwcap() -> int:
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(getauxval(_AT_HWCAP))


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
