"""What `sterna plan` tells from a file's header: whether it fits, what is kept, how fast it will be.

In here: the forecast and two probes of this machine, 0.3 s each. Not in here: the arithmetic of the budget
(`memory/budget.py`), which is the daemon's own.

The forecast: a token reads the missing part of the experts that it uses from the disk, and all weights that
it uses from memory; the slower of the two is its time, plus a message to the workers in each layer.
"""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...scheduler.model.plan import ModelPlan, by_precision
from ...workers.checkpoint.file.gguf import GgufFile
from ...workers.ownership import owners
from ..config import Config, embedded_model
from ..memory.budget import BudgetTooSmall, SlotDecision, Wants
from ..memory.choice import UNLIMITED, Choices, ModelChoice, known_counts, wants_of
from ..memory.room import choose_budget, own_nbytes, read_room
from .check import examine
from .slow_types import slow_types

# Hit rate of LRU, exact routing, one answer at a time, by the share of experts kept. Measured on traces of
# DeepSeek-V2-Lite (6 of 64 experts, 15 long prompts): the same family, and the flattest routing known.
LOW = ((0.0, 0.0), (0.125, 0.332), (0.25, 0.526), (0.375, 0.654), (0.5, 0.755), (0.75, 0.896), (1.0, 1.0))
# The same of Qwen3-30B-A3B (6 of 128, 128 tokens), whose routing is the most repetitive.
HIGH = ((0.0, 0.0), (0.0625, 0.44), (0.125, 0.614), (0.25, 0.807), (0.375, 0.889), (0.5, 0.912), (1.0, 1.0))
PRIOR = "published LRU curves: DeepSeek-V2-Lite (low) and Qwen3-30B-A3B (high)"

PROBE_S = 0.3
READ_NBYTES = 1 << 20
LANES = 2
MEMORY_NBYTES = 64 << 20
MAX_CORES = 8
# One exchange with the workers over ZeroMQ, fanned out to two (100-265 us measured).
EXCHANGE_S = 150e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes per second of this machine's disk and memory, and how they were found."""

    disk: float
    memory: float
    how: str


def describe_plan(config: Config, rates: Rates | None = None) -> dict[str, Any]:
    """Return the plan for `config` as plain values; bytes where a name ends in _bytes.

    rates: of the machine, probed when None. Raises the errors of the file, ConfigError, and OutOfResources
    where a cgroup does not grant the memory that was asked for; a budget that is too small is an answer.
    """
    path = config.model or embedded_model()
    budget = choose_budget(config.memory_nbytes, config.preset, read_room(), own_nbytes())
    why = budget.why if config.memory == "auto" else f"{config.memory}, {budget.why}"
    wants = wants_of(config)
    refusal = None
    with GgufFile.open(path) as file:
        counts = known_counts(config, path)
        choices = Choices(file, config.ternary, config.activations, config.precision, counts)
        unlimited = choices.within(UNLIMITED, replace(wants, resident="auto"))
        smallest = _smallest(choices, wants)
        try:
            choice = choices.within(budget.nbytes, wants)
        except BudgetTooSmall as error:
            refusal = str(error)
            choice = choices.within(smallest, wants)
        slow = slow_types(file, examine(file).used, choice.plan)
        rates = rates or probe(Path(max(file.paths, key=os.path.getsize)))
    decision = choice.decision
    return {
        "path": str(path),
        "fits": refusal is None and decision.num_slots == decision.num_experts,
        "works": refusal is None,
        "refusal": refusal,
        "budget": {"bytes": budget.nbytes, "why": why},
        "smallest_budget_bytes": smallest,
        "whole_budget_bytes": unlimited.decision.total,
        "experts": _experts(choice, wants.workers),
        "settings": {
            "max_num_seqs": decision.streams.streams,
            "ctx_size": decision.streams.context,
            "max_batch_tokens": decision.max_batch_tokens,
            "workers": wants.workers,
        },
        "notes": decision.notes,
        "slow": slow,
        "used_bytes": decision.rows,
        "used_total_bytes": decision.total,
        "ternary": choice.ternary,
        "precision": choice.precision,
        "forecast": forecast(choice.plan, decision, choices.reads, rates),
    }


def _smallest(choices: Choices, wants: Wants) -> int:
    try:
        return choices.within(0, wants).decision.smallest
    except BudgetTooSmall as error:
        return error.smallest


