"""The model that a daemon serves, as its file and the settings make it. Nothing in it changes.

Not in here: its memory and what is written there (`model_memory.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from ....scheduler.kv import StreamShape
from ....scheduler.messages import Pooling
from ....scheduler.model.plan import ModelPlan
from ....scheduler.pooling import FILE_POOLINGS
from ....scheduler.spec import model_id
from ....shm.errors import BadRequest, OutOfResources
from ....workers.checkpoint.file.gguf import GgufFile
from ...chat.template import ChatTemplate, token_texts
from ...config import Config, embedded_model
from ...memory.budget import SlotDecision, Wants, decide
from ...memory.choice import ModelChoice, choose, known_counts, wants_of
from ...memory.room import Budget, choose_budget, own_nbytes, read_room
from ...protocol.messages import ModelFacts
from ...sizes import format_size
from ...text.tokenizer import Tokenizer

log = logging.getLogger("sterna.model")

# A prompt of this length is tokenized in any case, in 50 ms: the error can then say how many tokens it has.
MIN_PROMPT_CHARS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A checked file and what was decided about it at the start. Made by `load`, ended by `close`."""

    path: Path
    """The file that was named."""
    paths: tuple[str, ...]
    """Its file, or all parts of a split model in their order."""
    id: tuple[int, int, int, int]
    """Tells whether the file is still the one that was opened; see `scheduler.spec.model_id`."""
    files: tuple[FileIO, ...]
    """`paths`, open for reading."""
    plan: ModelPlan
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    facts: ModelFacts
    """What a client is told."""
    pooling_type: int
    """What the file says on pooling, as it says it."""
    max_prompt_chars: int
    """A longer text has more tokens than the context."""
    budget: Budget
    """The memory that may be used."""
    wants: Wants
    """What the settings ask of memory, completed by what was decided."""
    decision: SlotDecision
    """How memory is spent at the start."""
    largest_read: int
    """Bytes of the largest expert in the file."""

    @classmethod
    def load(cls, config: Config) -> ServedModel:
        """Open the model that the settings name and decide how it is held.

        Raises the errors of the file, ConfigError for a setting that the file forbids, or OutOfResources when
        the budget is too small.
        """
        path = config.model or embedded_model()
        budget = choose_budget(config.memory_nbytes, config.preset, read_room(), own_nbytes())
        wants = wants_of(config)
        with GgufFile.open(path) as file:
            choice = choose(
                file, budget.nbytes, wants, config.ternary, config.activations, config.precision,
                known_counts(config, path),
            )  # fmt: skip
            _log_choice(choice, budget)
            tokenizer = Tokenizer.from_metadata(file.metadata, str(path))
            context = choice.decision.streams.context
            architecture = choice.plan.hyper.architecture
            return cls(
                path=path,
                paths=tuple(file.paths),
                id=model_id(str(path)),
                plan=choice.plan,
                tokenizer=tokenizer,
                chat_template=ChatTemplate.from_metadata(
                    file.metadata, tokens=token_texts(tokenizer), source=str(path), context=context
                ),
                facts=ModelFacts(
                    name=file.get("general.name", str, Path(path).stem),
                    path=str(path),
                    architecture=architecture,
                    context_length=context,
                    vocab_size=choice.plan.vocab_size,
                ),
                pooling_type=file.get(f"{architecture}.pooling_type", int, 0),
                max_prompt_chars=max(MIN_PROMPT_CHARS, context * _longest_piece(tokenizer)),
                budget=budget,
                wants=choice.decision.settled(wants),
                decision=choice.decision,
                largest_read=choice.largest_read,
                files=tuple(FileIO(part) for part in file.paths),  # last: what raises leaves none open
            )

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.streams_shape.context

    @property
    def streams_shape(self) -> StreamShape:
        """How many streams there can be, and how long."""
        return self.decision.streams

    @property
    def slots(self) -> list[tuple[int, int]]:
        """Slot classes of the expert arena: (number, bytes of one)."""
        return self.decision.classes

    @property
    def default_pooling(self) -> Pooling:
        """How the file says that a prompt's hidden states are pooled, "last" where it says nothing.

        Raises BadRequest for what makes no vector (4: a score for ranking), or is unknown.
        """
        if self.pooling_type not in FILE_POOLINGS:
            raise BadRequest(
                f"pooling: {self.path} says {self.pooling_type} (pooling_type), which makes no embedding; "
                "ask for mean, cls or last"
            )
        return FILE_POOLINGS[self.pooling_type]

    def plan_resize(self, nbytes: int) -> SlotDecision:
        """Return how a budget of `nbytes` is spent from now on: slots change, streams stay.

        Raises OutOfResources when it is too small, or larger than the slots made at the start can use.
        """
        if nbytes > self.budget.nbytes and not self.decision.fits_all:
            raise OutOfResources(
                f"memory is {format_size(nbytes)}, but slots were made for {format_size(self.budget.nbytes)} "
                f"({self.budget.nbytes} bytes) at the start; start again with more"
            )
        return decide(self.plan, self.wants, nbytes, self.largest_read, at_most=self.slots)

    def close(self) -> None:
        """Close the files and end the process that renders chat templates."""
        if self.chat_template is not None:
            self.chat_template.close()
        for file in self.files:
            file.close()


def _longest_piece(tokenizer: Tokenizer) -> int:
    """Return the characters of the longest piece: no token stands for more text."""
    return max(len(tokenizer.id_to_piece(token)) for token in range(tokenizer.vocab_size))


def _log_choice(choice: ModelChoice, budget: Budget) -> None:
    decision = choice.decision
    log.info("model.held ternary=%r activations=%r", choice.ternary, choice.activations)
    if choice.plan.assignment:
        log.info("model.precision experts=%r", choice.precision)
    elif choice.precision:
        log.warning("model.precision_unused why=%r", choice.precision)
    for note in decision.notes:
        log.warning("memory.short %s", note)
    log.info(
        "memory.planned budget=%r why=%r slots=%d experts=%d used=%r",
        format_size(budget.nbytes), f"{budget.why}; {decision.why}", decision.num_slots,
        decision.num_experts, format_size(decision.total),
    )  # fmt: skip
