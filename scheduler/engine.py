"""The engine: turns a planned step into tokens. Knows arrays and the lane, no sockets or clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from ..shm.errors import InternalError
from ..workers.kernels.layers.norms import first_bad_row
from .decoder.buffers import LOGIT_ROWS
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
from .state import Work


@dataclass(frozen=True, slots=True)
class _LogitRow:
    """One row of logits: `row` of the batch; what follows is `token`, or is to be sampled."""

    row: int
    part: _SequencePart
    token: int | None


@dataclass(slots=True)
class _SequencePart:
    """One sequence's part of a step, and what has come of it so far."""

    work: Work
    first_row: int
    """Of the batch; its rows lie one after the other."""
    pooled: bytes | None = None
    scores: list[float] = field(default_factory=list)
    """Log-probabilities of prompt tokens."""
    sampled: StreamStep | None = None

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.work.segment.start + self.work.segment.count

    def result(self, routing: RoutingReport | None) -> StreamStep:
        """Return all that the step did for the sequence."""
        segment = self.work.segment
        step = self.sampled or StreamStep(
            stream=segment.stream, serial=segment.serial, computed=self.end, pooled=self.pooled
        )
        if self.scores:
            return msgspec.structs.replace(
                step, prompt_from=segment.start + 1, prompt_logprobs=self.scores, routing=routing
            )
        return step if routing is None else msgspec.structs.replace(step, routing=routing)


class Engine:
    """One model over dense weights, stream memory and lane; `assembly` puts one together."""

    def __init__(
        self,
        plan: ModelPlan,
        weights: DenseWeights,
        streams: StreamMemory,
        runner: ExpertRunner,
        max_batch_tokens: int,
        prefetch: str = "auto",
        log: RoutingLog | None = None,
    ) -> None:
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

    def step(self, work: Sequence[Work]) -> list[StreamStep]:
        """Compute `work` as one batch; return what it did, in the same order.

        Raises WorkerLost, InternalError, or what reading an expert met (see `ExpertRunner.run`); nothing that
        counts has changed then and the step can be repeated.
        """
        batch = self._batch(work)
        self._mixture.begin(self._ledger.begin(work))
        if self._log is not None:
            turns = np.repeat([w.request.serial for w in work], [w.segment.count for w in work])
            self._log.begin(turns, any(w.segment.count > 1 for w in work))
        self._model.forward(batch, self._mixture)
        if (row := first_bad_row(self._model.x, len(batch.ids), self._plan.hyper.d_model)) >= 0:
            raise InternalError(f"position {batch.positions[row]}: the hidden state is not finite")
        parts = self._parts(work)
        wanted = [each for part in parts for each in self._wanted(part)]
        for start in range(0, len(wanted), LOGIT_ROWS):
            self._score(wanted[start : start + LOGIT_ROWS], batch)
        self._ledger.commit()
        return [part.result(self._ledger.report(part.work.segment.stream)) for part in parts]

    def _batch(self, work: Sequence[Work]) -> TokenBatch:
        """Gather the segments' tokens; a stream's rows lie one after the other."""
        ids, streams, positions = [], [], []
        for s in (w.segment for w in work):
            end = s.start + s.count
            ids.append(self._tokens[s.stream, s.start : end])
            streams.append(np.full(s.count, s.stream, np.int32))
            positions.append(np.arange(s.start, end, dtype=np.int32))
        return TokenBatch(np.concatenate(ids), np.concatenate(streams), np.concatenate(positions))

    def _parts(self, work: Sequence[Work]) -> list[_SequencePart]:
        """Return the sequences with their rows and what the step adds to the vector of a prompt."""
        parts: list[_SequencePart] = []
        row = 0
        for w in work:
            part = _SequencePart(w, row)
            if w.request.pooling is not None:
                length = w.request.prompt_length
                part.pooled = step_part(w.request.pooling, w.segment, row, length, self._model.normed)
            parts.append(part)
            row += w.segment.count
        return parts

    def _wanted(self, part: _SequencePart) -> list[_LogitRow]:
        """List the rows whose logits are needed: the last of a sampling segment, or a whole prompt's."""
        s, request, row = part.work.segment, part.work.request, part.first_row
        wanted: list[_LogitRow] = []
        if request.prompt_logprobs:
            known = min(part.end, request.prompt_length - 1)
            tokens = self._tokens[s.stream, s.start + 1 : known + 1].tolist()
            wanted.extend(_LogitRow(row + i, part, token) for i, token in enumerate(tokens))
        if s.sample:
            wanted.append(_LogitRow(row + s.count - 1, part, None))
        return wanted

    def _score(self, wanted: Sequence[_LogitRow], batch: TokenBatch) -> None:
        """Compute at most LOGIT_ROWS rows of logits and what is wanted of each."""
        self._model.logits(np.array([w.row for w in wanted], np.int32), self._logits)
        if (row := first_bad_row(self._logits, len(wanted), self._model.padded_vocabulary)) >= 0:
            raise InternalError(f"position {batch.positions[wanted[row].row]}: the logits are not finite")
        for w, logits in zip(wanted, self._logits[:, : self._plan.vocab_size], strict=False):
            if w.token is not None:
                w.part.scores.append(float(logits[w.token]) - log_normaliser(logits))
            else:
                w.part.sampled = self._sample(w.part, logits)

    def _sample(self, part: _SequencePart, logits: npt.NDArray[np.float32]) -> StreamStep:
        segment, request = part.work.segment, part.work.request
        token = choose(logits, request.sampling, part.end)
        if part.end < self._streams.shape.context:
            self._tokens[segment.stream, part.end] = token
        return StreamStep(
            stream=segment.stream,
            serial=segment.serial,
            computed=part.end,
            token=token,
            score=None if request.logprobs is None else score(logits, token, request.logprobs),
        )
