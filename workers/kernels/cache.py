"""Where compiled kernels are kept. Imports no numba: the variable must be set before it is."""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import version
from pathlib import Path

from ..user_cache import user_cache
from .features import candidates


def sources_digest(target: str = "") -> str:
    """Return 16 hex digits over all kernel sources, the compiler's versions and the target.

    target: by default what $STERNA_KERNEL_TARGET says, or this machine offers.

    Numba's own key sees only the file of the jitted function and the CPU, not the modules that define
    its intrinsics, so that an edited intrinsic would keep running as stale machine code.
    """
    chosen = target or os.environ.get("STERNA_KERNEL_TARGET") or candidates()[0]
    digest = hashlib.sha256(chosen.encode())
    for package in ("numba", "llvmlite", "numpy"):
        digest.update(f"{package}={version(package)};".encode())
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        digest.update(str(path.relative_to(here)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_dir(target: str = "") -> Path:
    """Return the folder for kernels as they are now compiled for `target`; its name holds their digest."""
    return cache_root() / f"kernels-{sources_digest(target)}"


def cache_root() -> Path:
    """Return what the user chose for kernels, or the user's cache folder."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    return Path(chosen) if chosen else user_cache()
