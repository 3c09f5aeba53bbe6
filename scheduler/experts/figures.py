"""What `sterna status` and the metrics say of expert memory; the names are those of docs/expert-memory.md."""

from __future__ import annotations

from ..messages import ExpertStats
from .foresight import Foresight
from .runner import ExpertRunner


def expert_stats(runner: ExpertRunner, foresight: Foresight, workers: int) -> ExpertStats:
    """Return the figures since the scheduler's start."""
    memory, counts, h = runner.memory, runner.counts, runner.plan.hyper
    slots = sum(memory.limits)
    cycle = h.experts_used * len(h.moe_layers)
    layers = counts.by_layer.tolist()
    return ExpertStats(
        slots=slots,
        resident=memory.num_resident,
        loading=memory.num_loading,
        resident_of_workers=memory.resident_of_workers(workers),
        events=counts.events,
        logical=counts.logical,
        distinct=counts.distinct,
        hits=counts.hits,
        misses=counts.distinct - counts.hits,
        fetched=counts.fetched,
        fetched_bytes=counts.fetched_bytes,
        waited_ns=runner.waited_ns,
        page_in_p50_ns=runner.latency.p50_ns,
        page_in_p99_ns=runner.latency.p99_ns,
        needed_per_slot=counts.distinct * len(h.moe_layers) / (counts.events * slots)
        if counts.events
        else 0.0,
        cycle_guard=slots / cycle if cycle else 0.0,
        layer_hit_rates=[round(hits / distinct, 4) if distinct else 0.0 for distinct, hits in layers],
        foreseen=counts.foreseen,
        foreseen_used=foresight.meter.useful,
        foreseen_late=foresight.meter.late,
    )
