"""How a command that has started a daemon ends by SIGTERM: in order, so that nothing is left behind."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

EXIT_SIGTERM = 143


def exit_on_sigterm() -> None:
    """Have SIGTERM raise SystemExit in the main thread from now on."""
    signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    # As an exception, so that a request is cancelled and a private daemon stopped.
    raise SystemExit(EXIT_SIGTERM)
