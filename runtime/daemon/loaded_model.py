"""The model as the daemon holds it: checked file, tokenizer, plan, and the arenas it owns."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ...scheduler.kv import StreamMemory
from ...scheduler.messages import Pooling
from ...scheduler.pooling import FILE_POOLINGS
from ...scheduler.spec import model_id
from ...shm.arena import Arena
from ...shm.errors import BadRequest, OutOfResources
from ...shm.slots import arena_nbytes
from ...workers.checkpoint.file.gguf import GgufFile
from ..chat.template import ChatTemplate, token_texts
from ..config import Config, embedded_model
from ..memory.budget import SlotDecision, decide
from ..memory.choice import choose, known_counts, wants_of
from ..memory.room import choose_budget, own_nbytes, read_room
from ..protocol.messages import ModelFacts
from ..sizes import format_size
from ..text.tokenizer import Tokenizer

log = logging.getLogger("sterna.model")

# So much is tokenized in any case, in 50 ms, so that the error can say how many tokens it is.
MIN_PROMPT_CHARS = 65_536


class LoadedModel:
    """Everything about one model that outlives scheduler and workers.

    paths: `path`, or of all parts of a split model in their order; decision: how memory is spent now;
    slots: the classes that the arena was made with; limits: how many of each may be used. Opening raises the
    errors of the file, ConfigError for a setting that the file forbids, or OutOfResources when the budget is
    too small.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.model or embedded_model()
        with GgufFile.open(self.path) as file:
            self.id = model_id(str(self.path))
            self.budget = choose_budget(config.memory_nbytes, config.preset, read_room(), own_nbytes())
            wants = wants_of(config)
            counts = known_counts(config, self.path)
            choice = choose(
                file,
                self.budget.nbytes,
                wants,
                config.ternary,
                config.activations,
                config.precision,
                counts,
            )
            self.plan, self.largest_read = choice.plan, choice.largest_read
            self.decision = self._at_start = choice.decision
            self.wants = self.decision.settled(wants)
            log.info("model.held ternary=%r activations=%r", choice.ternary, choice.activations)
            if choice.precision:
                log.info("model.precision experts=%r", choice.precision)
            self.tokenizer = Tokenizer.from_metadata(file.metadata, str(self.path))
            self.chat_template = ChatTemplate.from_metadata(
                file.metadata,
                tokens=token_texts(self.tokenizer),
                source=str(self.path),
                context=self.decision.streams.context,
            )
            name = file.get("general.name", str, Path(self.path).stem)
            self.paths = file.paths
            self._pooling_type = file.get(f"{self.plan.hyper.architecture}.pooling_type", int, 0)
        self._log_decision()
        self.streams_shape = self.decision.streams
        self.context = self.streams_shape.context
        # No token stands for more text than its piece has characters.
        longest_piece = max(len(self.tokenizer.id_to_piece(i)) for i in range(self.tokenizer.vocab_size))
        self.max_prompt_chars = max(MIN_PROMPT_CHARS, self.context * longest_piece)
        self.slots = self.decision.classes
        self.limits = [count for count, _ in self.slots]
        self.facts = ModelFacts(
            name=name,
            path=str(self.path),
            architecture=self.plan.hyper.architecture,
            context_length=self.context,
            vocab_size=self.plan.vocab_size,
        )
        self._fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in self.paths]
        self._arenas: dict[str, Arena] = {}

    def _log_decision(self) -> None:
        decision = self.decision
        for note in decision.notes:
            log.warning("memory.short %s", note)
        log.info(
            "memory.planned budget=%r why=%r slots=%d experts=%d used=%r",
            format_size(self.budget.nbytes), f"{self.budget.why}; {decision.why}", decision.num_slots,
            decision.num_experts, format_size(decision.total),
        )  # fmt: skip

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
        files = {f"model.{index}": fd for index, fd in enumerate(self._fds)}
        return {"weights": self._arenas["weights"].fd, **files}

    def plan_resize(self, nbytes: int) -> SlotDecision:
        """Return how a budget of `nbytes` is spent from now on: slots change, streams stay.

        Raises OutOfResources when it is too small, or larger than the slots made at the start can use.
        """
        if nbytes > self.budget.nbytes and not self._at_start.fits_all:
            raise OutOfResources(
                f"memory is {format_size(nbytes)}, but slots were made for {format_size(self.budget.nbytes)} "
                f"({self.budget.nbytes} bytes) at the start; start anew with more"
            )
        return decide(self.plan, self.wants, nbytes, self.largest_read, at_most=self.slots)

    def resized(self, decision: SlotDecision) -> None:
        """Note that the slots are now used as `decision` says; a new scheduler is told the same."""
        self.decision = decision
        self.limits = [count for count, _ in decision.classes]

    @property
    def arena_nbytes_held(self) -> int:
        """Bytes of memory behind all arenas: what was given back is not among them."""
        return sum(os.fstat(arena.fd).st_blocks * 512 for arena in self._arenas.values())

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

    @property
    def default_pooling(self) -> Pooling:
        """How the file says that a prompt's hidden states are pooled, "last" where it says nothing.

        Raises BadRequest for what makes no vector (4: a score for ranking), or is unknown.
        """
        if self._pooling_type not in FILE_POOLINGS:
            raise BadRequest(
                f"pooling: {self.path} says {self._pooling_type} (pooling_type), which makes no embedding; "
                "ask for mean, cls or last"
            )
        return FILE_POOLINGS[self._pooling_type]

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
        """Give memory and files back."""
        if self.chat_template is not None:
            self.chat_template.close()
        for arena in self._arenas.values():
            arena.close()
        self._arenas.clear()
        while self._fds:
            os.close(self._fds.pop())
