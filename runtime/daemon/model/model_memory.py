"""The memory of a served model: arenas, how many slots may be used, and the records of running streams.

It belongs to the daemon and outlives scheduler and workers. Only the methods of `ModelMemory` change it.
"""

from __future__ import annotations

import os

from ....scheduler.kv import StreamMemory
from ....shm.arena import Arena
from ....shm.slots import arena_nbytes
from ...memory.budget import SlotDecision
from .served_model import ServedModel


class ModelMemory:
    """Arenas "weights" (slots of experts), "dense" and "streams" (tokens, keys and values), until `close`."""

    def __init__(self, model: ServedModel) -> None:
        """Reserve the arenas; raises OutOfResources with the size that did not fit."""
        self._model = model
        self._decision = model.decision
        self._limits = [count for count, _ in model.slots]
        sizes = {
            "weights": arena_nbytes(model.slots),
            "dense": model.plan.dense_arena_nbytes,
            "streams": model.streams_shape.layout().nbytes,
        }
        self._arenas: dict[str, Arena] = {}
        try:
            for name, nbytes in sizes.items():
                self._arenas[name] = Arena.create(name, nbytes)
        except BaseException:
            self._close_arenas()
            raise
        self.streams = StreamMemory(model.streams_shape, self._arenas["streams"].bytes)
        self.streams.records["serial"] = -1

    def close(self) -> None:
        """Give the memory back."""
        self._close_arenas()

    def _close_arenas(self) -> None:
        for arena in self._arenas.values():
            arena.close()
        self._arenas.clear()

    @property
    def scheduler_fds(self) -> dict[str, int]:
        """Descriptors for the scheduler."""
        return {name: arena.fd for name, arena in self._arenas.items()}

    @property
    def worker_fds(self) -> dict[str, int]:
        """Descriptors for a worker."""
        files = {f"model.{index}": file.fileno() for index, file in enumerate(self._model.files)}
        return {"weights": self._arenas["weights"].fd, **files}

    # ---- slots ----

    @property
    def decision(self) -> SlotDecision:
        """How memory is spent now."""
        return self._decision

    @property
    def limits(self) -> list[int]:
        """How many slots of each class may be used now; a new scheduler is told the same."""
        return list(self._limits)

    @property
    def resident_share(self) -> float:
        """Share of the routed experts that there are slots for, 0 to 1."""
        return sum(self._limits) / max(1, self._model.plan.num_experts)

    def begin_resize(self, decision: SlotDecision) -> list[int]:
        """Note what is about to be given back, and return the limits to ask for.

        A scheduler that is started meanwhile must not use it. What is to be added counts when it is there.
        """
        limits = [count for count, _ in decision.classes]
        self._limits = [min(pair) for pair in zip(self._limits, limits, strict=True)]
        if decision.rows["slots"] <= self._decision.rows["slots"]:
            self._decision = decision
        return limits

    def resized(self, decision: SlotDecision) -> None:
        """Note that the slots are now used as `decision` says."""
        self._decision = decision
        self._limits = [count for count, _ in decision.classes]

    # ---- sizes ----

    @property
    def arena_nbytes_held(self) -> int:
        """Bytes of memory behind all arenas: what was given back is not among them."""
        return sum(os.fstat(arena.fd).st_blocks * 512 for arena in self._arenas.values())

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Size of each arena; "kv" is the part of the streams arena that holds keys and values."""
        shape = self._model.streams_shape
        kv = shape.layers * shape.layer_nbytes
        return {
            "arena": self._arenas["weights"].nbytes,
            "dense": self._arenas["dense"].nbytes,
            "kv": kv,
            "streams": self._arenas["streams"].nbytes - kv,
        }

    # ---- records of streams ----

    def put_prompt(self, stream: int, serial: int, token_ids: list[int]) -> None:
        """Write a new stream's prompt and record."""
        self.streams.tokens[stream, : len(token_ids)] = token_ids
        record = self.streams.records[stream]
        record["active"], record["serial"], record["computed"] = 1, serial, 0
        record["prompt_length"] = record["committed"] = len(token_ids)

    def commit(self, stream: int, computed: int, token: int | None) -> None:
        """Make one step of a stream count; `computed` tokens have their KV, `token` is the next."""
        record = self.streams.records[stream]
        record["computed"] = computed
        if token is not None and computed < self._model.context:
            self.streams.tokens[stream, computed] = token
            record["committed"] = computed + 1

    def lengths(self, stream: int) -> tuple[int, int]:
        """Return how many tokens of a stream are committed, and how many of them have their KV."""
        record = self.streams.records[stream]
        return int(record["committed"]), int(record["computed"])

    def release(self, stream: int) -> None:
        """Mark a record as free."""
        self.streams.records[stream]["active"] = 0
