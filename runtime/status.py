"""What `sterna status` shows: processes, memory by kind, sequences, speed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import psutil

import sterna

from ..scheduler.messages import Stats

if TYPE_CHECKING:
    from .daemon import Daemon

MIB = 2.0**20


def report(daemon: Daemon, engine: Stats | None) -> dict[str, Any]:
    """Return the daemon's state; `engine` is None while the scheduler does not answer."""
    service, model = daemon.service, daemon.model
    now_s = time.monotonic()
    prompt_rate, generated_rate = service.totals.rates(now_s)
    processes = _processes(daemon)
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
        "processes": processes,
        "memory_mib": {
            **{kind: round(nbytes / MIB, 1) for kind, nbytes in model.memory_bytes.items()},
            "processes": round(sum(process["private_mib"] for process in processes), 1),
        },
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


def _processes(daemon: Daemon) -> list[dict[str, Any]]:
    """List our processes; private memory is what would be freed if the process ended."""
    named = [("daemon", psutil.Process().pid), ("nursery", daemon.supervisor.nursery_pid)]
    named += [(name, child.pid) for name, child in daemon.engine.children.items()]
    rows = []
    for name, pid in named:
        try:
            process = psutil.Process(pid)
            memory = process.memory_full_info()
            cpu_s = sum(process.cpu_times()[:2])
        except psutil.Error:
            continue  # ended a moment ago
        rows.append(
            {
                "name": name,
                "pid": pid,
                "rss_mib": round(memory.rss / MIB, 1),
                "private_mib": round(memory.uss / MIB, 1),
                "cpu_s": round(cpu_s, 2),
            }
        )
    return rows
