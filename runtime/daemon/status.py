"""What the daemon reports on itself: the parts that know something, read into a `StatusReport`.

In here: reading the parts and /proc. Not in here: the fields and their units (`protocol/report.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil

from ... import __version__
from ...scheduler.messages import Stats
from ...scheduler.model.plan import by_precision
from ..memory.budget import SlotDecision
from ..protocol.report import (
    MIB,
    ExpertFigures,
    ExpertMemoryReport,
    MeasuredMemory,
    MemoryReport,
    ProcessReport,
    ProgressReport,
    SequenceReport,
    ServedModelReport,
    State,
    StatusReport,
    TokenRates,
    TotalsReport,
)
from .endpoint import DoorFigures
from .engine.presence import EnginePresence
from .model.model_memory import ModelMemory
from .model.served_model import ServedModel
from .service import Service


def report(
    *,
    service: Service,
    model: ServedModel,
    memory: ModelMemory,
    presence: EnginePresence,
    door: DoorFigures,
    engine: Stats | None,
    own_pids: Mapping[str, int],
    started_s: float,
    now_s: float,
) -> StatusReport:
    """Return the daemon's state.

    engine: None while the scheduler does not answer; own_pids: processes other than the engine's, by name;
    started_s, now_s: on the clock of `time.monotonic`.
    """
    prompt_rate, generated_rate = service.totals.rates(now_s)
    processes, measured_mib = _processes({**own_pids, **presence.pids})
    sizes = {name: round(nbytes / MIB, 1) for name, nbytes in memory.memory_bytes.items()}
    return StatusReport(
        version=__version__,
        uptime_s=round(now_s - started_s, 1),
        state=_state(service, presence),
        model=ServedModelReport(
            name=model.facts.name,
            path=model.facts.path,
            architecture=model.facts.architecture,
            context=model.context,
            experts=model.plan.num_experts,
            resident_experts=engine.resident_experts if engine else None,
        ),
        experts=_expert_memory(model, memory.decision),
        expert_figures=ExpertFigures.of(engine.experts) if engine else None,
        processes=processes,
        memory_mib={**sizes, "processes": round(sum(process.private_mib for process in processes), 1)},
        memory=_memory(model, memory, measured_mib),
        quality=service.quality(),
        sequences=SequenceReport(
            running=service.num_running,
            waiting=service.num_waiting,
            max=model.streams_shape.streams,
            kv_blocks_free=engine.free_blocks if engine else None,
            kv_blocks=model.streams_shape.num_blocks,
        ),
        tokens_per_second=TokenRates(prompt=round(prompt_rate, 1), generated=round(generated_rate, 1)),
        totals=_totals(service, presence, door),
        progress=ProgressReport(
            last_step_age_s=_age(service.totals.last_step_s, now_s),
            workers_missing=presence.workers_missing,
            workers_missing_s=_age(presence.workers_missing_since_s, now_s),
            oldest_waiting_s=_age(service.oldest_waiting_since_s, now_s),
        ),
    )


def _state(service: Service, presence: EnginePresence) -> State:
    if service.draining:
        return "draining"
    return "serving" if presence.can_compute else "recovering"


def _age(since_s: float | None, now_s: float) -> float | None:
    return None if since_s is None else round(max(0.0, now_s - since_s), 3)


def _totals(service: Service, presence: EnginePresence, door: DoorFigures) -> TotalsReport:
    totals = service.totals
    return TotalsReport(
        requests_finished=totals.finished,
        requests_failed=totals.failed,
        requests_cancelled=totals.cancelled,
        prompt_tokens=totals.prompt_tokens,
        generated_tokens=totals.generated_tokens,
        steps=totals.steps,
        scheduler_restarts=presence.scheduler_restarts,
        worker_restarts=presence.worker_restarts,
        connections=door.connections,
        frames_refused=door.frames_refused,
    )


def _expert_memory(model: ServedModel, decision: SlotDecision) -> ExpertMemoryReport:
    return ExpertMemoryReport(
        total=decision.num_experts,
        slots=decision.num_slots,
        share=round(decision.share, 4),
        slot_mib=round(decision.rows["slots"] / MIB, 1),
        by_precision=by_precision(model.plan),
    )


def _memory(model: ServedModel, memory: ModelMemory, measured_mib: float) -> MemoryReport:
    decision = memory.decision
    arenas_mib = memory.arena_nbytes_held / MIB
    return MemoryReport(
        budget_mib=round(decision.budget / MIB, 1),
        why=model.budget.why,
        planned_mib={name: round(nbytes / MIB, 1) for name, nbytes in decision.rows.items()},
        planned_total_mib=round(decision.total / MIB, 1),
        measured_mib=MeasuredMemory(
            processes=round(measured_mib, 1),
            arenas=round(arenas_mib, 1),
            total=round(measured_mib + arenas_mib, 1),
        ),
    )


def _processes(pids: Mapping[str, int]) -> tuple[list[ProcessReport], float]:
    """List our processes, and return the MiB of them all without arenas, each shared page counted once."""
    rows, measured_mib = [], 0.0
    for name, pid in pids.items():
        try:
            process = psutil.Process(pid)
            memory = _rollup(pid)
            cpu_s = sum(process.cpu_times()[:2])
        except (psutil.Error, OSError):
            continue  # ended a moment ago
        rows.append(
            ProcessReport(
                name=name,
                pid=pid,
                rss_mib=round(memory["Rss"], 1),
                private_mib=round(memory["Private_Clean"] + memory["Private_Dirty"], 1),
                cpu_s=round(cpu_s, 2),
            )
        )
        measured_mib += memory["Pss"] - memory.get("Pss_Shmem", 0.0)
    return rows, measured_mib


def _rollup(pid: int) -> dict[str, float]:
    """Return the figures of /proc/PID/smaps_rollup in MiB; Pss shares each page among those who map it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
