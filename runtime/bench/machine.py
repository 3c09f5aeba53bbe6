"""What a measurement was made on: CPU, memory, system and the versions that matter."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ... import __version__
from ...workers.kernels.features import host_features
from ...workers.kernels.measure.bandwidth import cache_nbytes
from ...workers.kernels.target import TARGET
from ...workers.pinned import cpus_by_core

# Of all features, those by which kernels are chosen or LLVM decides.
_TOLD = (
    "avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi",
    "avx512bf16", "neon", "dotprod", "i8mm", "sve", "fullfp16",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Return plain values for a report, ready for JSON; imports numba's compiler."""
    features = host_features()
    cpus = cpus_by_core()
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text(errors="replace")),
        "architecture": platform.machine(),
        "cpus": len(cpus),
        "last_level_cache_nbytes": cache_nbytes(cpus),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "features": [name for name in _TOLD if name in features],
        "target": TARGET,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numba": version("numba"),
        "llvmlite": version("llvmlite"),
        "numpy": version("numpy"),
        "sterna": __version__,
        # Others at work here: above about 0.3 per CPU, take the figures as lower bounds.
        "load_1min": round(os.getloadavg()[0], 2),
    }


def cpu_model(cpuinfo: str) -> str:
    """Return the name of the CPU in the text of /proc/cpuinfo; on ARM its implementer and part."""
    found: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    if found.get("model name"):
        return found["model name"]
    parts = [f"{key} {found[key]}" for key in ("CPU implementer", "CPU part") if key in found]
    board = [found["Model"]] if "Model" in found else []
    return ", ".join([*board, *parts]) or "unknown"
