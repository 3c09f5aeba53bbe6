"""Requests in the daemon: admission, queue, running answers, their end. No sockets.

An answer is queued until a stream record is free, then handed to the engine; each step's tokens are
committed to the stream memory before anybody hears of them.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial

from ...scheduler.messages import Step, StreamsFailed
from ...scheduler.pooling import PooledPrompt
from ...shm.errors import (
    BadRequest,
    NoChatTemplate,
    NotFound,
    Overloaded,
    ShuttingDown,
    SternaError,
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
from .answers import Answer
from .engine.link import EngineLink
from .model.model_memory import ModelMemory
from .model.served_model import ServedModel
from .prompts import Prompts
from .totals import Totals

Key = tuple[str, str]  # client, request id


class Service:
    """All requests of one daemon. `send(owner, message)` delivers to a connection and never raises."""

    def __init__(
        self,
        config: Config,
        model: ServedModel,
        memory: ModelMemory,
        engine: EngineLink,
        send: Callable[[bytes, Message], None],
        default_budget: float = 0.0,
    ) -> None:
        """`default_budget`: fraction of perplexity for requests that name none; 0 is exact."""
        self._config = config
        self._default_budget = default_budget
        self._prompts = Prompts(config, model)
        self._calibration = Calibration.load(model.path)
        self._model = model
        self._memory = memory
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
            raise Overloaded(
                f"the queue is full: {len(self._waiting)} requests wait (max_queue)",
                self.totals.seconds_per_end(time.monotonic()),
            )
        prompt = self._prompts.ids(request, to_embed=pooled is not None) if ids is None else ids
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
        return self._prompts.ids(request, to_embed=isinstance(request, Embed))

    def _allowance(self, request: Generate) -> Allowance:
        if request.lost_mass is not None:
            return Allowance(request.lost_mass, "given")
        budget = self._default_budget if request.quality_budget is None else request.quality_budget
        return self._calibration.allowance(budget, self._memory.resident_share)

    def apply_template(self, request: ApplyTemplate, now: datetime) -> str:
        """Return a conversation as prompt text; for any thread, and blocks as `ChatTemplate.render` does.

        Raises NoChatTemplate, BadRequest and TooLong.
        """
        if self._model.chat_template is None:
            raise NoChatTemplate(
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

    def fail_all(self, error: SternaError) -> None:
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
            _, before = self._memory.lengths(part.stream)
            prompt_tokens += max(0, min(part.computed, len(answer.prompt)) - before)
            generated += part.token is not None
            self._memory.commit(part.stream, part.computed, part.token)
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
            committed, computed = self._memory.lengths(stream)
            stop_ids = self._model.tokenizer.stop_ids
            self._engine.submit(
                self._answers[key].submission(stop_ids, committed=committed, computed=computed)
            )

    # ---- the life of an answer ----

    def _start_waiting(self) -> None:
        while self._waiting and self._free:
            key = self._waiting.popleft()
            answer = self._answers[key]
            answer.stream = self._free.pop()
            answer.started_s = time.monotonic()
            self._running[answer.stream] = key
            self._memory.put_prompt(answer.stream, answer.serial, answer.prompt)
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
            self.totals.end(time.monotonic())
            self._memory.release(answer.stream)
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
        self._send(answer.owner, Failed.of(answer.request.id, error))

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
        allowance = self._calibration.allowance(self._default_budget, self._memory.resident_share)
        return QualityReport(
            budget=self._default_budget,
            lost_mass=allowance.epsilon,
            basis=allowance.basis,
            calibrated_shares=list(self._calibration.shares),
        )

    def owners(self) -> Iterator[bytes]:
        """Return the connections that have requests."""
        yield from {answer.owner for answer in self._answers.values()}
