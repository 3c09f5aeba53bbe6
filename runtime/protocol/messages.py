"""The messages between clients and the daemon, as typed structures, and nothing else.

In here: one frozen `msgspec.Struct` per message with its ranges, and a registry per direction. Not in here:
bytes (`codec.py`), sockets (`sockets.py`), what the daemon does with a message (`daemon/daemon.py`).

    client -> daemon                 daemon -> client
    hello                            welcome | failed
    generate                         accepted, tokens..., finished | failed
    cancel                           finished (reason "cancelled") | failed
    embed                            embedded | failed
    ping                             pong
    status                           report
    tokenize, detokenize             tokenized, detokenized
    apply_template                   templated | failed
    drain                            drained
    resize                           report | failed
                                     going_away (unasked)

Ranges are checked by `codec.decode_*` and `codec.build`, not by calling the class: `Generate(id="", ...)`
runs no range check. Only rules between fields are checked in both cases.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from ...scheduler.messages import Pooling
from ...shm.errors import BadRequest, Overloaded, SternaError
from .chat import MAX_MESSAGES, MAX_TOOLS, ChatMessage

MAX_ID_CHARS = 64
MAX_STOP_BYTES = 256

Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0)]
FinishReason = Literal["stop", "length", "cancelled"]
Basis = Literal["calibrated", "uncalibrated", "given"]


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that lies in a body; its tag is the class name in snake case."""


# ---- client -> daemon ----


class Hello(Message, frozen=True, kw_only=True):
    """First message of every connection; `client` is the key of the session over reconnects."""

    client: Id
    version: Annotated[str, Meta(max_length=64)]


class Generate(Message, frozen=True, kw_only=True):
    """Ask for an answer to exactly one of `prompt` and `token_ids`.

    `top_k` 0, `top_p` 1 and `min_p` 0 switch that filter off, `temperature` 0 is greedy. `logprobs` is how
    many alternatives to report for each token (0: only the chosen one). `add_bos` None: as the model says.
    `special` reads control tokens out of the prompt; where it begins with BOS itself, none is added.

    `quality_budget`: the fraction of perplexity that the answer may cost, None the daemon's default;
    `lost_mass`: the mean share of the gate mass that may be lost instead. `stepped` computes the prompt one
    token per step, as an answer is, and within the same budget: for scoring.
    """

    id: Id
    prompt: str | None = None
    token_ids: list[TokenId] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**20)] = 256
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.7
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] = 40
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.95
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=16)] = []
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    add_bos: bool | None = None
    special: bool = False
    quality_budget: Annotated[float, Meta(ge=0, le=0.1)] | None = None
    lost_mass: Annotated[float, Meta(ge=0, le=1)] | None = None
    stepped: bool = False

    def __post_init__(self) -> None:
        """Check what no single field's range can say; raises BadRequest."""
        _check_prompt(self.prompt, self.token_ids)
        if self.quality_budget is not None and self.lost_mass is not None:
            raise BadRequest("quality_budget, lost_mass: expected at most one of the two, found both")
        for i, text in enumerate(self.stop):
            # A lone surrogate has no UTF-8 form; it is counted here and refused by the codec.
            n_bytes = len(text.encode("utf-8", "surrogatepass"))
            if n_bytes > MAX_STOP_BYTES:
                raise BadRequest(f"stop[{i}]: expected at most {MAX_STOP_BYTES} bytes, found {n_bytes}")


class Embed(Message, frozen=True, kw_only=True):
    """Ask for a vector of exactly one of `prompt` and `token_ids`: hidden states after the last norm, pooled.

    `pooling` None: as the model's file says, else "last"; `normalize`: to length 1.
    """

    id: Id
    prompt: str | None = None
    token_ids: list[TokenId] | None = None
    pooling: Pooling | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        """Check what no single field's range can say; raises BadRequest."""
        _check_prompt(self.prompt, self.token_ids)


def _check_prompt(prompt: str | None, token_ids: list[int] | None) -> None:
    if (prompt is None) == (token_ids is None):
        found = "neither" if prompt is None else "both"
        raise BadRequest(f"prompt, token_ids: expected exactly one of the two, found {found}")


class Cancel(Message, frozen=True, kw_only=True):
    """End the request of that id; what was generated so far comes back with `finished`."""

    id: Id


class Ping(Message, frozen=True, kw_only=True):
    """Ask whether the daemon is alive; `nonce` comes back in `pong`."""

    nonce: Count


class Status(Message, frozen=True, kw_only=True):
    """Ask for the daemon's state."""

    id: Id


class Tokenize(Message, frozen=True, kw_only=True):
    """Turn text into token ids; `special` reads control tokens out of the text."""

    id: Id
    text: str
    add_bos: bool | None = None
    special: bool = False


class Detokenize(Message, frozen=True, kw_only=True):
    """Turn token ids into text."""

    id: Id
    token_ids: list[TokenId]


class ApplyTemplate(Message, frozen=True, kw_only=True):
    """Ask for a conversation as prompt text, by a chat template out of the model's file.

    `template`: name of one, None for the model's choice; `options`: further variables for it, such as
    `enable_thinking`.
    """

    id: Id
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    documents: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool = True
    template: Annotated[str, Meta(max_length=MAX_ID_CHARS)] | None = None
    options: dict[str, Any] = {}


class Drain(Message, frozen=True, kw_only=True):
    """Finish what runs, take nothing new, then stop."""

    id: Id


