"""The model as the daemon holds it: checked file, tokenizer, plan, and the arenas it owns."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..scheduler.kv import StreamMemory, StreamShape
from ..scheduler.spec import model_id
from ..shm.arena import Arena
from ..shm.errors import ConfigError
from ..shm.slots import arena_nbytes
from ..workers.checkpoint.gguf import GgufFile
from .config import Config, embedded_model
from .messages import ModelFacts
from .model_choice import choose
from .tokenizer import Tokenizer

log = logging.getLogger("sterna.model")

MAX_DEFAULT_CONTEXT = 4096
# So much is tokenized in any case, in 50 ms, so that the error can say how many tokens it is.
MIN_PROMPT_CHARS = 65_536


class LoadedModel:
    """Everything about one model that outlives scheduler and workers.

    Opening raises the errors of the file, or OutOfResources when the arenas do not fit in memory.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.model or embedded_model()
        with GgufFile.open(self.path) as file:
            self.id = model_id(str(self.path))
            choice = choose(file, config.ternary, config.activations)
            self.plan = choice.plan
            log.info("model.held ternary=%r activations=%r", choice.ternary, choice.activations)
            self.tokenizer = Tokenizer.from_metadata(file.metadata, str(self.path))
            name = file.get("general.name", str, Path(self.path).stem)
        longest = self.plan.hyper.context_length
        if config.ctx_size > longest:
            raise ConfigError(
                f"ctx_size is {config.ctx_size}; {self.path} was made for {longest} tokens at most"
            )
        self.context = config.ctx_size or min(MAX_DEFAULT_CONTEXT, longest)
        # No token stands for more text than its piece has characters.
        longest_piece = max(len(self.tokenizer.id_to_piece(i)) for i in range(self.tokenizer.vocab_size))
        self.max_prompt_chars = max(MIN_PROMPT_CHARS, self.context * longest_piece)
        self.slots = self.plan.all_slots()
        self.streams_shape = StreamShape(
            layers=self.plan.hyper.layers,
            width=self.plan.hyper.cache_width,
            streams=config.max_num_seqs,
            context=self.context,
        )
        self.facts = ModelFacts(
            name=name,
            path=str(self.path),
            architecture=self.plan.hyper.architecture,
            context_length=self.context,
            vocab_size=self.plan.vocab_size,
        )
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._arenas: dict[str, Arena] = {}

    def allocate(self) -> None:
        """Reserve the arenas; raises OutOfResources with the size that did not fit."""
        sizes = {
            "weights": arena_nbytes(self.slots),
            "dense": self.plan.dense_arena_nbytes,
            "streams": self.streams_shape.layout().nbytes,
        }
        for name, nbytes in sizes.items():
            self._arenas[name] = Arena.create(name, nbytes)
        self.streams = StreamMemory(self.streams_shape, self._arenas["streams"].bytes)
        self.streams.records["serial"] = -1

    @property
    def scheduler_fds(self) -> dict[str, int]:
        """Descriptors for the scheduler."""
        return {name: arena.fd for name, arena in self._arenas.items()}

    @property
    def worker_fds(self) -> dict[str, int]:
        """Descriptors for a worker."""
        return {"weights": self._arenas["weights"].fd, "model": self.fd}

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Size of each arena; "kv" is the part of the streams arena that holds keys and values."""
        kv = self.streams_shape.layers * self.streams_shape.layer_nbytes
        return {
            "arena": self._arenas["weights"].nbytes,
            "dense": self._arenas["dense"].nbytes,
            "kv": kv,
            "streams": self._arenas["streams"].nbytes - kv,
        }

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
        if token is not None and computed < self.context:
            self.streams.tokens[stream, computed] = token
            record["committed"] = computed + 1

    def release(self, stream: int) -> None:
        """Mark a record as free."""
        self.streams.records[stream]["active"] = 0

    def close(self) -> None:
        """Give memory and file back."""
        for arena in self._arenas.values():
            arena.close()
        self._arenas.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
