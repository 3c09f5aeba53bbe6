"""What `sterna inspect` tells of a model file, without loading it: sizes, types, and how it will be held."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..shm.errors import OutOfResources
from ..workers.checkpoint.formats import activation_kind, is_decoded_at_load
from ..workers.checkpoint.gguf import GgufFile
from .config import Activations, Config, Precision, Ternary
from .model_choice import UNLIMITED, Choices, ModelChoice, known_counts, wants_of, weights_nbytes
from .room import choose_budget, own_nbytes, read_room


def describe(
    path: Path,
    ternary: Ternary = "auto",
    activations: Activations = "auto",
    precision: Precision = "off",
) -> dict[str, Any]:
    """Return the facts about the file at `path` as plain values; bytes where a name ends in _bytes.

    Raises the errors of the file.
    """
    with GgufFile.open(path) as file:
        used = known_counts(Config(precision=precision), path)
        choice, fit = _choose(Choices(file, ternary, activations, precision, used))
        plan = choice.plan
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for tensor in file.tensors.values():
            counts[tensor.type.name] += 1
            sizes[tensor.type.name] += tensor.nbytes
        slow = {t.type.name for t in file.tensors.values() if is_decoded_at_load(t.type)}
        held = dict(plan.kinds)
        types = [
            {
                "type": name,
                "tensors": counts[name],
                "file_bytes": sizes[name],
                "held_as": held["F16"].name
                if name in slow
                else held[name].name
                if name in held
                else "as it is",
                "activations": activation_kind(held[name]).name if name in held else "FLOAT",
            }
            for name in sorted(counts, key=lambda name: -sizes[name])
        ]
        hyper = plan.hyper
        return {
            "path": str(path),
            "name": file.get("general.name", str, path.stem),
            "architecture": hyper.architecture,
            "layers": hyper.layers,
            "moe_layers": len(hyper.moe_layers),
            "experts": hyper.experts,
            "experts_used": hyper.experts_used,
            "d_model": hyper.d_model,
            "context_length": hyper.context_length,
            "vocab_size": plan.vocab_size,
            "file_bytes": path.stat().st_size,
            "types": types,
            "memory": {
                "expert_bytes": sum(count * nbytes for count, nbytes in plan.all_slots()),
                "dense_bytes": plan.dense_arena_nbytes,
                "weights_bytes": weights_nbytes(plan),
                "fit": fit,
            },
            "ternary": choice.ternary,
            "activations": choice.activations,
            **({"precision": choice.precision} if choice.precision else {}),
            "activation_error": None if choice.error is None else asdict(choice.error),
        }


def _choose(choices: Choices) -> tuple[ModelChoice, str]:
    """Return the choice for the memory there is now, and whether all experts fit into it."""
    wants = wants_of(Config())
    try:
        choice = choices.within(choose_budget(None, "auto", read_room(), own_nbytes()).nbytes, wants)
        return choice, choice.decision.why
    except OutOfResources as error:
        return choices.within(UNLIMITED, wants), str(error)
