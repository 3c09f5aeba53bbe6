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
    """How a token is chosen."""

    temperature: float
    """0 is greedy."""
    top_k: int
    """0 is off."""
    top_p: float
    """1 is off."""
    min_p: float
    """0 is off."""
    seed: int


class RoutingReport(msgspec.Struct, frozen=True, array_like=True):
    """What a quality budget did in some steps of one stream; an event is one token in one layer."""

    credit: float
    """Lost mass that may still be spent."""
    events: int
    changed: int
    """Events with another selection than the exact one."""
    swaps: int
    """Experts traded in them."""
    lost: float
    """Gate mass lost, as shares of the exact selections', summed."""


class Submit(EngineMessage, frozen=True, kw_only=True):
    """Run the stream in record `stream`; its prompt already lies in the stream memory."""

    stream: int
    serial: int
    """Which submission of the record this is."""
    prompt_length: int
    committed: int
    """Tokens known so far, prompt included: more than prompt_length after a restart."""
    computed: int
    """How many of them have their KV, in the blocks of the stream's table."""
    max_length: int
    """Tokens of prompt and answer together."""
    sampling: Sampling
    stop_ids: list[int]
    logprobs: int | None
    """How many alternatives to report with each token; None for no log-probabilities."""
    prompt_logprobs: bool
    stepped_from: int | None = None
    """Position from which one token is computed per step, as an answer is."""
    epsilon: float = 0.0
    """Mean share of the gate mass that routing may lose for what is in memory."""
    lossy_from: int = 0
    """Position from which it may."""
    credit: float = 0.0
    """What was saved up of it under a predecessor."""
    pooling: Pooling | None = None
    """No token is wanted but the vector of the prompt (`pooling.py`), and the stream ends with its prompt."""


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
    """Answer to `resize`, when nothing is read any more into what was given back."""

    nonce: int
    resident_experts: int
    freed_bytes: int
    """Given back since the request; below 0 where memory was taken."""
    error: str | None = None
    """Why no memory could be taken: all is as it was."""


class Loading(EngineMessage, frozen=True, kw_only=True):
    """Progress of loading: `done` of `total` steps of `what`."""

    what: str
    done: int
    total: int


class Ready(EngineMessage, frozen=True, kw_only=True):
    """The engine can run steps."""

    seconds: float
    """What the start took."""
    threads: int
    """Threads of a step with several tokens."""
    streaming_threads: int
    """Threads of a step with one token, which waits for the weights to stream in."""


class WorkerReady(EngineMessage, frozen=True, kw_only=True):
    """The worker `index` was taken in: steps use it from now on."""

    index: int


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of the chosen token and of the most likely ones, natural logarithm."""

    logprob: float
    top: list[tuple[int, float]]


class StreamStep(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did for one stream."""

    stream: int
    serial: int
    computed: int
    """Tokens that now have their KV."""
    token: int | None = None
    """The sampled one, None inside a prompt."""
    score: TokenScore | None = None
    finish: str | None = None
    """"stop" or "length" when the answer is complete."""
    prompt_from: int = 0
    """Position of the first prompt token in `prompt_logprobs`."""
    prompt_logprobs: list[float] | None = None
    routing: RoutingReport | None = None
    pooled: bytes | None = None
    """What the step adds to the prompt's vector."""


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
    """Expert memory since the scheduler's start; an event is one MoE layer of one step."""

    slots: int
    """Slots in use."""
    resident: int
    """Experts that are complete in memory."""
    loading: int
    """Experts on their way."""
    resident_of_workers: list[int]
    """Those resident, by the worker that owns them."""
    events: int
    logical: int
    """(token, expert) pairs."""
    distinct: int
    """Different experts of each event, summed."""
    hits: int
    """Of the distinct ones, those in memory at the start of the event."""
    misses: int
    """The others."""
    fetched: int
    """Experts read, also those foreseen."""
    fetched_bytes: int
    waited_ns: int
    """Time spent waiting for experts and for nothing else."""
    page_in_p50_ns: int
    """From request to answer."""
    page_in_p99_ns: int
    needed_per_slot: float
    """Mean of an event's experts per slot of a layer."""
    cycle_guard: float
    """Slots for each expert that one token needs; below 1 nothing is ever found again."""
    layer_hit_rates: list[float]
    foreseen: int
    """Experts asked for before they were needed."""
    foreseen_used: int
    foreseen_late: int
    """Used, but not there in time."""


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
