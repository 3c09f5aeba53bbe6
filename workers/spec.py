"""What the daemon tells a worker when it has it forked. No numba: the daemon imports this."""

from __future__ import annotations

import msgspec


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker is told when it is forked."""

    index: int
    generation: int
    lane_url: str
    num_slots: int
    slot_nbytes: int
