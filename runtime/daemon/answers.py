"""One request from its acceptance to its end: text, stop strings, log-probabilities, times.

No sockets and no loop: times are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...scheduler.messages import RoutingReport, Sampling, StreamStep, Submit
from ...scheduler.pooling import PooledPrompt
from ...shm.errors import Cancelled
from ..protocol.messages import (
    Embedded,
    Failed,
    Finished,
    FinishReason,
    Generate,
    RoutingFacts,
    Timings,
    TokenItem,
    TokenLogprob,
    Usage,
)
from ..quality.calibration import Allowance
from ..text.detokenizer import StopMatcher, StreamDetokenizer
from ..text.tokenizer import Tokenizer


@dataclass(slots=True)
class RoutingSum:
    """What routing within a budget did to one answer so far; `credit` is what the last step left."""

    allowance: Allowance
    credit: float = 0.0
    events: int = 0
    changed: int = 0
    swaps: int = 0
    lost: float = 0.0

    def add(self, report: RoutingReport) -> None:
        """Add one step."""
        self.credit = report.credit
        self.events += report.events
        self.changed += report.changed
        self.swaps += report.swaps
        self.lost += report.lost

    def facts(self, top_k: int) -> RoutingFacts | None:
        """Return the whole, None for an exact answer; `top_k` experts were selected in each event."""
        if self.allowance.epsilon <= 0:
            return None
        events = max(1, self.events)
        return RoutingFacts(
            epsilon=self.allowance.epsilon,
            basis=self.allowance.basis,
            events=self.events,
            changed=self.changed,
            swaps=self.swaps,
            lost_mass=self.lost / events,
            swap_share=self.swaps / (events * top_k or 1),
            agreement=1 - self.changed / events,
            credit_left=self.credit,
        )


@dataclass(slots=True)
class Answer:
    """A request and what has been generated for it; with `pooled`, the vector of its prompt instead."""

    request: Generate
    prompt: list[int]
    max_length: int
    seed: int
    serial: int
    accepted_s: float
    owner: bytes  # the connection it came on
    detokenizer: StreamDetokenizer
    matcher: StopMatcher
    routing: RoutingSum
    pooled: PooledPrompt | None = None
    stream: int = -1
    started_s: float = 0.0
    first_token_s: float = 0.0
    count: int = 0
    prompt_logprobs: list[float | None] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        request: Generate,
        prompt: list[int],
        tokenizer: Tokenizer,
        *,
        context: int,
        seed: int,
        serial: int,
        now_s: float,
        owner: bytes,
        allowance: Allowance,
        pooled: PooledPrompt | None = None,
    ) -> Answer:
        """Return an answer that has not begun; `prompt` is shorter than `context` if a token is to follow."""
        return cls(
            request=request,
            prompt=prompt,
            max_length=min(len(prompt) + request.max_tokens, context),
            seed=seed,
            serial=serial,
            accepted_s=now_s,
            owner=owner,
            detokenizer=StreamDetokenizer(tokenizer),
            matcher=StopMatcher(request.stop),
            routing=RoutingSum(allowance),
            pooled=pooled,
            prompt_logprobs=[None] * len(prompt) if request.prompt_logprobs else [],
        )

    def submission(self, stop_ids: frozenset[int], *, committed: int, computed: int) -> Submit:
        """Return what the scheduler is told; the lengths are those of the stream's record."""
        r = self.request
        return Submit(
            stream=self.stream,
            serial=self.serial,
            prompt_length=len(self.prompt),
            committed=committed,
            computed=computed,
            max_length=self.max_length,
            sampling=Sampling(
                temperature=r.temperature, top_k=r.top_k, top_p=r.top_p, min_p=r.min_p, seed=self.seed
            ),
            stop_ids=[] if r.ignore_eos else sorted(stop_ids),
            logprobs=r.logprobs,
            prompt_logprobs=r.prompt_logprobs,
            stepped_from=1 if r.stepped else None,
            epsilon=self.routing.allowance.epsilon,
            # The first token is computed alone either way; a prompt that is computed as such stays exact.
            lossy_from=1 if r.stepped else len(self.prompt),
            credit=self.routing.credit,
            pooling=None if self.pooled is None else self.pooled.pooling,
        )

    def take(self, step: StreamStep, now_s: float) -> tuple[TokenItem | None, bool]:
        """Add one step; return what to send and whether a stop string ended the answer."""
        if step.prompt_logprobs:
            first = step.prompt_from
            self.prompt_logprobs[first : first + len(step.prompt_logprobs)] = step.prompt_logprobs
        if step.routing is not None:
            self.routing.add(step.routing)
        if self.pooled is not None and step.pooled is not None:
            self.pooled.add(step.pooled)
        if step.token is None:
            return None, False
        if not self.count:
            self.first_token_s = now_s
        text, stopped = self.matcher.push(self.detokenizer.push([step.token]))
        logprobs = None
        if step.score is not None:
            top = [(token, value) for token, value in step.score.top]
            logprobs = [TokenLogprob(token_id=step.token, logprob=step.score.logprob, top=top)]
        item = TokenItem(
            id=self.request.id, index=self.count, token_ids=[step.token], text=text, logprobs=logprobs
        )
        self.count += 1
        return item, stopped

    def finish(
        self, reason: FinishReason, stopped: bool, now_s: float, top_k: int
    ) -> Finished | Embedded | Failed:
        """Return the last message; after a stop string nothing that was held back is sent.

        `top_k`: experts selected in each routed layer.
        """
        if self.pooled is not None:
            return self._embedded(self.pooled, reason, now_s)
        rest = ""
        if not stopped:
            text, hit = self.matcher.push(self.detokenizer.finish())
            rest = text if hit else text + self.matcher.finish()
        return Finished(
            id=self.request.id,
            reason=reason,
            text=rest,
            usage=Usage(prompt_tokens=len(self.prompt), completion_tokens=self.count),
            timings=self._timings(now_s),
            seed=self.seed,
            prompt_logprobs=self.prompt_logprobs if self.request.prompt_logprobs else None,
            routing=self.routing.facts(top_k),
        )

    def _timings(self, now_s: float) -> Timings:
        began_s = self.started_s or now_s
        first = self.first_token_s or now_s
        return Timings(
            queue_s=began_s - self.accepted_s, prefill_s=first - began_s, decode_s=max(0.0, now_s - first)
        )

    def _embedded(self, pooled: PooledPrompt, reason: FinishReason, now_s: float) -> Embedded | Failed:
        if reason == "cancelled":
            error = Cancelled("cancelled before its prompt was computed")
            return Failed.of(self.request.id, error)
        vector = pooled.vector(len(self.prompt))
        return Embedded(
            id=self.request.id,
            vector=vector.astype("<f4").tobytes(),
            dim=len(vector),
            pooling=pooled.pooling,
            usage=Usage(prompt_tokens=len(self.prompt), completion_tokens=0),
            timings=self._timings(now_s),
        )
