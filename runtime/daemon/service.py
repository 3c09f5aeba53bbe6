"""Requests in the daemon: admission, queue, running answers, their end. No sockets.

An answer is queued until a stream record is free, then handed to the engine; each step's tokens are
committed to the stream memory before anybody hears of them.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from ...scheduler.messages import Step, StreamsFailed
from ...scheduler.pooling import PooledPrompt
from ...shm.errors import (
    BadRequest,
    NotFound,
    Overloaded,
    RequestError,
    ShuttingDown,
    SternaError,
    TooLong,
    request_error,
)
from ..config import Config
from ..protocol.messages import (
    Accepted,
    ApplyTemplate,
    Embed,
    Failed,
    FinishReason,
    Generate,
    Message,
    TokenItem,
    Tokens,
)
from ..protocol.report import QualityReport
from ..quality.calibration import Allowance, Calibration
from .announcement import context_shortage
from .answers import Answer
from .engine_link import EngineLink
from .loaded_model import LoadedModel

RATE_WINDOW_S = 10.0

Key = tuple[str, str]  # client, request id


@dataclass(slots=True)
class Totals:
    """Counters since the start, and the last seconds' tokens as (time, prompt, generated)."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    steps: int = 0
    last_step_s: float | None = None
    recent: deque[tuple[float, int, int]] = field(default_factory=deque)

    def add(self, now_s: float, prompt: int, generated: int) -> None:
        """Count one step's tokens."""
        self.steps += 1
        self.last_step_s = now_s
        self.prompt_tokens += prompt
        self.generated_tokens += generated
        self.recent.append((now_s, prompt, generated))

    def rates(self, now_s: float) -> tuple[float, float]:
        """Return (prompt, generated) tokens per second over the last ten seconds."""
        while self.recent and self.recent[0][0] < now_s - RATE_WINDOW_S:
            self.recent.popleft()
        prompt = sum(item[1] for item in self.recent)
        generated = sum(item[2] for item in self.recent)
        return prompt / RATE_WINDOW_S, generated / RATE_WINDOW_S


