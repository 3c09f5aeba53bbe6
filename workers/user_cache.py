"""Where this user's caches lie: compiled kernels, checksums, counts."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def user_cache() -> Path:
    """Return systemd's folder for this service, or the user's cache folder; it need not exist."""
    chosen = os.environ.get("CACHE_DIRECTORY")
    return Path(chosen) if chosen else platformdirs.user_cache_path("sterna")
