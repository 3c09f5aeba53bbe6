"""How the end of a worker is noticed, and how one is ended: by its pidfd, for workers on this machine.

A worker elsewhere has none: a `Presence` that listens for heartbeats takes its place then. What follows from
an end is decided in `roster`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import Protocol

from ...workers.messages import Hello


class Presence(Protocol):
    """Watches peers, which the roster numbers."""

    def watch(self, peer: int, hello: Hello) -> bool:
        """Watch the process that said `hello` from now on; return False if it has ended already."""

    def ended(self, peer: int) -> bool:
        """Return whether a watched peer has ended; True for one that is not watched."""

    def kill(self, peer: int) -> None:
        """Have a peer end, if it is watched and has not."""

    def forget(self, peer: int) -> None:
        """Watch a peer no more."""

    def sources(self) -> list[int]:
        """Return the descriptors that become readable when a peer ends; none if only time tells."""


class PidfdPresence:
    """Processes of this machine."""

    def __init__(self) -> None:
        self._pidfds: dict[int, int] = {}

    def watch(self, peer: int, hello: Hello) -> bool:
        """See `Presence.watch`."""
        try:
            self._pidfds[peer] = os.pidfd_open(hello.pid)
        except ProcessLookupError:
            return False
        return True

    def ended(self, peer: int) -> bool:
        """See `Presence.ended`."""
        if peer not in self._pidfds:
            return True
        poller = select.poll()
        poller.register(self._pidfds[peer], select.POLLIN)
        return bool(poller.poll(0))

    def kill(self, peer: int) -> None:
        """See `Presence.kill`."""
        if not self.ended(peer):
            with contextlib.suppress(ProcessLookupError):  # its parent has reaped it just now
                signal.pidfd_send_signal(self._pidfds[peer], signal.SIGKILL)

    def forget(self, peer: int) -> None:
        """See `Presence.forget`."""
        pidfd = self._pidfds.pop(peer, None)
        if pidfd is not None:
            os.close(pidfd)

    def sources(self) -> list[int]:
        """See `Presence.sources`."""
        return list(self._pidfds.values())
