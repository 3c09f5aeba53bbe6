"""Which instructions the kernels use: those that were seen to work here, in a process of their own.

CPU features are what the CPU says; a virtual machine may say more than it runs, and an instruction it
lacks ends the process. So the self-test runs once in a child, for the best target first. What passed
is remembered beside the compiled kernels, and those are compiled by then.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from pathlib import Path

from ...shm.errors import ConfigError, StartFailed
from ...workers.kernels.cache import cache_dir, cache_root, sources_digest
from ..python_command import python_command

VARIABLE = "STERNA_KERNEL_TARGET"
TIMEOUT_S = 600.0  # it compiles
# The child ends with us, whatever ends us (PR_SET_PDEATHSIG, SIGKILL).
_CODE = """
import ctypes
ctypes.CDLL(None).prctl(1, 9)
from sterna.workers import selftest
selftest.run()
"""


def proven_target() -> str:
    """Return the target to use; a forced one ($STERNA_KERNEL_TARGET) is taken without a proof.

    Raises ConfigError for a forced target whose instructions this machine does not have: LLVM aborts over
    these. Raises StartFailed when no target computes correctly, with what the last child said.
    """
    from ...workers.kernels.features import TARGETS, candidates

    forced = os.environ.get(VARIABLE)
    if forced:
        # A name that is no target at all is refused by whoever imports the kernels.
        if forced in TARGETS and forced not in candidates():
            raise ConfigError(
                f"{VARIABLE}={forced}: this machine has no such instructions; expected one of "
                f"{', '.join(candidates())}"
            )
        return forced
    memory = cache_root() / f"target-{_machine_digest()}"
    with contextlib.suppress(OSError):
        remembered = memory.read_text(errors="replace")
        if remembered in TARGETS:  # a crash of the machine may leave an empty file
            return remembered
    failures = []
    for target in candidates():
        failure = _try(target)
        if not failure:
            _remember(memory, target)
            return target
        failures.append(f"{target}: {failure}")
    raise StartFailed(f"no kernel computes correctly on this CPU ({'; '.join(failures)})")


def _try(target: str) -> str:
    """Run the self-test in a child; return "" or how it failed."""
    os.environ[VARIABLE] = target  # the cache's name depends on it
    try:
        env = {**os.environ, "NUMBA_CACHE_DIR": str(cache_dir())}
        done = subprocess.run(
            python_command("-c", _CODE),
            env=env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the self-test took longer than {TIMEOUT_S:.0f} s"
    finally:
        del os.environ[VARIABLE]
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]


def _machine_digest() -> str:
    """Return a digest of kernels and CPU: another of either is tried again."""
    flags = ""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features", "model name", "CPU part")):
            flags += line
        elif not line and flags:
            break  # the first core speaks for all
    return hashlib.sha256((sources_digest() + flags).encode()).hexdigest()[:16]


def _remember(memory: Path, target: str) -> None:
    """Write the target down; where nothing can be kept, the next start tries again."""
    part = memory.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(target)
        part.replace(memory)
