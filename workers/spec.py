"""What the daemon tells a worker when it has it forked. No numba: the daemon imports this."""

from __future__ import annotations

import msgspec


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker is told when it is forked."""

    index: int
    incarnation: int
    """The number of this start: no other start of a process of the same engine has it."""
    lane_url: str
    """Where its scheduler listens."""
    slots: list[tuple[int, int]]
    """The classes of the weights arena, see `shm.slots`."""
    model_path: str
    """Of the model's first file."""
    model_id: tuple[int, int, int, int]
    """As the scheduler's; names the checksums in the cache."""
    cache_dir: str
    """Folder of the user's cache, "" for none."""
    io_threads: int = 0
    """Threads that read experts; 0 is measured."""
    log_level: str = "info"
