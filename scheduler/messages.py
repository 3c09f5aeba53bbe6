"""What daemon and scheduler say to each other. Tokens and lengths lie in the stream memory.

daemon -> scheduler   submit, cancel, query, resize
scheduler -> daemon   loading, ready, worker_ready, step, streams_failed, stats, resized, trouble
"""

from __future__ import annotations

from typing import Literal

import msgspec

Pooling = Literal["mean", "cls", "last"]


class EngineMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all: the tag is the class name."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a token is chosen: temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


class RoutingReport(msgspec.Struct, frozen=True, array_like=True):
    """What a quality budget did in some steps of one stream; an event is one token in one layer.

    credit: lost mass that may still be spent; events; changed: those with another selection than the exact
    one; swaps: experts traded in them; lost: gate mass lost, as shares of the exact selections', summed.
    """

    credit: float
    events: int
    changed: int
    swaps: int
    lost: float


class Submit(EngineMessage, frozen=True, kw_only=True):
    """Run the stream in record `stream`; its prompt already lies in the stream memory.

    committed: tokens known so far, prompt included (more than prompt_length after a restart);
    computed: how many of them have their KV, in the blocks of the stream's table; max_length: prompt
    and answer together; logprobs: how many alternatives to report, None for none; stepped_from: position from
    which one token is computed per step, as an answer is; epsilon: mean share of the gate mass that routing
    may lose for what is in memory, from position lossy_from on; credit: what was saved up of it; pooling: no
    token is wanted, but the vector of the prompt (`pooling.py`), and the stream ends with its prompt.
    """

    stream: int
    serial: int
    prompt_length: int
    committed: int
    computed: int
    max_length: int
    sampling: Sampling
    stop_ids: list[int]
    logprobs: int | None
    prompt_logprobs: bool
    stepped_from: int | None = None
    epsilon: float = 0.0
    lossy_from: int = 0
    credit: float = 0.0
    pooling: Pooling | None = None


class Cancel(EngineMessage, frozen=True, kw_only=True):
    """Forget the stream, if it is still that submission."""

    stream: int
    serial: int


class Query(EngineMessage, frozen=True, kw_only=True):
    """Ask for `stats`."""

    nonce: int


class Resize(EngineMessage, frozen=True, kw_only=True):
    """Use only the first `limits` slots of each class and give the memory of the others back."""

    nonce: int
    limits: list[int]


class Resized(EngineMessage, frozen=True, kw_only=True):
    """Answer to `resize`, when nothing is read any more into what was given back.

    freed_bytes: given back since; below 0 where memory was taken; error: there was none to take, and all is
    as it was.
    """

    nonce: int
    resident_experts: int
    freed_bytes: int
    error: str | None = None


class Loading(EngineMessage, frozen=True, kw_only=True):
    """Progress of loading: `done` of `total` steps of `what`."""

    what: str
    done: int
    total: int


class Ready(EngineMessage, frozen=True, kw_only=True):
    """The engine can run steps, on so many threads; one token at a time uses `streaming_threads`."""

    seconds: float
    threads: int
    streaming_threads: int


class WorkerReady(EngineMessage, frozen=True, kw_only=True):
    """The worker `index` was taken in: steps use it from now on."""

    index: int


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of the chosen token and of the most likely ones, natural logarithm."""

    logprob: float
    top: list[tuple[int, float]]


class StreamStep(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did for one stream.

    computed: tokens that now have their KV; token: the sampled one or None inside a prompt;
    prompt_logprobs: those of the prompt tokens after position `prompt_from`; pooled: what the step adds to
    the prompt's vector.
    """

    stream: int
    serial: int
    computed: int
    token: int | None = None
    score: TokenScore | None = None
    finish: str | None = None  # "stop" or "length"
    prompt_from: int = 0
    prompt_logprobs: list[float] | None = None
    routing: RoutingReport | None = None
    pooled: bytes | None = None


class Step(EngineMessage, frozen=True, kw_only=True):
    """One step has ended."""

    number: int
    busy_ns: int
    streams: list[StreamStep]


class StreamsFailed(EngineMessage, frozen=True, kw_only=True):
    """These streams ended with an error."""

    streams: list[tuple[int, int]]
    code: str
    text: str


class ExpertStats(msgspec.Struct, frozen=True, kw_only=True):
    """Expert memory since the scheduler's start; an event is one MoE layer of one step.

    slots in use; resident experts, also by the worker that owns them; loading: on their way; logical: (token,
    expert) pairs; distinct: different experts of each event, summed, of which hits were in memory and misses
    not; fetched: experts read, also those foreseen; waited_ns: time spent waiting for experts alone;
    page_in_*: from request to answer; needed_per_slot: mean of an event's experts per slot of a layer;
    cycle_guard: slots for each expert that one token needs, below 1 nothing is ever found again;
    layer_hit_rates; foreseen experts asked for, used, and used but late.
    """

    slots: int
    resident: int
    loading: int
    resident_of_workers: list[int]
    events: int
    logical: int
    distinct: int
    hits: int
    misses: int
    fetched: int
    fetched_bytes: int
    waited_ns: int
    page_in_p50_ns: int
    page_in_p99_ns: int
    needed_per_slot: float
    cycle_guard: float
    layer_hit_rates: list[float]
    foreseen: int
    foreseen_used: int
    foreseen_late: int


class Stats(EngineMessage, frozen=True, kw_only=True):
    """Answer to `query`."""

    nonce: int
    steps: int
    running: int
    free_blocks: int
    workers: list[int]
    resident_experts: int
    experts: ExpertStats


class Trouble(EngineMessage, frozen=True, kw_only=True):
    """The engine cannot go on (while loading, or for ever)."""

    code: str
    text: str


ToScheduler = Submit | Cancel | Query | Resize
ToDaemon = Loading | Ready | WorkerReady | Step | StreamsFailed | Stats | Resized | Trouble

encode = msgspec.msgpack.Encoder().encode
decode_for_scheduler = msgspec.msgpack.Decoder(ToScheduler).decode
decode_for_daemon = msgspec.msgpack.Decoder(ToDaemon).decode
