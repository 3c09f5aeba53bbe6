"""What `sterna inspect` and `sterna validate` tell of a model without loading it, from its header alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...scheduler.model.plan import ModelPlan
from ...shm.errors import ModelFileError, OutOfResources
from ...workers.checkpoint.file.gguf import GgufArray, GgufFile, TensorInfo
from ...workers.checkpoint.held.formats import activation_kind, is_decoded_at_load
from ..chat.template import describe_templates
from ..config import Activations, Config, Precision, Ternary
from ..memory.choice import UNLIMITED, Choices, ModelChoice, known_counts, wants_of, weights_nbytes
from ..memory.room import choose_budget, own_nbytes, read_room
from .check import Examined, examine, text_warnings
from .groups import groups, unused_names
from .slow_types import slow_types


def describe(
    path: Path,
    ternary: Ternary = "auto",
    activations: Activations = "auto",
    precision: Precision = "off",
) -> dict[str, Any]:
    """Return the facts about the model at `path` as plain values; bytes where a name ends in _bytes.

    Also of one that cannot be run: "problems" says why. Raises the errors of a file that cannot be read.
    """
    with GgufFile.open(path) as file:
        found = examine(file)
        choice, fit = None, ""
        if found.plan is not None:
            used = known_counts(Config(precision=precision), path)
            choice, fit = _choose(Choices(file, ternary, activations, precision, used))
        plan = None if choice is None else choice.plan
        decision = None if choice is None else choice.decision
        facts = {
            "path": str(path),
            **({"files": [Path(each).name for each in file.paths]} if len(file.paths) > 1 else {}),
            "name": _text(file, "general.name") or path.stem,
            "architecture": _text(file, "general.architecture"),
            "runs": not found.problems,
            "problems": list(found.problems),
            "slow": [] if plan is None else slow_types(file, found.used, plan),
            "notes": _notes(found, _unused(file, found)),
            **_sizes(file, plan),
            "hyperparameters": _hyperparameters(file),
            "tokenizer": _tokenizer(file),
            "groups": groups(file, found.used, plan, decision),
            "types": _types(file.tensors.values(), plan),
        }
        return facts if choice is None else {**facts, **_held(choice, fit)}


def validate(path: Path) -> dict[str, Any]:
    """Return whether the model at `path` can be loaded, and all that is against it, as plain values.

    Memory is a warning: it may be another machine that runs it. Raises the errors of a file that is not there
    or cannot be read; one that is broken is an answer.
    """
    try:
        file = GgufFile.open(path)
    except ModelFileError as error:
        return {"path": str(path), "loads": False, "problems": [str(error)], "warnings": [], "notes": []}
    with file:
        found = examine(file)
        unused = _unused(file, found)
        return {
            "path": str(path),
            "loads": not found.problems,
            "architecture": _text(file, "general.architecture"),
            "file_bytes": file.size_bytes,
            "problems": list(found.problems),
            "warnings": [] if found.problems else [*text_warnings(file), *_warnings(file)],
            "notes": _notes(found, unused),
            "unused": unused,
        }


def _warnings(file: GgufFile) -> list[str]:
    budget = choose_budget(None, "auto", read_room(), own_nbytes()).nbytes
    try:
        decision = Choices(file, activations="block").within(budget, wants_of(Config())).decision
    except OutOfResources as error:
        return [str(error)]
    notes = list(decision.notes)
    if not decision.fits_all:
        notes.append(f"{decision.num_slots} of {decision.num_experts} experts fit in memory: {decision.why}")
    return notes


def _unused(file: GgufFile, found: Examined) -> list[str]:
    """Return the tensors that are left aside, none if there is no plan that could take them."""
    return [name for name in file.tensors if found.plan is not None and name not in found.used]


def _notes(found: Examined, unused: list[str]) -> list[str]:
    return [unused_names(unused, found.plan.hyper.layers)] if found.plan is not None and unused else []


def _text(file: GgufFile, key: str) -> str:
    """Return a string of the metadata, "" for none or something else: what is told must not fail on it."""
    value = file.metadata.get(key)
    return value if isinstance(value, str) else ""


def _sizes(file: GgufFile, plan: ModelPlan | None) -> dict[str, Any]:
    """Return how large the model is."""
    weights = sum(math.prod(info.shape) for info in file.tensors.values())
    nbytes = sum(info.nbytes for info in file.tensors.values())
    sizes = {
        "parameters": weights,
        "bits_per_weight": round(8 * nbytes / max(1, weights), 3),
        "file_bytes": file.size_bytes,
    }
    if plan is None:
        return sizes
    hyper = plan.hyper
    return {
        **sizes,
        "layers": hyper.layers,
        "moe_layers": len(hyper.moe_layers),
        "experts": hyper.experts,
        "experts_used": hyper.experts_used,
        "d_model": hyper.d_model,
        "context_length": hyper.context_length,
        "vocab_size": plan.vocab_size,
    }


def _hyperparameters(file: GgufFile) -> dict[str, Any]:
    """Return the architecture's own keys; of an array only its length."""
    prefix = f"{_text(file, 'general.architecture')}."
    return {key.removeprefix(prefix): _shown(file, key) for key in file.metadata if key.startswith(prefix)}


def _tokenizer(file: GgufFile) -> dict[str, Any]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return {
        "model": _text(file, "tokenizer.ggml.model"),
        "pre": _text(file, "tokenizer.ggml.pre"),
        "tokens": len(tokens) if isinstance(tokens, GgufArray) else 0,
        "chat_template": _templates(file),
    }


def _templates(file: GgufFile) -> str:
    """Return which chat templates there are, or what is wrong with their keys."""
    try:
        return describe_templates(file.metadata, file.label)
    except ModelFileError as error:
        return str(error)


def _shown(file: GgufFile, key: str) -> object:
    value = file.metadata[key]
    return f"{len(value)} values" if isinstance(value, GgufArray) else value


def _types(tensors: Iterable[TensorInfo], plan: ModelPlan | None) -> list[dict[str, Any]]:
    """Return for each type how much is stored in it, and how its matrices are held, largest first."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    slow = set()
    for tensor in tensors:
        counts[tensor.type.name] += 1
        sizes[tensor.type.name] += tensor.nbytes
        if is_decoded_at_load(tensor.type):
            slow.add(tensor.type.name)
    held = {} if plan is None else dict(plan.matrix_types)
    rows = []
    for name, nbytes in sizes.most_common():
        row: dict[str, Any] = {"type": name, "tensors": counts[name], "file_bytes": nbytes}
        form = held.get("F16") if name in slow else held.get(name)
        if plan is not None:
            row["held_as"] = "as it is" if form is None else form.name
            row["activations"] = "FLOAT" if form is None else activation_kind(form).name
        rows.append(row)
    return rows


def _held(choice: ModelChoice, fit: str) -> dict[str, Any]:
    """Return how a model that can be run would be held in memory."""
    plan = choice.plan
    return {
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
