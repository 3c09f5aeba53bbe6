"""What the tensors of a model are for, by their names, and what becomes of each group. No tensor is read."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Set
from typing import Any, Final

from ...scheduler.model.plan import ModelPlan
from ...workers.checkpoint.file.gguf import GgufFile, TensorInfo
from ...workers.checkpoint.held.formats import Format
from ..memory.budget import SlotDecision

EXPERTS: Final = "experts"
IGNORED: Final = "ignored"

# The first that is found in a name without its layer counts; GGUF's names, then those of Hugging Face.
_GROUPS: Final = (
    ("embedding", r"^(token_embd|model\.embed_tokens)"),
    ("head", r"^(output\.|lm_head)"),
    ("next-token prediction", r"nextn|eh_proj|enorm|hnorm|shared_head"),
    ("norms", r"norm"),
    ("shared experts", r"shexp|shared_expert"),
    ("router", r"ffn_gate_inp|exp_probs_b|mlp\.gate\.|mlp\.router"),
    (EXPERTS, r"_exps|ffn_(gate|up|down)\.[0-9]+\.|experts\."),
    ("attention", r"attn|rope"),
    ("dense FFN", r"ffn_|mlp\."),
)
_LAYER: Final = re.compile(r"^(blk|model\.layers)\.([0-9]+)\.")


def group_of(name: str) -> str:
    """Return the group of a tensor: "embedding", "attention", "experts", ..., "other"."""
    short = _LAYER.sub("", name)
    return next((group for group, pattern in _GROUPS if re.search(pattern, short)), "other")


def layer_of(name: str) -> int | None:
    """Return the layer in a tensor's name."""
    found = _LAYER.match(name)
    return None if found is None else int(found[2])


def groups(
    file: GgufFile, used: Set[str], plan: ModelPlan | None, decision: SlotDecision | None
) -> list[dict[str, Any]]:
    """Return a row for each group of tensors, in the order of the table above; bytes where a name ends so.

    used: the tensors that the plan takes; the others are a group of their own. Without a plan nothing is
    said of memory.
    """
    members: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in file.tensors.values():
        own = plan is None or info.name in used
        members[group_of(info.name) if own else IGNORED].append(info)
    held = {} if plan is None else _held(plan)
    order = [*(group for group, _ in _GROUPS), "other", IGNORED]
    rows = []
    for group in sorted({*members, *held}, key=order.index):
        forms, nbytes = held.get(group, (Counter(), 0))
        rows.append(
            {
                "group": group,
                "tensors": len(members[group]),
                "types": dict(Counter(info.type.name for info in members[group]).most_common()),
                "file_bytes": sum(info.nbytes for info in members[group]),
                "held_as": list(forms),
                "memory_bytes": nbytes,
                "place": _held_where(group, plan, decision),
            }
        )
    return rows


def unused_names(names: Iterable[str], layers: int) -> str:
    """Return one line on the tensors of a file that a model with this number of layers does not take."""
    every = list(names)
    extra = [name for name in every if (layer_of(name) or 0) >= layers]
    others = [name for name in every if name not in set(extra)]
    parts = [f"{len(extra)} of layers behind the last one (next-token prediction)"] if extra else []
    if others:
        parts.append(", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else ""))
    return f"{len(every)} tensors are not used: {'; '.join(parts)}"


def _held_where(group: str, plan: ModelPlan | None, decision: SlotDecision | None) -> str:
    if group == IGNORED:
        return "not read"
    if plan is None:
        return "not supported"
    if group != EXPERTS:
        return "in memory"
    if decision is None:
        return "paged"
    if decision.num_slots >= decision.num_experts:
        return "in memory"
    return f"paged, {decision.num_slots} of {decision.num_experts} in memory"


def _held(plan: ModelPlan) -> dict[str, tuple[Counter[str], int]]:
    """Return for each group how its tensors are held, most frequent first, and in how many bytes."""
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    nbytes: Counter[str] = Counter()
    for key, entry in plan.dense.items():
        group = group_of(f"{key.rpartition('.')[2]}.")
        form = entry.tensor.type.name if entry.held == "raw" else "F32"
        forms[group][form if entry.shape is None else Format(entry.shape.form).name] += 1
        nbytes[group] += entry.nbytes
    for precisions in plan.tiers.values():
        for matrices in precisions[: None if plan.assignment else 1]:
            forms[EXPERTS].update(Format(matrix.shape.form).name for matrix in matrices)
    if plan.tiers:
        nbytes[EXPERTS] = int(plan.slot_nbytes().sum())
    return {group: (Counter(dict(found.most_common())), nbytes[group]) for group, found in forms.items()}
