"""One process that the nursery forked, as the daemon sees it, and how it ended.

Not in here: how it is started and how its end is noticed (supervisor.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a process ended: one of `code` and `signal` is set, or neither when nobody could tell."""

    code: int | None = None
    signal: int | None = None

    @classmethod
    def from_returncode(cls, status: int) -> ExitStatus:
        """Read a status as subprocess writes it: >= 0 an exit code, < 0 minus the signal."""
        return cls(code=status) if status >= 0 else cls(signal=-status)

    def describe(self) -> str:
        """Return "exited with code 3", "killed by SIGKILL" or "ended, nobody saw how"."""
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return "ended, nobody saw how" if self.code is None else f"exited with code {self.code}"


class Child:
    """A process that the nursery forked for us; `pidfd` is the supervisor's, -1 once it has ended.

    `exit` is done when the process has ended and never fails. Await it with a bound through
    asyncio.wait: asyncio.wait_for would cancel it, and with it everybody else's view.
    """

    def __init__(self, *, name: str, pid: int, pidfd: int) -> None:
        self.name = name
        self.pid = pid
        self.pidfd = pidfd
        self.status: ExitStatus | None = None
        self.exit: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self._signals_sent: set[int] = set()

    def signal(self, number: int) -> bool:
        """Send a signal; False when the child has ended already."""
        if self.pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return False
        self._signals_sent.add(number)
        return True

    def describe(self) -> str:
        """Return the child and its fate for a human: "worker 3 (pid 812) killed by SIGKILL"."""
        if self.status is None:
            return f"{self.name} (pid {self.pid}) runs"
        # A kill that none of us sent is most often the kernel's answer to a lack of memory.
        foreign = self.status.signal == signal.SIGKILL and signal.SIGKILL not in self._signals_sent
        hint = " (possibly out of memory)" if foreign else ""
        return f"{self.name} (pid {self.pid}) {self.status.describe()}{hint}"

    def ended(self, status: ExitStatus) -> None:
        """Note the end and close the pidfd; called once, by the supervisor."""
        os.close(self.pidfd)
        self.pidfd = -1
        self.status = status
        if not self.exit.done():
            self.exit.set_result(status)


def collect_orphan(pidfd: int) -> ExitStatus:
    """Return how a child whose nursery is gone ended: known only where we are its new parent."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return ExitStatus()
    if result is None:
        return ExitStatus()
    status = result.si_status
    return ExitStatus(code=status) if result.si_code == os.CLD_EXITED else ExitStatus(signal=status)
