"""How a model will be held in memory: the choices that the settings leave open, and why they fell so."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from ..scheduler.model.plan import ModelPlan
from ..scheduler.model.storage import MAX_RATIO, ActivationError, measure_activations
from ..shm.slots import arena_nbytes
from ..workers.checkpoint.formats import Storage
from ..workers.checkpoint.gguf import GgufFile
from .config import Activations, Ternary

# Of the available memory; the rest is for KV, activations and everybody else.
_WEIGHTS_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """A plan, and one line each on why ternary weights and activations are held as they are."""

    plan: ModelPlan
    ternary: str
    activations: str
    error: ActivationError | None


def weights_nbytes(plan: ModelPlan) -> int:
    """Return the bytes of both weight arenas when every expert has a slot."""
    return arena_nbytes(plan.all_slots()) + plan.dense_arena_nbytes


def choose(
    file: GgufFile, ternary: Ternary = "auto", activations: Activations = "auto", available: int | None = None
) -> ModelChoice:
    """Plan `file` as the settings say; "auto" is decided here.

    available: bytes of memory to fit into, by default what the system has. Raises ModelFileError.
    """
    error = measure_activations(file) if activations == "auto" else None
    per_token, activations_why = _per_token(activations, error)
    plan = ModelPlan.from_file(file, Storage(small=ternary == "1.6", per_token=per_token))
    why = f"{ternary} bits, as set"
    if ternary == "auto":
        room = int(_WEIGHTS_SHARE * (psutil.virtual_memory().available if available is None else available))
        needed, why = weights_nbytes(plan), "2 bits: fits in memory"
        if needed > room:
            small = ModelPlan.from_file(file, Storage(small=True, per_token=per_token))
            if weights_nbytes(small) < needed:
                plan = small
                why = f"1.6 bits: {needed / 2**30:.1f} GiB at 2 bits, {room / 2**30:.1f} GiB to be had"
    return ModelChoice(plan=plan, ternary=why, activations=activations_why, error=error)


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
