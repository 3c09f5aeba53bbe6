"""What holds for all tests: where kernels are kept, and how hypothesis runs.

Kernels lie with the daemon's and are compiled with its options, in a folder whose name is their digest:
Numba's own place, __pycache__, has a key that misses edits in the intrinsics. Timings never fail a
test, so examples have no deadline; a CI run repeats exactly.
"""

from __future__ import annotations

import os

from hypothesis import settings

from sterna.runtime.processes.kernel_environment import SETTINGS
from sterna.workers.kernels.cache import cache_dir

os.environ.update(SETTINGS)

import numba

# Only here, not in the environment: for the processes that tests start that names the root.
numba.config.CACHE_DIR = str(cache_dir())
settings.register_profile("sterna", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("sterna")
