"""What the daemon tells a scheduler when it has it forked. No numba: the daemon imports this."""

from __future__ import annotations

import hashlib
import os

import msgspec

from ..workers.checkpoint.file.split import parts_of
from ..workers.checkpoint.held.formats import Storage


class SchedulerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the scheduler is told when it is forked; `model_id` is that of the function below.

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
    """Return what tells whether a model is still the one that was opened.

    Of a file (device, inode, bytes, mtime ns); of a split model (device and inode of the first, bytes of all,
    a hash of each file's four), whichever of its files `path` names. Raises OSError where there is none.
    """
    status = os.stat(path)  # noqa: PTH116 - several of its fields
    each = [_file_id(status)]
    parts = parts_of(path)
    if len(parts) > 1:
        each = [_file_id(part.stat()) for part in parts if part.exists()]
    if len(each) == 1:
        return each[0]
    hashed = hashlib.blake2b(repr(each).encode(), digest_size=7)
    return *each[0][:2], sum(nbytes for _, _, nbytes, _ in each), int.from_bytes(hashed.digest(), "little")


def _file_id(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