def _experts(choice: ModelChoice, workers: int) -> dict[str, Any]:
    plan, decision = choice.plan, choice.decision
    owned = [0] * workers
    for worker in owners(plan.hyper.moe_layers, plan.hyper.experts, [1.0] * workers).values():
        owned[worker] += 1
    return {
        "total": decision.num_experts,
        "slots": decision.num_slots,
        "share": round(decision.share, 4),
        "slot_bytes": [nbytes for _, nbytes in decision.classes],
        "of_workers": [round(count * decision.share) for count in owned],
        "by_precision": by_precision(plan),
    }


def hit_rate(curve: tuple[tuple[float, float], ...], share: float) -> float:
    """Return the hits that `curve`, (share of experts, hit rate) pairs, gives for a share of experts kept."""
    shares, rates = zip(*curve, strict=True)
    return float(np.interp(share, shares, rates))


def forecast(plan: ModelPlan, decision: SlotDecision, reads: dict[int, int], rates: Rates) -> dict[str, Any]:
    """Return hit rates, bytes and seconds of a token, low and high.

    reads: bytes in the file of each layer's expert.
    """
    used = plan.hyper.experts_used
    asked = used * sum(reads.values())
    slots = used * int(plan.slot_nbytes().sum()) / max(1, plan.hyper.experts)
    embedding = plan.dense["token_embd"].nbytes
    compute_s = (plan.dense_nbytes - embedding + slots) / rates.memory
    exchange_s = EXCHANGE_S * len(plan.hyper.moe_layers)
    mean = sum(reads.values()) / max(1, len(reads))
    low, high = (hit_rate(curve, decision.share) for curve in (LOW, HIGH))
    missed = [asked * (1 - rate) for rate in (low, high)]
    seconds = [max(compute_s, nbytes / rates.disk) + exchange_s for nbytes in missed]
    return {
        "hit_rate": [round(low, 3), round(high, 3)],
        "prior": PRIOR,
        "asked_bytes_per_token": asked,
        "read_bytes_per_token": [int(nbytes) for nbytes in missed],
        "compute_s_per_token": round(compute_s + exchange_s, 5),
        "read_s_per_token": [round(nbytes / rates.disk, 5) for nbytes in missed],
        "tokens_per_s": [round(1 / each, 2) for each in seconds],
        "first_fill_s": round((decision.num_slots * mean + plan.dense_nbytes) / rates.disk, 2),
        "disk_bytes_per_s": int(rates.disk),
        "memory_bytes_per_s": int(rates.memory),
        "probe": rates.how,
    }


# ---- probes ----


def probe(path: Path) -> Rates:
    """Measure for 0.6 s how fast this machine reads the file at `path` and its memory."""
    disk, how = _disk(path)
    return Rates(disk=disk, memory=_memory(), how=how)


def _disk(path: Path) -> tuple[float, str]:
    try:
        fd, how = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), "disk by O_DIRECT"
        try:
            os.preadv(fd, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
        except OSError:
            os.close(fd)
            raise
    except OSError:  # a file system without it: what lies in the page cache is then read from there
        fd, how = os.open(path, os.O_RDONLY | os.O_CLOEXEC), "disk through the page cache, perhaps too high"
    try:
        size = max(os.fstat(fd).st_size, 1)
        with ThreadPoolExecutor(LANES) as pool:
            return sum(pool.map(lambda lane: _read(fd, size, lane), range(LANES))), how
    finally:
        os.close(fd)


def _read(fd: int, size: int, lane: int) -> float:
    """Read a MiB here and there for the time of a probe; return bytes per second."""
    with mmap.mmap(-1, READ_NBYTES) as buffer:
        blocks = max(1, size // READ_NBYTES)
        began_s, done, turn = time.perf_counter(), 0, 0
        while (elapsed := time.perf_counter() - began_s) < PROBE_S or not turn:
            # Steps of a golden ratio: nothing that a readahead would foresee, nothing twice for long.
            block = int((lane / LANES + turn * 0.6180339887) % 1.0 * blocks)
            done += os.preadv(fd, [buffer], block * READ_NBYTES)
            turn += 1
        return max(done, 1) / max(elapsed, 1e-6)


def _memory() -> float:
    """Read a buffer that no cache holds, in as many threads as there are cores (numpy lets them run)."""
    cores = min(len(os.sched_getaffinity(0)), MAX_CORES)
    parts = np.ones((cores, MEMORY_NBYTES // 8 // cores), np.int64)
    began_s, turns = time.perf_counter(), 0
    with ThreadPoolExecutor(cores) as pool:
        while (elapsed := time.perf_counter() - began_s) < PROBE_S or not turns:
            list(pool.map(np.sum, parts))
            turns += 1
    return parts.nbytes * turns / elapsed
