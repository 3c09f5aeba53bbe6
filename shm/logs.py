"""Logging as every process of a daemon does it: one event a line on stderr, `event.name key=value`."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def log_to_stderr(level: str) -> None:
    """Log Sterna's events of `level` ("debug", "info", "warning", "error") and above, once a process.

    Others' only from "warning" on: Numba says a great deal at "debug".
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=FORMAT, force=True)
    logging.getLogger("sterna").setLevel(level.upper())
