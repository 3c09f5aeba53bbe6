"""What the daemon tells a worker when it has it forked. No numba: the daemon imports this."""

from __future__ import annotations

import msgspec


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker is told when it is forked; `slots` are the classes of the arena, see `shm.slots`.

    model_path: of its first file; model_id: as SchedulerSpec's; cache_dir: folder of the user's cache, "" for
    none; io_threads: 0 is measured.
    """

    index: int
    generation: int
    lane_url: str
    slots: list[tuple[int, int]]
    model_path: str
    model_id: tuple[int, int, int, int]
    cache_dir: str
    io_threads: int = 0
