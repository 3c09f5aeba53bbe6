"""What `sterna status` tells, as typed structures: which the daemon fills and the command line reads.

In here: the fields with their units, and the conversions between a `StatusReport` and the body that travels.
Not in here: where the figures come from (`daemon/status.py`), how they are shown (`cli/`).

    body = report.to_body()                      # in the daemon: plain maps, lists, numbers
    report = StatusReport.from_body(body)        # in whoever asked: client.status() returns the body

The keys of the body are a promise to scripts: fields are added, never renamed or removed.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ...scheduler.messages import ExpertStats
from ...shm.errors import ProtocolError

MIB = 2.0**20

State = Literal["serving", "recovering", "draining"]


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all parts; a key that this version does not know is passed over."""


class ServedModelReport(Section, frozen=True, kw_only=True):
    """The model that is served."""

    name: str
    path: str
    architecture: str
    context: int
    """Tokens of prompt and answer together."""
    experts: int
    """Routed experts of all layers."""
    resident_experts: int | None
    """How many of them are in memory; None while the scheduler does not answer."""


class ExpertMemoryReport(Section, frozen=True, kw_only=True):
    """The memory that routed experts may use."""

    total: int
    """Routed experts of the model."""
    slots: int
    """How many of them may be in memory at once."""
    share: float
    """`slots` of `total`, 0 to 1."""
    slot_mib: float
    """Memory of all slots together, MiB."""
    by_precision: dict[str, dict[str, int]]
    """For each precision: `experts` held in it, and the `bytes` of slots for all of them."""


class PrefetchReport(Section, frozen=True, kw_only=True):
    """Experts that were read because a prediction named them."""

    issued: int
    """Experts that were asked for ahead of their layer."""
    useful: int
    """How many of them were then needed."""
    late: int
    """How many of those were needed before they had been read."""


class ExpertFigures(Section, frozen=True, kw_only=True):
    """What expert memory did since the start of the scheduler; an event is one MoE layer of one step."""

    resident: int
    """Experts in memory now."""
    loading: int
    """Experts being read now."""
    resident_of_workers: list[int]
    """`resident` by the worker that owns them."""
    hit_rate: float | None
    """`hits` of `distinct`, 0 to 1; None before the first event."""
    layer_hit_rates: list[float]
    """Hit rate of each MoE layer, 0 to 1."""
    miss_per_logical: float | None
    """`misses` of `logical`: reads for each expert that a token selected; None before the first event."""
    events: int
    """Events so far."""
    logical: int
    """(token, expert) pairs computed."""
    distinct: int
    """Different experts of each event, summed."""
    hits: int
    """How many of `distinct` were in memory."""
    misses: int
    """How many of `distinct` had to be read first."""
    fetched: int
    """Experts read, also those that a prediction named."""
    fetched_mib: float
    """Bytes read for them, MiB."""
    waited_s: float
    """Time in which a step waited for experts and for nothing else, seconds."""
    page_in_p50_ms: float
    """Median time from asking for an expert until it is in its slot, milliseconds."""
    page_in_p99_ms: float
    """99th percentile of it, milliseconds."""
    needed_per_slot: float
    """Mean number of an event's experts for each slot of a layer."""
    cycle_guard: float
    """Slots for each expert that one token needs; below 1 no expert is found again."""
    prefetch: PrefetchReport

    @classmethod
    def of(cls, stats: ExpertStats) -> ExpertFigures:
        """Return the scheduler's figures in the units of this report; equal names are equal figures."""
        figures = {
            n: value for n, value in msgspec.structs.asdict(stats).items() if n in cls.__struct_fields__
        }
        figures.update(
            hit_rate=_ratio(stats.hits, stats.distinct),
            miss_per_logical=_ratio(stats.misses, stats.logical),
            fetched_mib=round(stats.fetched_bytes / MIB, 1),
            waited_s=round(stats.waited_ns / 1e9, 3),
            page_in_p50_ms=round(stats.page_in_p50_ns / 1e6, 2),
            page_in_p99_ms=round(stats.page_in_p99_ns / 1e6, 2),
            needed_per_slot=round(stats.needed_per_slot, 3),
            cycle_guard=round(stats.cycle_guard, 2),
            prefetch=PrefetchReport(
                issued=stats.foreseen, useful=stats.foreseen_used, late=stats.foreseen_late
            ),
        )
        return cls(**figures)


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