class Service:
    """All requests of one daemon. `send(owner, message)` delivers to a connection and never raises."""

    def __init__(
        self,
        config: Config,
        model: LoadedModel,
        engine: EngineLink,
        send: Callable[[bytes, Message], None],
        default_budget: float = 0.0,
    ) -> None:
        """`default_budget`: fraction of perplexity for requests that name none; 0 is exact."""
        self._config = config
        self._default_budget = default_budget
        self._context_shortage = context_shortage(config, model.plan.hyper, model.context)
        self._calibration = Calibration.load(model.path)
        self._model = model
        self._engine = engine
        self._send = send
        self._answers: dict[Key, Answer] = {}
        self._waiting: deque[Key] = deque()
        self._running: dict[int, Key] = {}  # by stream record
        self._free = list(range(model.streams_shape.streams - 1, -1, -1))
        self._serial = 0
        self.draining = False
        self.totals = Totals()
        self.on_idle: Callable[[], None] = lambda: None
        engine.on_step = self.take_step
        engine.on_failed = self.take_failed
        engine.on_restart = self.resubmit

    # ---- what clients ask for ----

    def embed(self, client: str, owner: bytes, request: Embed, ids: list[int] | None = None) -> None:
        """Admit a request as `generate` does; its answer is a vector, and no `accepted` comes before it."""
        pooling = request.pooling or self._model.default_pooling
        prompt = Generate(
            id=request.id, prompt=request.prompt, token_ids=request.token_ids, seed=0, quality_budget=0.0
        )
        self.generate(client, owner, prompt, ids, PooledPrompt(pooling, normalize=request.normalize))

    def generate(
        self,
        client: str,
        owner: bytes,
        request: Generate,
        ids: list[int] | None = None,
        pooled: PooledPrompt | None = None,
    ) -> None:
        """Admit a request; raises BadRequest, TooLong, Overloaded or ShuttingDown.

        ids: what `prompt_ids` gave for it, where that was asked before.
        """
        if self.draining:
            raise ShuttingDown("the daemon is stopping and takes no new requests")
        key = (client, request.id)
        if key in self._answers:
            raise BadRequest(f"id: a request {request.id!r} is running already")
        if len(self._waiting) >= self._config.max_queue:
            raise Overloaded(f"the queue is full: {len(self._waiting)} requests wait (max_queue)")
        prompt = self._prompt(request, to_embed=pooled is not None) if ids is None else ids
        self._serial += 1
        answer = Answer.create(
            request,
            prompt,
            self._model.tokenizer,
            context=self._model.context,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            serial=self._serial,
            now_s=time.monotonic(),
            owner=owner,
            allowance=self._allowance(request),
            pooled=pooled,
        )
        self._answers[key] = answer
        position = len(self._waiting)
        if pooled is None:
            self._send(owner, Accepted(id=request.id, prompt_token_ids=prompt, queue_position=position))
        self._waiting.append(key)
        self._start_waiting()

    def prompt_ids(self, request: Generate | Embed) -> list[int]:
        """Return the tokens of a request; for any thread, and takes a second for some million characters.

        Raises BadRequest and TooLong.
        """
        if isinstance(request, Generate):
            return self._prompt(request, to_embed=False)
        text = Generate(id=request.id, prompt=request.prompt, token_ids=request.token_ids)
        return self._prompt(text, to_embed=True)

    def _prompt(self, request: Generate, *, to_embed: bool) -> list[int]:
        if request.token_ids is not None:
            ids = list(request.token_ids)
            limit = self._model.plan.vocab_size
            for place, token in enumerate(ids[: self._model.context]):
                if token >= limit:
                    raise BadRequest(f"token_ids[{place}]: expected 0 to {limit - 1}, found {token}")
        else:
            text = request.prompt or ""
            if len(text) > self._model.max_prompt_chars:
                # Not worth the time of tokenizing it, in which nobody else would be served.
                raise TooLong(
                    f"the prompt has {len(text)} characters, at most {self._model.max_prompt_chars} "
                    f"fit into the context of {self._model.context} tokens"
                )
            tokenizer = self._model.tokenizer
            ids = tokenizer.encode(text, add_bos=request.add_bos, special=request.special)
            if request.special and ids[:2] == [tokenizer.bos_id] * 2:
                del ids[0]  # chat templates write BOS themselves
        if not ids:
            raise BadRequest("prompt: expected at least one token, found none")
        if to_embed and request.token_ids is None and self._model.tokenizer.adds_eos:
            # Embedding models are trained to gather the text in it; a prompt that goes on must not end.
            ids.append(self._model.tokenizer.eos_id or 0)
        if len(ids) >= self._model.context + to_embed:
            rest = "" if to_embed else ", the answer included"
            raise TooLong(
                f"the prompt has {len(ids)} tokens; the context has {self._model.context}{rest}"
                f"{self._context_shortage}"
            )
        return ids

    def _allowance(self, request: Generate) -> Allowance:
        if request.lost_mass is not None:
            return Allowance(request.lost_mass, "given")
        budget = self._default_budget if request.quality_budget is None else request.quality_budget
        return self._calibration.allowance(budget, self._resident_share)

    @property
    def _resident_share(self) -> float:
        """Share of the routed experts that memory has slots for."""
        return sum(self._model.limits) / max(1, self._model.plan.num_experts)

    def apply_template(self, request: ApplyTemplate, now: datetime) -> str:
        """Return a conversation as prompt text; for any thread, and blocks as `ChatTemplate.render` does.

        Raises BadRequest and TooLong.
        """
        if self._model.chat_template is None:
            raise BadRequest(
                f"no chat template in {self._model.path}: use generate with a prompt as the model expects it"
            )
        return self._model.chat_template.render(
            request.messages,
            now=now,
            tools=request.tools,
            documents=request.documents,
            add_generation_prompt=request.add_generation_prompt,
            template=request.template,
            options=request.options,
        )

    def cancel(self, client: str, request_id: str) -> None:
        """End a request; its owner gets `finished`. Raises NotFound."""
        key = (client, request_id)
        answer = self._answers.get(key)
        if answer is None:
            raise NotFound(f"no request {request_id!r} of this client runs or waits")
        self._end(key, answer, cancel=True)
        self.totals.cancelled += 1
        self._send(answer.owner, self._finish(answer, "cancelled", False, time.monotonic()))

    def forget_owner(self, owner: bytes) -> int:
        """End all requests of a connection that is gone; return how many."""
        gone = [(key, answer) for key, answer in self._answers.items() if answer.owner == owner]
        for key, answer in gone:
            self._end(key, answer, cancel=True)
            self.totals.cancelled += 1
        return len(gone)

    def fail_all(self, error: RequestError) -> None:
        """End every request with `error`."""
        for key, answer in list(self._answers.items()):
            self._end(key, answer, cancel=True)
            self._fail(answer, error)

    # ---- what the engine says ----

    def take_step(self, step: Step) -> None:
        """Commit a step, then tell the clients: one `tokens` message for each connection."""
        now_s = time.monotonic()
        items: dict[bytes, list[TokenItem]] = {}
        ended: list[tuple[bytes, Message]] = []
        prompt_tokens = generated = 0
        for part in step.streams:
            key = self._running.get(part.stream)
            answer = self._answers.get(key) if key else None
            if key is None or answer is None or answer.serial != part.serial:
                continue  # cancelled while the step ran
            before = int(self._model.streams.records[part.stream]["computed"])
            prompt_tokens += max(0, min(part.computed, len(answer.prompt)) - before)
            generated += part.token is not None
            self._model.commit(part.stream, part.computed, part.token)
            item, stopped = answer.take(part, now_s)
            if item is not None:
                items.setdefault(answer.owner, []).append(item)
            if part.finish or stopped:
                self._end(key, answer, cancel=not part.finish)
                self.totals.finished += 1
                reason: FinishReason = "length" if part.finish == "length" and not stopped else "stop"
                ended.append((answer.owner, self._finish(answer, reason, stopped, now_s)))
        self.totals.add(now_s, prompt_tokens, generated)
        for owner, tokens in items.items():
            self._send(owner, Tokens(items=tokens))
        for owner, finished in ended:
            self._send(owner, finished)
        self._start_waiting()

    def take_failed(self, failed: StreamsFailed) -> None:
        """End streams that the engine gave up."""
        for stream, serial in failed.streams:
            key = self._running.get(stream)
            answer = self._answers.get(key) if key else None
            if key is not None and answer is not None and answer.serial == serial:
                self._end(key, answer, cancel=False)
                self._fail(answer, request_error(failed.code, failed.text))
        self._start_waiting()

    def resubmit(self) -> None:
        """Tell a new scheduler of all running streams, from what is committed."""
        for stream, key in self._running.items():
            record = self._model.streams.records[stream]
            self._engine.submit(
                self._answers[key].submission(
                    self._model.tokenizer.stop_ids,
                    committed=int(record["committed"]),
                    computed=int(record["computed"]),
                )
            )

    # ---- the life of an answer ----

    def _start_waiting(self) -> None:
        while self._waiting and self._free:
            key = self._waiting.popleft()
            answer = self._answers[key]
            answer.stream = self._free.pop()
            answer.started_s = time.monotonic()
            self._running[answer.stream] = key
            self._model.put_prompt(answer.stream, answer.serial, answer.prompt)
            self._engine.submit(
                answer.submission(self._model.tokenizer.stop_ids, committed=len(answer.prompt), computed=0)
            )

    def _end(self, key: Key, answer: Answer, *, cancel: bool) -> None:
        """Forget an answer and free its record; `cancel`: the engine still has it."""
        del self._answers[key]
        if answer.stream < 0:
            self._waiting.remove(key)
        else:
            del self._running[answer.stream]
            self._model.release(answer.stream)
            if cancel:
                # A step that runs may yet write a token there: the next prompt has to wait for its end.
                self._engine.cancel(answer.stream, answer.serial, partial(self._reuse, answer.stream))
            else:
                self._free.append(answer.stream)
                self._free.sort(reverse=True)
        if not self._answers:
            self.on_idle()

    def _finish(self, answer: Answer, reason: FinishReason, stopped: bool, now_s: float) -> Message:
        return answer.finish(reason, stopped, now_s, self._model.plan.hyper.experts_used)

    def _reuse(self, stream: int) -> None:
        self._free.append(stream)
        self._free.sort(reverse=True)
        self._start_waiting()

    def _fail(self, answer: Answer, error: SternaError) -> None:
        self.totals.failed += 1
        self._send(
            answer.owner,
            Failed(id=answer.request.id, code=error.code, text=str(error), retryable=error.retryable),
        )

    # ---- what status shows ----

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a stream record."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that the engine has."""
        return len(self._running)

    @property
    def oldest_waiting_since_s(self) -> float | None:
        """When the oldest request in the queue was accepted, None if the queue is empty."""
        return self._answers[self._waiting[0]].accepted_s if self._waiting else None

    def quality(self) -> QualityReport:
        """Return what requests without a budget of their own may lose, and what that rests on."""
        allowance = self._calibration.allowance(self._default_budget, self._resident_share)
        return QualityReport(
            budget=self._default_budget,
            lost_mass=allowance.epsilon,
            basis=allowance.basis,
            calibrated_shares=list(self._calibration.shares),
        )

    def owners(self) -> Iterator[bytes]:
        """Return the connections that have requests."""
        yield from {answer.owner for answer in self._answers.values()}
