"""What memory is spent on, row by row, and how many experts the rest holds. Pure arithmetic.

In here: `Wants` (the settings that cost memory), `fixed_rows` (what everything but the experts takes) and
`decide`, which turns both and a budget into streams and slots. Not in here: what the budget is (`room.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...scheduler.kv import StreamShape
from ...scheduler.model.plan import ModelPlan
from ...shm.errors import ConfigError, OutOfResources
from ...shm.slots import arena_nbytes, slots_at
from ..config import resident_count
from ..sizes import format_given, format_size
from .buffers import scheduler_nbytes, step_nbytes, worker_nbytes

_MIB = 2**20

MAX_DEFAULT_CONTEXT = 4096
DEFAULT_STREAMS = 16
# Prompt tokens of one step, and what is tried where memory is short. Fewer read every expert more often.
BATCH_TOKENS = (512, 256, 128, 64)
LEAST_DEFAULT_CONTEXT = 512
# Of what dense weights and processes leave: more than this of it for keys and values costs too many experts.
KV_SHARE = 0.25
# The same for the buffers of a step.
BATCH_SHARE = 0.125
IO_THREADS = 4

# Memory of its own that each process has (PSS without arenas), from /proc/PID/smaps_rollup after an answer
# to 752 tokens, kernels from the cache, CPython 3.11, numba 0.68, x86-64. The embedded model and one of
# GLM-4.7-Flash's sizes with 8 layers differ by 3 MiB once `batch_nbytes` and `worker_nbytes` are taken off:
# daemon 35-46, nursery 31-48 (pages of libraries count in full where nobody else maps them), scheduler 28-36,
# worker 21-23.
DAEMON = 48 * _MIB
NURSERY = 48 * _MIB
SCHEDULER = 38 * _MIB
WORKER = 25 * _MIB
# A piece of the vocabulary in the daemon: its text, two dictionary entries, its merge.
VOCABULARY_ENTRY = 600
# What malloc keeps and what nobody counts.
SLACK = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """The settings that cost memory; 0 streams, context or tokens: choose. resident: as the setting."""

    workers: int
    threads: int
    max_batch_tokens: int
    streams: int = 0
    context: int = 0
    resident: str = "auto"
    value_nbytes: int = 2  # of the cache: 2 float16, 4 float32
    local: bool = False
    """Whether the scheduler is its own workers: their buffers are in its process, and none is theirs."""

    @property
    def processes_nbytes(self) -> int:
        """What the processes of workers take beside their buffers."""
        return 0 if self.local else self.workers * WORKER


class BudgetTooSmall(OutOfResources):
    """The budget does not hold what has to be in memory; `smallest` bytes would.

    `facts` is the text without the advice, which is for a start: a running daemon cannot follow it.
    """

    def __init__(self, facts: str, advice: str, smallest: int) -> None:
        super().__init__(f"{facts}; {advice}")
        self.facts = facts
        self.smallest = smallest


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDecision:
    """How the budget is spent."""

    classes: list[tuple[int, int]]
    """As `shm.slots.SlotClasses`, one for each of `plan.slot_sizes()`."""
    streams: StreamShape
    max_batch_tokens: int
    rows: dict[str, int]
    """Bytes of each purpose, the slots included; their sum is at most the budget."""
    budget: int
    smallest: int
    """The least budget that would work, in bytes."""
    fits_all: bool
    """Whether all experts could have a slot, if `Wants.resident` did not limit them."""
    num_experts: int
    why: str
    notes: list[str] = field(default_factory=list)

    @property
    def num_slots(self) -> int:
        """Experts that are kept."""
        return sum(count for count, _ in self.classes)

    @property
    def share(self) -> float:
        """Part of the routed experts that is kept; 1 for a model without any."""
        return self.num_slots / self.num_experts if self.num_experts else 1.0

    @property
    def total(self) -> int:
        """Bytes of all rows."""
        return sum(self.rows.values())

    def settled(self, wants: Wants) -> Wants:
        """Return `wants` with what was chosen: a later decision must not choose again."""
        shape = self.streams
        return replace(
            wants,
            workers=wants.workers if self.num_experts else 0,
            streams=shape.streams,
            context=shape.context,
            max_batch_tokens=self.max_batch_tokens,
        )


# ---- what the rest takes ----


def fixed_rows(
    plan: ModelPlan, wants: Wants, shape: StreamShape, largest_read: int, headers: int | None = None
) -> dict[str, int]:
    """Return the bytes of everything but the slots.

    largest_read: bytes of the largest expert in the file; headers: of the slots, by default of all of them.
    """
    own = {
        "daemon": DAEMON + VOCABULARY_ENTRY * plan.vocab_size,
        "nursery": NURSERY,
        "scheduler": SCHEDULER
        + scheduler_nbytes(plan, shape, wants.max_batch_tokens, wants.threads)
        + step_nbytes(plan, wants.max_batch_tokens),
        "workers": wants.processes_nbytes
        + wants.workers * worker_nbytes(plan, wants.max_batch_tokens, wants.workers),
        "staging": wants.workers * IO_THREADS * (largest_read + _converted_nbytes(plan)),
    }
    kv = shape.layers * shape.layer_nbytes
    return {
        **own,
        "slack": int(SLACK * sum(own.values())),
        "dense": _whole_pages(plan.dense_arena_nbytes),
        "kv": kv,
        "streams": _whole_pages(shape.layout().nbytes) - kv,
        "headers": slots_at(plan.num_experts) if headers is None else headers,
    }


def _converted_nbytes(plan: ModelPlan) -> int:
    """Return a thread's buffers for converting a matrix that is read in: the result, 16 rows of floats."""
    held = [m.shape for tiers in plan.tiers.values() for matrices in tiers[1:] for m in matrices]
    return max((m.nbytes + 64 * m.columns for m in held), default=0) if plan.assignment else 0


