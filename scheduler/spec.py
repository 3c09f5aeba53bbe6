"""What the daemon tells a scheduler when it has it forked. No numba: the daemon imports this."""

from __future__ import annotations

import os

import msgspec

from ..workers.checkpoint.formats import Storage


class SchedulerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the scheduler is told when it is forked; `model_id` is (device, inode, bytes, mtime ns).

    limits: how many slots of each class to use; trace: a file to record routing in, "" for none.
    value_nbytes: of a value in the cache; precisions, assignment: as of `ModelPlan`: a successor finds
    the experts as it would hold them.
    """

    generation: int
    model_path: str
    model_id: tuple[int, int, int, int]
    control_url: str
    lane_url: str
    workers: int
    slots: list[tuple[int, int]]
    limits: list[int]
    cache_dir: str
    context: int
    streams: int
    max_batch_tokens: int
    threads: int
    storage: Storage
    value_nbytes: int
    precisions: list[str]
    assignment: list[int]
    prefetch: str
    trace: str = ""
    step_timeout_s: float
    start_timeout_s: float


def model_id(path: str) -> tuple[int, int, int, int]:
    """Return what tells whether a file is still the one that was opened."""
    status = os.stat(path)  # noqa: PTH116 - three of its fields
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
