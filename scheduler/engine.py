"""The engine: turns a planned step into tokens. Knows arrays and the lane, no sockets or clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from ..shm.errors import InternalError
from ..workers.kernels.layers.norms import first_bad_row
from .decoder.buffers import LOGIT_ROWS
from .decoder.crew import Crew
from .decoder.decoder import Decoder
from .decoder.dense import DenseWeights
from .decoder.token_batch import TokenBatch
from .experts.foresight import Foresight
from .experts.mixture import Mixture
from .experts.routing_log import RoutingLog
from .experts.runner import ExpertRunner
from .kv import StreamMemory
from .messages import RoutingReport, StreamStep, Submit
from .model.plan import ModelPlan
from .pooling import step_part
from .residency.quality import QualityLedger
from .sampling import choose, log_normaliser, score
from .state import Segment


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One row of logits: `row` of the batch; what follows is `token`, or is to be sampled."""

    row: int
    segment: int
    token: int | None


class Engine:
    """One model over dense arena, stream memory and lane."""

    def __init__(
        self,
        plan: ModelPlan,
        dense: npt.NDArray[np.uint8],
        streams: StreamMemory,
        runner: ExpertRunner,
        max_batch_tokens: int,
        crew: Crew,
        prefetch: str = "auto",
        log: RoutingLog | None = None,
    ) -> None:
        weights = DenseWeights(plan, dense, crew)
        self._plan = plan
        self._streams = streams
        self._model = Decoder(plan, weights, streams, max_batch_tokens)
        self._log = log
        self._ledger = QualityLedger(streams.shape.streams)
        self._mixture = Mixture(plan, weights, runner, self._ledger, max_batch_tokens, prefetch, log)
        self._logits = np.zeros((LOGIT_ROWS, self._model.padded_vocabulary), np.float32)
        # Our own copy: the daemon may give a record to the next request while a step still runs.
        self._tokens = np.zeros_like(streams.tokens)

    @property
    def foresight(self) -> Foresight:
        """What asks for experts before they are needed."""
        return self._mixture.foresight

    def admit(self, request: Submit) -> None:
        """Take the stream's tokens from the stream memory; call it before the stream's first step."""
        known = self._streams.tokens[request.stream, : request.committed]
        self._tokens[request.stream, : request.committed] = known
        self._ledger.admit(request)

    def step(self, segments: Sequence[Segment], requests: Sequence[Submit]) -> list[StreamStep]:
        """Compute `segments` as one batch; request i belongs to segment i.

        Raises WorkerLost or InternalError; nothing that counts has changed then and the step can be
        repeated.
        """
        batch = self._batch(segments)
        self._mixture.begin(self._ledger.begin(segments, requests))
        if self._log is not None:
            turns = [request.serial for request in requests]
            prefill = any(s.count > 1 for s in segments)
            self._log.begin(np.repeat(turns, [s.count for s in segments]), prefill)
        self._model.forward(batch, self._mixture)
        if (row := first_bad_row(self._model.x, len(batch.ids), self._plan.hyper.d_model)) >= 0:
            raise InternalError(f"position {batch.positions[row]}: the hidden state is not finite")
        pooled = self._pooled(segments, requests)
        wanted = self._wanted(segments, requests)
        prompt: list[list[float]] = [[] for _ in segments]
        results: list[StreamStep | None] = [None] * len(segments)
        for start in range(0, len(wanted), LOGIT_ROWS):
            part = wanted[start : start + LOGIT_ROWS]
            self._model.logits(np.array([w.row for w in part], np.int32), self._logits)
            if (row := first_bad_row(self._logits, len(part), self._model.padded_vocabulary)) >= 0:
                raise InternalError(f"position {batch.positions[part[row].row]}: the logits are not finite")
            for w, row_logits in zip(part, self._logits[:, : self._plan.vocab_size], strict=False):
                if w.token is not None:
                    prompt[w.segment].append(float(row_logits[w.token]) - log_normaliser(row_logits))
                else:
                    results[w.segment] = self._sample(segments[w.segment], requests[w.segment], row_logits)
        self._ledger.commit()
        return [
            _whole(result or _computed(segment, part), segment, scores, self._ledger.report(segment.stream))
            for result, segment, part, scores in zip(results, segments, pooled, prompt, strict=True)
        ]

    def _batch(self, segments: Sequence[Segment]) -> TokenBatch:
        """Gather the segments' tokens; a stream's rows lie one after the other."""
        ids, streams, positions = [], [], []
        for s in segments:
            end = s.start + s.count
            ids.append(self._tokens[s.stream, s.start : end])
            streams.append(np.full(s.count, s.stream, np.int32))
            positions.append(np.arange(s.start, end, dtype=np.int32))
        return TokenBatch(np.concatenate(ids), np.concatenate(streams), np.concatenate(positions))

    def _wanted(self, segments: Sequence[Segment], requests: Sequence[Submit]) -> list[_Wanted]:
        """List the rows whose logits are needed: the last of a sampling segment, or a whole prompt's."""
        wanted: list[_Wanted] = []
        row = 0
        for number, (s, request) in enumerate(zip(segments, requests, strict=True)):
            if request.prompt_logprobs:
                known = min(s.start + s.count, request.prompt_length - 1)
                tokens = self._tokens[s.stream, s.start + 1 : known + 1].tolist()
                wanted.extend(_Wanted(row + i, number, token) for i, token in enumerate(tokens))
            row += s.count
            if s.sample:
                wanted.append(_Wanted(row - 1, number, None))
        return wanted

    def _pooled(self, segments: Sequence[Segment], requests: Sequence[Submit]) -> list[bytes | None]:
        """Return what the step adds to the vector of each segment's prompt."""
        parts: list[bytes | None] = []
        row = 0
        for s, r in zip(segments, requests, strict=True):
            part = None
            if r.pooling is not None:
                part = step_part(r.pooling, s, row, r.prompt_length, self._model.normed)
            parts.append(part)
            row += s.count
        return parts

    def _sample(self, segment: Segment, request: Submit, logits: npt.NDArray[np.float32]) -> StreamStep:
        position = segment.start + segment.count
        token = choose(logits, request.sampling, position)
        if position < self._streams.shape.context:
            self._tokens[segment.stream, position] = token
        return StreamStep(
            stream=segment.stream,
            serial=segment.serial,
            computed=position,
            token=token,
            score=None if request.logprobs is None else score(logits, token, request.logprobs),
        )


def _computed(segment: Segment, pooled: bytes | None) -> StreamStep:
    computed = segment.start + segment.count
    return StreamStep(stream=segment.stream, serial=segment.serial, computed=computed, pooled=pooled)


def _whole(
    step: StreamStep, segment: Segment, scores: list[float], routing: RoutingReport | None
) -> StreamStep:
    """Return `step` with the prompt's scores, if any were asked for, and the routing report."""
    if not scores:
        return step if routing is None else msgspec.structs.replace(step, routing=routing)
    return msgspec.structs.replace(
        step, prompt_from=segment.start + 1, prompt_logprobs=scores, routing=routing
    )
