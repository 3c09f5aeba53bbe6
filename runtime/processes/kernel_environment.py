"""What must be set before numba is imported, so that a process shares the daemon's compiled kernels."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...shm.errors import NotPermitted
from ...workers.kernels.cache import cache_dir, cache_root
from .kernel_target import VARIABLE, proven_target

log = logging.getLogger("sterna.kernels")

# OpenBLAS starts its threads when numpy is imported; Numba's default layer may be GNU OpenMP,
# which aborts a child forked after any parallel kernel was merely loaded.
SETTINGS = {
    "NUMBA_THREADING_LAYER": "workqueue",
    # Kernels are vectorised by hand; -O3 doubles the time to compile them and gains nothing.
    "NUMBA_OPT": "2",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEnvironment:
    """The target of this process's kernels and the folder where they are kept."""

    target: str
    folder: Path

    def compiled(self) -> frozenset[Path]:
        """Return the files of machine code that the folder holds now."""
        return frozenset(self.folder.glob("*/*.nbc"))


def borrow_folder() -> Path | None:
    """Have kernels kept in a temporary folder if their own cannot be written; return it, None if it can.

    What lies in their own comes along. The caller removes the folder when every kernel is loaded.
    """
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return None
    except OSError as error:
        log.warning("kernel.folder_not_writable folder=%s error=%r", root, error.strerror)
    borrowed = Path(tempfile.mkdtemp(prefix="sterna-kernels-"))
    for kept in (*root.glob("kernels-*"), *root.glob("target-*")):
        if kept.is_dir():
            shutil.copytree(kept, borrowed / kept.name)
        else:
            shutil.copy2(kept, borrowed)
    os.environ["NUMBA_CACHE_DIR"] = str(borrowed)
    return borrowed


@cache
def prepare() -> KernelEnvironment:
    """Set the environment of the nursery in this process; once, later calls return the same.

    The first start of all proves the target, which compiles for a while (`kernel_target`). Raises
    StartFailed when no target computes correctly, NotPermitted when the folder cannot be made, and
    RuntimeError when numba is imported already.
    """
    if "numba" in sys.modules:
        raise RuntimeError("numba is imported already: it would compile with other options")
    os.environ.update(SETTINGS)
    target = os.environ[VARIABLE] = proven_target()
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotPermitted(f"no folder for compiled kernels: {folder}: {error.strerror}") from error
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    return KernelEnvironment(target=target, folder=folder)