class Resize(Message, frozen=True, kw_only=True):
    """Use `memory` in all from now on, a size such as "2GiB", or "auto" for what the start allowed."""

    id: Id
    memory: Annotated[str, Meta(min_length=1, max_length=64)]


# ---- daemon -> client ----


class ModelFacts(Message, frozen=True, kw_only=True):
    """What a client may know about the model that is served."""

    name: str
    path: str
    architecture: str
    context_length: Count
    vocab_size: Count


class Limits(Message, frozen=True, kw_only=True):
    """What the daemon accepts."""

    max_frame_bytes: Count
    max_queue: Count
    max_sequences: Count


class Welcome(Message, frozen=True, kw_only=True):
    """Answer to `hello`."""

    version: str
    model: ModelFacts
    limits: Limits


class Accepted(Message, frozen=True, kw_only=True):
    """The request is in the queue, `queue_position` requests are before it."""

    id: Id
    prompt_token_ids: list[TokenId]
    queue_position: Count


class TokenLogprob(Message, frozen=True, kw_only=True):
    """Natural logarithm of one token's probability and the most probable alternatives, best first."""

    token_id: TokenId
    logprob: float
    top: list[tuple[TokenId, float]]


class TokenItem(Message, frozen=True, kw_only=True):
    """New tokens of one request; `index` is the number of the first of them within the answer."""

    id: Id
    index: Count
    token_ids: list[TokenId]
    text: str
    logprobs: list[TokenLogprob] | None = None


class Tokens(Message, frozen=True, kw_only=True):
    """What one step of the engine brought for this client, one item per request."""

    items: list[TokenItem]


class Usage(Message, frozen=True, kw_only=True):
    """How many tokens were read and written."""

    prompt_tokens: Count
    completion_tokens: Count


class Timings(Message, frozen=True, kw_only=True):
    """Where the time of a request went."""

    queue_s: Seconds
    prefill_s: Seconds
    decode_s: Seconds


class RoutingFacts(Message, frozen=True, kw_only=True):
    """What a quality budget did to one answer.

    An event is one token in one layer.
    """

    epsilon: float
    """Mean share of the gate mass that might be lost."""
    basis: Basis
    """Where epsilon came from: a budget, by way of a calibration or of the rule for models without
    one, or the request itself."""
    events: Count
    changed: Count
    """Events whose selection differs from the exact one."""
    swaps: Count
    """Experts traded."""
    lost_mass: float
    """Mean share of the gate mass that was lost, at most epsilon."""
    swap_share: float
    """Experts traded, as a share of all that were selected."""
    agreement: float
    """Share of the events with the exact selection."""
    credit_left: float
    """Lost mass that was still allowed at the end."""


class Finished(Message, frozen=True, kw_only=True):
    """The answer is complete; `text` is the rest that was held back for stop strings or split characters.

    `routing` is None where the answer was exact because no budget was in force.
    """

    id: Id
    reason: FinishReason
    text: str
    usage: Usage
    timings: Timings
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    prompt_logprobs: list[float | None] | None = None
    routing: RoutingFacts | None = None


class Embedded(Message, frozen=True, kw_only=True):
    """Answer to `embed`: `vector` holds `dim` float32, little-endian; in a frame it is text in base64."""

    id: Id
    vector: bytes
    dim: Count
    pooling: Pooling
    usage: Usage
    timings: Timings


class Failed(Message, frozen=True, kw_only=True):
    """A request failed, or the connection if `id` is None; `retry_after_s` is that of `Overloaded`."""

    id: Id | None
    code: str
    text: str
    retryable: bool
    retry_after_s: Seconds | None = None

    @classmethod
    def of(cls, request_id: str | None, error: SternaError) -> Failed:
        """Return how an error travels."""
        wait_s = error.retry_after_s if isinstance(error, Overloaded) else None
        return cls(
            id=request_id, code=error.code, text=str(error), retryable=error.retryable, retry_after_s=wait_s
        )


class Pong(Message, frozen=True, kw_only=True):
    """Answer to `ping`."""

    nonce: Count


class Report(Message, frozen=True, kw_only=True):
    """Answer to `status` and `resize`.

    `body` is free of bytes and non-finite numbers, nested at most a few levels.
    """

    id: Id
    body: dict[str, Any]


class Tokenized(Message, frozen=True, kw_only=True):
    """Answer to `tokenize`."""

    id: Id
    token_ids: list[TokenId]


class Detokenized(Message, frozen=True, kw_only=True):
    """Answer to `detokenize`."""

    id: Id
    text: str


class Templated(Message, frozen=True, kw_only=True):
    """Answer to `apply_template`."""

    id: Id
    text: str


class Drained(Message, frozen=True, kw_only=True):
    """Answer to `drain`: nothing runs any more."""

    id: Id


class GoingAway(Message, frozen=True, kw_only=True):
    """The daemon stops; running requests are finished or fail with `shutting_down`."""

    text: str


Request = (
    Hello | Generate | Embed | Cancel | Ping | Status
    | Tokenize | Detokenize | ApplyTemplate | Drain | Resize
)  # fmt: skip
Reply = (
    Welcome | Accepted | Tokens | Finished | Embedded | Failed
    | Pong | Report | Tokenized | Detokenized | Templated | Drained | GoingAway
)  # fmt: skip


def tag_of(message: type[Message]) -> str:
    """Return the tag of a message class: `GoingAway` is `going_away`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", message.__name__).lower()


REQUESTS: dict[str, type[Message]] = {tag_of(cls): cls for cls in get_args(Request)}
REPLIES: dict[str, type[Message]] = {tag_of(cls): cls for cls in get_args(Reply)}
