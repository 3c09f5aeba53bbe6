"""How a model will be held in memory: the choices that the settings leave open, and why they fell so."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from ...scheduler.model.plan import ModelPlan
from ...scheduler.model.planner import read_plan
from ...scheduler.model.storage import MAX_RATIO, ActivationError, measure_activations
from ...scheduler.residency.precision.plan import preset_precisions
from ...scheduler.residency.saved_counts import read_counts
from ...scheduler.spec import model_id
from ...shm.errors import ConfigError, OutOfResources
from ...shm.slots import arena_nbytes
from ...workers.checkpoint.file.gguf import GgufFile
from ...workers.checkpoint.held.formats import DEFAULT_STORAGE, TERNARY, Storage
from ...workers.user_cache import user_cache
from ..config import Activations, Config, Precision, Ternary
from ..sizes import format_given, format_size
from .budget import SlotDecision, Wants, decide
from .precisions import assign, can_convert

UNLIMITED = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """A plan, how memory is spent on it, and how weights and activations are held."""

    plan: ModelPlan
    decision: SlotDecision
    ternary: str
    """One line on how ternary weights are held."""
    activations: str
    """One line on how activations are quantised."""
    error: ActivationError | None
    largest_read: int
    """Bytes of the largest expert in the file."""
    precision: str = ""
    """One line on experts held in fewer bits than the file has; "" if that was not asked for."""


def default_workers() -> int:
    """Return the number of workers for this machine: physical cores minus one, at least one."""
    return max(1, (psutil.cpu_count(logical=False) or 1) - 1)


def wants_of(config: Config) -> Wants:
    """Return what the settings ask of memory on this machine."""
    return Wants(
        workers=config.workers or default_workers(),
        threads=config.threads or len(os.sched_getaffinity(0)),
        max_batch_tokens=config.max_batch_tokens,
        streams=config.max_num_seqs,
        context=config.ctx_size,
        resident=config.resident_experts,
        value_nbytes=4 if config.cache_type == "f32" else 2,
        local=config.lane == "local",
    )


def weights_nbytes(plan: ModelPlan) -> int:
    """Return the bytes of both weight arenas when every expert has a slot."""
    return arena_nbytes(plan.all_slots()) + plan.dense_arena_nbytes


def read_nbytes(file: GgufFile, plan: ModelPlan) -> dict[int, int]:
    """Return for each layer how many bytes of the file one of its experts is."""
    return {
        layer: sum(slab.nbytes for slab in plan.expert_page(file, layer, 0, 0).slabs)
        for layer in plan.hyper.moe_layers
    }


class Choices:
    """What can be chosen for one open file; each plan is made at most once, the file stays the caller's.

    ternary, activations, precision: as the settings say, "auto" is decided here; counts: how often each
    expert was used, if that is known: see `residency.saved_counts`.
    """

    def __init__(
        self,
        file: GgufFile,
        ternary: Ternary = "auto",
        activations: Activations = "auto",
        precision: Precision = "off",
        counts: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Raises ModelFileError."""
        self._file = file
        self._ternary = ternary
        self._precision = precision
        self._counts = counts
        self._plain = read_plan(file)  # first: what is measured next relies on its shapes
        self._error = measure_activations(file) if activations == "auto" else None
        self._per_token, self._activations_why = _per_token(activations, self._error)
        self._plans: dict[bool, ModelPlan] = {}
        self.reads = read_nbytes(file, self._plan(small=ternary == "1.6"))
        """Bytes in the file of one expert of each layer."""

    def _plan(self, *, small: bool) -> ModelPlan:
        if small not in self._plans:
            storage = Storage(small=small, per_token=self._per_token)
            plan = self._plain if storage == DEFAULT_STORAGE else read_plan(self._file, storage)
            if self._precision != "off":
                several = read_plan(self._file, storage, preset_precisions(self._precision))
                plan = several if can_convert(several) else plan
            self._plans[small] = plan
        return self._plans[small]

    def _decide(
        self, plan: ModelPlan, wants: Wants, budget: int, largest: int
    ) -> tuple[ModelPlan, SlotDecision]:
        """Return `decide`'s answer, and the plan with the precisions of experts if it has several."""
        if len(plan.precisions) == 1:
            return plan, decide(plan, wants, budget, largest)
        return assign(plan, self._precision, self._counts, wants, budget, largest)

    def _precision_why(self, plan: ModelPlan) -> str:
        if self._precision == "off":
            return ""
        if not plan.assignment:
            return f"{self._precision} changes nothing: experts are ternary or no larger in the file"
        held = ", ".join(f"{name} {count}" for name, (count, _) in plan.by_precision().items() if count)
        why = "by counts of use" if self._counts is not None else "without counts of use"
        return f"{self._precision}, {why}: {held}"

    def within(self, budget: int, wants: Wants) -> ModelChoice:
        """Return what fits into `budget` bytes best.

        Raises OutOfResources or ConfigError as `decide` does, and ConfigError for a context that the model
        was not made for.
        """
        plan = self._plan(small=self._ternary == "1.6")
        longest = plan.hyper.context_length
        if wants.context > longest:
            raise ConfigError(
                f"ctx_size is {wants.context}; {self._file.label} was made for {longest} tokens at most"
            )
        largest = max(self.reads.values(), default=0)
        if self._ternary != "auto":
            plan, decision = self._decide(plan, wants, budget, largest)
            why = f"{self._ternary} bits, as set"
        else:
            plan, decision, why = self._by_size(budget, wants, largest)
        if not any(form in TERNARY for _, form in plan.matrix_types):
            why = "no ternary weights"
        return ModelChoice(
            plan=plan,
            decision=decision,
            ternary=why,
            activations=self._activations_why,
            error=self._error,
            largest_read=largest,
            precision=self._precision_why(plan),
        )

    def _by_size(self, budget: int, wants: Wants, largest: int) -> tuple[ModelPlan, SlotDecision, str]:
        """Take 2 bits where everything fits, else 1.6, with which more experts fit; and say why."""
        wide = held = self._plan(small=False)
        refusal = decision = None
        try:
            held, decision = self._decide(wide, wants, budget, largest)
        except OutOfResources as error:
            refusal = error
        if decision is not None and decision.fits_all:
            return held, decision, "2 bits: fits in memory"
        small = self._plan(small=True)
        needed = weights_nbytes(wide)
        if weights_nbytes(small) < needed:
            why = f"1.6 bits: {format_size(needed)} at 2 bits do not fit in {format_given(budget)}"
            return *self._decide(small, wants, budget, largest), why
        if decision is None:
            raise refusal or OutOfResources("no plan fits")
        return held, decision, f"2 bits: {decision.why}"


def choose(
    file: GgufFile,
    budget: int,
    wants: Wants,
    ternary: Ternary = "auto",
    activations: Activations = "auto",
    precision: Precision = "off",
    counts: npt.NDArray[np.float64] | None = None,
) -> ModelChoice:
    """Plan `file` as the settings say within `budget` bytes; raises what `Choices` does."""
    return Choices(file, ternary, activations, precision, counts).within(budget, wants)


def known_counts(config: Config, path: Path) -> npt.NDArray[np.float64] | None:
    """Return how often each expert of the model at `path` was used, if that is asked for and known."""
    return None if config.precision == "off" else read_counts(str(user_cache()), model_id(str(path)))


def _per_token(setting: Activations, error: ActivationError | None) -> tuple[bool, str]:
    if setting != "auto":
        return setting == "token", f"one scale per {setting}, as set"
    if error is None:
        return False, "one scale per block: no ternary weights with row scales"
    kept = "token" if error.per_token else "block"
    return error.per_token, (
        f"one scale per {kept}: NMSE {error.token:.2e} per token, {error.block:.2e} per block of 256 "
        f"(at most {MAX_RATIO:g} times is taken; {error.matrices} matrices measured)"
    )