class ProcessReport(Section, frozen=True, kw_only=True):
    """One process of the daemon on this machine."""

    name: str
    """"daemon", "nursery", "scheduler", "worker 0", ..."""
    pid: int
    rss_mib: float
    """Resident memory, what is shared included, MiB."""
    private_mib: float
    """Memory that would be free if the process ended, MiB."""
    cpu_s: float
    """Processor time since its start, seconds."""


class MeasuredMemory(Section, frozen=True, kw_only=True):
    """Memory that is used now."""

    processes: float
    """All processes without arenas, each shared page counted once, MiB."""
    arenas: float
    """Weights, experts, keys and values, MiB."""
    total: float
    """Both, MiB."""


class MemoryReport(Section, frozen=True, kw_only=True):
    """The memory budget, what it is planned for, and what is used."""

    budget_mib: float
    """What Sterna may use in all, MiB."""
    why: str
    """Where the budget comes from."""
    planned_mib: dict[str, float]
    """What is planned for each purpose, MiB."""
    planned_total_mib: float
    """All of it, MiB."""
    measured_mib: MeasuredMemory


class QualityReport(Section, frozen=True, kw_only=True):
    """What requests without a quality budget of their own may lose."""

    budget: float
    """Fraction of perplexity; 0 is exact."""
    lost_mass: float
    """Mean share of the gate mass that this allows to lose."""
    basis: str
    """What `lost_mass` rests on: "calibrated", "uncalibrated" or "given"."""
    calibrated_shares: list[float]
    """Shares of resident experts for which there is a calibration."""


class SequenceReport(Section, frozen=True, kw_only=True):
    """Requests, and the memory of their keys and values."""

    running: int
    """Requests that the engine computes."""
    waiting: int
    """Requests in the queue."""
    max: int
    """Requests that can run at once."""
    kv_blocks_free: int | None
    """Blocks of keys and values that are free; None while the scheduler does not answer."""
    kv_blocks: int
    """Blocks of keys and values in all."""


class TokenRates(Section, frozen=True, kw_only=True):
    """Tokens per second, mean of the last ten seconds."""

    prompt: float
    generated: float


class TotalsReport(Section, frozen=True, kw_only=True):
    """Counters since the start of the daemon."""

    requests_finished: int
    requests_failed: int
    requests_cancelled: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    """Steps of the engine; a step computes one token of each running request, or a part of a prompt."""
    scheduler_restarts: int
    worker_restarts: int
    connections: int
    """Client connections that are open now."""
    frames_refused: int
    """Frames that broke the protocol."""


class ProgressReport(Section, frozen=True, kw_only=True):
    """Whether the engine moves."""

    last_step_age_s: float | None
    """Seconds since the last step ended; None before the first one."""
    workers_missing: list[int]
    """Workers that are dead, starting, or not yet taken in by the scheduler."""
    workers_missing_s: float | None
    """Seconds for which at least one worker has been missing; None while all are there."""
    oldest_waiting_s: float | None
    """Seconds that the oldest request in the queue has waited; None if the queue is empty."""


class StatusReport(Section, frozen=True, kw_only=True):
    """All that the daemon tells about itself."""

    version: str
    uptime_s: float
    """Seconds since the start of the daemon."""
    state: State
    """"serving"; "recovering" while the scheduler or a worker is missing; "draining" before the end."""
    model: ServedModelReport
    experts: ExpertMemoryReport
    expert_figures: ExpertFigures | None
    """None while the scheduler does not answer. In the body these keys stand among those of `experts`."""
    processes: list[ProcessReport]
    memory_mib: dict[str, float]
    """Size of each arena, and the private memory of all `processes`, MiB."""
    memory: MemoryReport
    quality: QualityReport
    sequences: SequenceReport
    tokens_per_second: TokenRates
    totals: TotalsReport
    progress: ProgressReport

    def to_body(self) -> dict[str, Any]:
        """Return the report as it travels: maps, lists, strings, finite numbers, None."""
        body: dict[str, Any] = msgspec.to_builtins(self)
        body["experts"].update(body.pop("expert_figures") or {})
        return body

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> StatusReport:
        """Return the report that `body`, what `Client.status()` returned, tells.

        Raises ProtocolError that names the field if one is missing or of another type.
        """
        experts = body.get("experts")
        figures = experts if isinstance(experts, dict) and "events" in experts else None
        try:
            return msgspec.convert({**body, "expert_figures": figures}, cls)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"status of the daemon: {error}") from error
