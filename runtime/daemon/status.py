"""What `sterna status` shows: processes, memory by kind, sequences, speed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import sterna

from ...scheduler.messages import Stats
from ..examine.forecast import by_precision

if TYPE_CHECKING:
    from .daemon import Daemon

MIB = 2.0**20


def report(daemon: Daemon, engine: Stats | None) -> dict[str, Any]:
    """Return the daemon's state; `engine` is None while the scheduler does not answer."""
    service, model = daemon.service, daemon.model
    now_s = time.monotonic()
    prompt_rate, generated_rate = service.totals.rates(now_s)
    processes, measured = _processes(daemon)
    totals = service.totals
    return {
        "version": sterna.__version__,
        "uptime_s": round(now_s - daemon.started_s, 1),
        "state": "draining" if service.draining else "serving",
        "model": {
            "name": model.facts.name,
            "path": model.facts.path,
            "architecture": model.facts.architecture,
            "context": model.context,
            "experts": model.plan.num_experts,
            "resident_experts": engine.resident_experts if engine else None,
        },
        "experts": _experts(daemon, engine),
        "processes": processes,
        "memory_mib": {
            **{kind: round(nbytes / MIB, 1) for kind, nbytes in model.memory_bytes.items()},
            "processes": round(sum(process["private_mib"] for process in processes), 1),
        },
        "memory": _memory(daemon, measured),
        "quality": service.quality(),
        "sequences": {
            "running": service.num_running,
            "waiting": service.num_waiting,
            "max": model.streams_shape.streams,
            "kv_blocks_free": engine.free_blocks if engine else None,
            "kv_blocks": model.streams_shape.num_blocks,
        },
        "tokens_per_second": {"prompt": round(prompt_rate, 1), "generated": round(generated_rate, 1)},
        "totals": {
            "requests_finished": totals.finished,
            "requests_failed": totals.failed,
            "requests_cancelled": totals.cancelled,
            "prompt_tokens": totals.prompt_tokens,
            "generated_tokens": totals.generated_tokens,
            "steps": totals.steps,
            "scheduler_restarts": daemon.engine.restarts["scheduler"],
            "worker_restarts": daemon.engine.restarts["worker"],
            "connections": daemon.endpoint.num_connections,
            "frames_refused": daemon.endpoint.refused_frames,
        },
    }


def _experts(daemon: Daemon, engine: Stats | None) -> dict[str, Any]:
    """Return how many routed experts may be kept and are there, and how often they were found in memory."""
    decision = daemon.model.decision
    report: dict[str, Any] = {
        "total": decision.num_experts,
        "slots": decision.num_slots,
        "share": round(decision.share, 4),
        "slot_mib": round(decision.rows["slots"] / MIB, 1),
        "by_precision": by_precision(daemon.model.plan),
    }
    if engine is None:
        return report
    e = engine.experts
    return {
        **report,
        "resident": e.resident,
        "loading": e.loading,
        "resident_of_workers": e.resident_of_workers,
        "hit_rate": round(e.hits / e.distinct, 4) if e.distinct else None,
        "layer_hit_rates": e.layer_hit_rates,
        "miss_per_logical": round(e.misses / e.logical, 4) if e.logical else None,
        "events": e.events,
        "logical": e.logical,
        "distinct": e.distinct,
        "hits": e.hits,
        "misses": e.misses,
        "fetched": e.fetched,
        "fetched_mib": round(e.fetched_bytes / MIB, 1),
        "waited_s": round(e.waited_ns / 1e9, 3),
        "page_in_p50_ms": round(e.page_in_p50_ns / 1e6, 2),
        "page_in_p99_ms": round(e.page_in_p99_ns / 1e6, 2),
        "needed_per_slot": round(e.needed_per_slot, 3),
        "cycle_guard": round(e.cycle_guard, 2),
        "prefetch": {"issued": e.foreseen, "useful": e.foreseen_used, "late": e.foreseen_late},
    }


def _memory(daemon: Daemon, measured: float) -> dict[str, Any]:
    """Return the budget, what it is planned for, and what is really used: both in MiB."""
    decision = daemon.model.decision
    held = daemon.model.arena_nbytes_held / MIB
    return {
        "budget_mib": round(decision.budget / MIB, 1),
        "why": daemon.model.budget.why,
        "planned_mib": {name: round(nbytes / MIB, 1) for name, nbytes in decision.rows.items()},
        "planned_total_mib": round(decision.total / MIB, 1),
        "measured_mib": {
            "processes": round(measured, 1),
            "arenas": round(held, 1),
            "total": round(measured + held, 1),
        },
    }


def _processes(daemon: Daemon) -> tuple[list[dict[str, Any]], float]:
    """List our processes, and return the MiB of them all without arenas, each shared page counted once.

    Private memory is what would be freed if the process ended.
    """
    named = [("daemon", psutil.Process().pid), ("nursery", daemon.supervisor.nursery_pid)]
    named += [(name, child.pid) for name, child in daemon.engine.children.items()]
    rows, measured = [], 0.0
    for name, pid in named:
        try:
            process = psutil.Process(pid)
            memory = _rollup(pid)
            cpu_s = sum(process.cpu_times()[:2])
        except (psutil.Error, OSError):
            continue  # ended a moment ago
        rows.append(
            {
                "name": name,
                "pid": pid,
                "rss_mib": round(memory["Rss"], 1),
                "private_mib": round(memory["Private_Clean"] + memory["Private_Dirty"], 1),
                "cpu_s": round(cpu_s, 2),
            }
        )
        measured += memory["Pss"] - memory.get("Pss_Shmem", 0.0)
    return rows, measured


def _rollup(pid: int) -> dict[str, float]:
    """Return the figures of /proc/PID/smaps_rollup in MiB; Pss shares each page among those who map it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
