"""Where tests keep compiled kernels: with the daemon's, in a folder whose name is their digest.

Numba's own place, __pycache__, has a key that misses edits in the intrinsics.
"""

from __future__ import annotations

import os

from sterna.workers.kernels.cache import cache_dir

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir()))
