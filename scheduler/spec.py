"""What the daemon tells a scheduler when it has it forked. No numba: the daemon imports this."""

from __future__ import annotations

import hashlib
import os
from typing import Literal

import msgspec

from ..workers.checkpoint.file.split import parts_of
from ..workers.checkpoint.held.formats import Storage


class SchedulerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the scheduler is told when it is forked."""

    generation: int
    """1 for the first scheduler of a daemon, 2 for its successor, and so on."""
    model_path: str
    model_id: tuple[int, int, int, int]
    """What `model_id` below said of that file when the daemon opened it."""
    control_url: str
    """Where the daemon listens for its scheduler."""
    lane: Literal["zmq", "local"] = "zmq"
    """How batches reach the workers; "local": they are computed in the scheduler process itself."""
    lane_url: str
    """Where the scheduler listens for its workers."""
    workers: int
    slots: list[tuple[int, int]]
    """The classes of the weights arena, see `shm.slots`."""
    limits: list[int]
    """How many slots of each class may be used."""
    cache_dir: str
    """Folder of the user's cache, "" for none."""
    context: int
    streams: int
    max_batch_tokens: int
    threads: int
    """For dense layers; 0 is one per core."""
    storage: Storage
    value_nbytes: int
    """Of a value in the cache of keys and values."""
    precisions: list[str]
    """As of `ModelPlan`, like `assignment`: a successor finds the experts as it would hold them."""
    assignment: list[int]
    prefetch: str
    trace: str = ""
    """A file to record routing in, "" for none."""
    step_timeout_s: float
    start_timeout_s: float
    log_level: str = "info"


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
