"""Which instructions the kernels of this process use; fixed when it is imported."""

from __future__ import annotations

import os
import platform

from ...shm.errors import ConfigError
from .features import TARGETS, choose_target, host_features

__all__ = ["TARGET", "TARGETS", "choose_target", "host_features"]


def _selected() -> str:
    forced = os.environ.get("STERNA_KERNEL_TARGET")
    if not forced:
        return choose_target(host_features(), platform.machine())
    if forced not in TARGETS:
        raise ConfigError(f"STERNA_KERNEL_TARGET={forced}: expected one of {', '.join(TARGETS)}")
    return forced


TARGET = _selected()