def _whole_pages(nbytes: int) -> int:
    """Round up to 64 KiB: no page is larger, and arenas are whole pages."""
    return -(-nbytes // 65_536) * 65_536


# ---- the decision ----


def decide(
    plan: ModelPlan,
    wants: Wants,
    budget: int,
    largest_read: int,
    at_most: Sequence[tuple[int, int]] | None = None,
) -> SlotDecision:
    """Spend `budget` bytes: streams as set, or as many as leave room for experts; the rest becomes slots.

    at_most: the slots that there are, by default one for every expert. Raises BudgetTooSmall, naming the
    smallest budget that works, when fewer slots are left than one token's way through all layers needs:
    below that, with the least recently used giving way, every expert would be gone when it is needed again.
    """
    wants = wants if plan.num_experts else replace(wants, workers=0)
    most = plan.all_slots() if at_most is None else list(at_most)
    least = least_slots(plan, most)
    needed = sum(count * nbytes for count, (_, nbytes) in zip(least, most, strict=True))
    candidates = list(_shapes(plan, wants))
    wished = wants.max_batch_tokens or BATCH_TOKENS[0]
    wants = _with_batch(
        plan,
        wants,
        candidates[-1],
        budget,
        lambda each: _total(plan, each, candidates[-1], largest_read) + needed,
    )
    fixed = {shape: fixed_rows(plan, wants, shape, largest_read) for shape in candidates}
    room = {shape: budget - sum(rows.values()) for shape, rows in fixed.items()}
    smallest = sum(fixed[candidates[-1]].values()) + needed
    if budget < smallest:
        raise BudgetTooSmall(*_refusal(plan, wants, budget, smallest, fixed[candidates[-1]]), smallest)
    shape = _choose_shape(candidates, room, most, needed)
    counts = _distribute(most, least, room[shape])
    fits_all = counts == [count for count, _ in most]
    everything = sum(counts) == plan.num_experts
    why = "all experts fit" if plan.num_experts else "a dense model"
    if not everything:
        why = f"{sum(counts)} of {plan.num_experts} experts fit"
    wanted = resident_count(wants.resident, plan.num_experts)
    if wanted is not None and wanted < sum(counts):
        counts = _of_number(plan, most, least, wanted)
        why = f"{sum(counts)} of {plan.num_experts} experts, as set"
    classes = [(count, nbytes) for count, (_, nbytes) in zip(counts, most, strict=True)]
    headers = slots_at(sum(counts)) if at_most is None else fixed[shape]["headers"]
    rows = {**fixed[shape], "headers": headers, "slots": arena_nbytes(classes) - slots_at(sum(counts))}
    return SlotDecision(
        classes=classes,
        streams=shape,
        max_batch_tokens=wants.max_batch_tokens,
        rows=rows,
        budget=budget,
        smallest=smallest,
        fits_all=fits_all,
        num_experts=plan.num_experts,
        why=why,
        notes=_notes(candidates[0], shape, wished, wants.max_batch_tokens),
    )


def _total(plan: ModelPlan, wants: Wants, shape: StreamShape, largest_read: int) -> int:
    return sum(fixed_rows(plan, wants, shape, largest_read).values())


def _with_batch(
    plan: ModelPlan, wants: Wants, shape: StreamShape, budget: int, least: Callable[[Wants], int]
) -> Wants:
    """Return `wants` with the tokens of a step: as set, or the most whose buffers take only their share.

    shape: the smallest that may be chosen; least: the bytes that at least are needed with some wants.
    """
    if wants.max_batch_tokens:
        return wants
    processes = DAEMON + NURSERY + SCHEDULER + wants.processes_nbytes
    left = budget - plan.dense_arena_nbytes - processes
    for tokens in BATCH_TOKENS:
        chosen = replace(wants, max_batch_tokens=tokens)
        buffers = scheduler_nbytes(plan, shape, tokens, wants.threads) + step_nbytes(plan, tokens)
        buffers += wants.workers * worker_nbytes(plan, tokens, wants.workers)
        if buffers <= BATCH_SHARE * left and budget >= least(chosen):
            break
    return chosen


def _shapes(plan: ModelPlan, wants: Wants) -> Iterator[StreamShape]:
    """Yield what may be chosen, best first: fewer streams down to one, then a shorter context."""
    context = wants.context or min(MAX_DEFAULT_CONTEXT, plan.hyper.context_length)
    streams = wants.streams or DEFAULT_STREAMS
    while True:
        h, nbytes = plan.hyper, wants.value_nbytes
        yield StreamShape(
            layers=h.layers, width=h.cache_width, streams=streams, context=context, value_nbytes=nbytes
        )
        if not wants.streams and streams > 1:
            streams //= 2
        elif not wants.context and context > LEAST_DEFAULT_CONTEXT:
            context = max(LEAST_DEFAULT_CONTEXT, context // 2)
        else:
            return


def _choose_shape(
    candidates: list[StreamShape], room: dict[StreamShape, int], most: Sequence[tuple[int, int]], needed: int
) -> StreamShape:
    """Return the first shape with which all experts fit, if it serves several at the full context.

    Else the first whose keys and values take no more than their share and leave the bytes that experts need,
    else the last.
    """
    everything = sum(count * nbytes for count, nbytes in most)
    best = candidates[0]
    for shape in candidates:
        several = shape.streams > 1 or best.streams == 1
        if room[shape] >= everything and shape.context == best.context and several:
            return shape
    for shape in candidates:
        kv = shape.layers * shape.layer_nbytes
        if kv <= KV_SHARE * (room[shape] + kv) and room[shape] >= needed:
            return shape
    return candidates[-1]


def least_slots(plan: ModelPlan, most: Sequence[tuple[int, int]]) -> list[int]:
    """Return how many slots of each class one token needs: its layers' experts, and one to read into.

    Where experts of a layer differ in size, each class gets its part of them.
    """
    sizes, h = plan.slot_nbytes(), plan.hyper
    return [
        min(count, -(-int((sizes == nbytes).sum()) * h.experts_used // h.experts) + 1) if count else 0
        for count, nbytes in most
    ]


def _distribute(most: Sequence[tuple[int, int]], least: Sequence[int], room: int) -> list[int]:
    """Return slots of each class, each in proportion to its experts, that take at most `room` bytes."""
    steps = sum(count for count, _ in most)

    def counts_at(step: int) -> list[int]:
        return [max(low, step * count // steps) for low, (count, _) in zip(least, most, strict=True)]

    def nbytes_of(counts: Sequence[int]) -> int:
        return sum(count * nbytes for count, (_, nbytes) in zip(counts, most, strict=True))

    low, high = 0, steps  # the last step that fits lies in low..high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if nbytes_of(counts_at(middle)) <= room else (low, middle - 1)
    counts = counts_at(low) if steps else []
    left = room - nbytes_of(counts)
    for slot_class, (count, nbytes) in enumerate(most):  # what is left is less than a slot of each class
        more = min(count - counts[slot_class], left // nbytes)
        counts[slot_class] += more
        left -= more * nbytes
    return counts


def spread(plan: ModelPlan, most: Sequence[tuple[int, int]], wanted: int) -> list[int]:
    """Return some `wanted` slots in proportion to the classes of `most`, never less than one token needs."""
    least = least_slots(plan, most)
    return _distribute([(count, 1) for count, _ in most], least, max(wanted, sum(least)))


def _of_number(
    plan: ModelPlan, most: Sequence[tuple[int, int]], least: Sequence[int], wanted: int
) -> list[int]:
    """Return `wanted` slots in proportion to the classes; raises ConfigError below one token's need."""
    if wanted < sum(least):
        raise ConfigError(
            f"resident_experts: {wanted} of {plan.num_experts} experts are fewer than the {sum(least)} "
            "that one token's way through all layers needs"
        )
    return spread(plan, most, wanted)


def _refusal(
    plan: ModelPlan, wants: Wants, budget: int, smallest: int, rows: dict[str, int]
) -> tuple[str, str]:
    """Return the facts and the advice."""
    largest = sorted(rows.items(), key=lambda row: -row[1])[:3]
    spent = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in largest)
    cycle = len(plan.hyper.moe_layers) * plan.hyper.experts_used
    lower = [name for name, value in (("max_num_seqs", wants.streams), ("ctx_size", wants.context)) if value]
    lower += ["max_batch_tokens"] if wants.max_batch_tokens > BATCH_TOKENS[-1] else []
    lower += ["workers"] if wants.workers > 1 else []
    advice = f"lower {', '.join(lower)}, or " if lower else ""
    fixed = format_size(sum(rows.values()))
    without, experts = ("without experts ", f", and one token uses {cycle} experts") if cycle else ("", "")
    return (
        f"a budget of {format_given(budget)} is too small: {without}{fixed} are needed "
        f"({spent}, ...){experts}; at least {format_size(smallest)} ({smallest} bytes) work",
        f"{advice}raise memory",
    )


def _notes(wished: StreamShape, chosen: StreamShape, wished_tokens: int, tokens: int) -> list[str]:
    notes = []
    if tokens != wished_tokens:
        notes.append(f"max_batch_tokens is {tokens} instead of {wished_tokens} to leave memory to experts")
    if chosen.streams != wished.streams:
        notes.append(
            f"max_num_seqs is {chosen.streams} instead of {wished.streams} to leave memory to experts"
        )
    if chosen.context != wished.context:
        notes.append(f"ctx_size is {chosen.context} instead of {wished.context} to leave memory to experts")
    return notes
