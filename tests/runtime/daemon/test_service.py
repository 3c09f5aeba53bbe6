"""What the service tells the scheduler of a quality budget or a vector, and the client of what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import gguf
import msgspec
import numpy as np
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

from sterna.runtime.config import Config, embedded_model
from sterna.runtime.daemon.engine.link import EngineLink
from sterna.runtime.daemon.model.model_memory import ModelMemory
from sterna.runtime.daemon.model.served_model import ServedModel
from sterna.runtime.daemon.service import Service
from sterna.runtime.daemon.totals import Totals
from sterna.runtime.protocol import messages as m
from sterna.runtime.quality.calibration import UNCALIBRATED_EPSILON
from sterna.scheduler.messages import RoutingReport, Step, StreamsFailed, StreamStep, Submit
from sterna.shm.errors import BadRequest, TooLong

OWNER = b"connection"
PROMPT = [0, 5, 6, 7]
TOP_K = 2


class Recorder:
    """Stands where the link to the scheduler is, and keeps what is submitted: no process is started."""

    def __init__(self) -> None:
        self.submitted: list[Submit] = []
        self.on_step: Callable[[Step], None]
        self.on_failed: Callable[[StreamsFailed], None]
        self.on_restart: Callable[[], None]

    def submit(self, request: Submit) -> None:
        self.submitted.append(request)

    def cancel(self, stream: int, serial: int, then: Callable[[], None]) -> None:
        then()


MEMORIES: list[ModelMemory] = []
"""Of the benches of one test."""


@pytest.fixture(autouse=True)
def give_memory_back() -> Iterator[None]:
    yield
    while MEMORIES:
        MEMORIES.pop().close()


class Bench:
    """A service over the embedded model; `generate` returns what the scheduler would be told."""

    def __init__(self, model: ServedModel, default_budget: float = 0.0) -> None:
        self.engine = Recorder()
        self.memory = ModelMemory(model)
        MEMORIES.append(self.memory)
        self.sent: list[m.Message] = []
        self.service = Service(
            Config(max_num_seqs=2, ctx_size=model.context),
            model,
            self.memory,
            cast(EngineLink, self.engine),
            lambda owner, message: self.sent.append(message),
            default_budget,
        )

    def generate(self, **fields: object) -> Submit:
        request = m.Generate(id=f"r{len(self.engine.submitted)}", token_ids=PROMPT, **fields)  # type: ignore[arg-type]
        self.service.generate("client", OWNER, request)
        return self.engine.submitted[-1]

    def step(self, submit: Submit, computed: int, report: RoutingReport | None, finish: str | None) -> None:
        part = StreamStep(
            stream=submit.stream, serial=submit.serial, computed=computed, token=9, finish=finish,
            routing=report,
        )  # fmt: skip
        self.engine.on_step(Step(number=1, busy_ns=1, streams=[part]))

    def finished(self) -> m.Finished:
        found = self.sent[-1]
        assert isinstance(found, m.Finished)
        return found


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedModel]:
    """Return the embedded model under another name, where no calibration is beside it or in the cache."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.symlink_to(embedded_model())
    model = ServedModel.load(Config(model=path, max_num_seqs=2, ctx_size=64))
    yield model
    model.close()


def test_budget_becomes_a_mean_of_lost_mass(model: ServedModel) -> None:
    bench = Bench(model)
    plain = bench.generate()
    assert (plain.epsilon, plain.stepped_from, plain.credit) == (0.0, None, 0.0)
    half = bench.generate(quality_budget=0.005)
    assert half.epsilon == pytest.approx(UNCALIBRATED_EPSILON * 0.005)
    assert (half.lossy_from, half.stepped_from) == (len(PROMPT), None)


def test_lost_mass_and_stepped_prompts_are_passed_on(model: ServedModel) -> None:
    scored = Bench(model).generate(lost_mass=0.04, stepped=True, prompt_logprobs=True)
    assert (scored.epsilon, scored.lossy_from, scored.stepped_from) == (0.04, 1, 1)
    assert scored.prompt_logprobs


def test_default_budget_is_for_those_who_name_none(model: ServedModel) -> None:
    bench = Bench(model, default_budget=0.01)
    assert bench.generate().epsilon == pytest.approx(UNCALIBRATED_EPSILON * 0.01)
    assert bench.generate(quality_budget=0.0).epsilon == 0.0
    assert msgspec.to_builtins(bench.service.quality()) == {
        "budget": 0.01,
        "lost_mass": pytest.approx(UNCALIBRATED_EPSILON * 0.01),
        "basis": "uncalibrated",
        "calibrated_shares": [],
    }


def test_steps_add_up_to_the_facts_of_the_answer(model: ServedModel) -> None:
    bench = Bench(model)
    submit = bench.generate(lost_mass=0.1, max_tokens=2)
    bench.step(submit, 4, RoutingReport(credit=0.0, events=0, changed=0, swaps=0, lost=0.0), None)
    bench.step(submit, 5, RoutingReport(credit=0.3, events=5, changed=2, swaps=3, lost=0.25), None)
    bench.step(submit, 6, RoutingReport(credit=0.2, events=5, changed=1, swaps=1, lost=0.5), "length")
    assert bench.finished().routing == m.RoutingFacts(
        epsilon=0.1,
        basis="given",
        events=10,
        changed=3,
        swaps=4,
        lost_mass=pytest.approx(0.075),
        swap_share=4 / (10 * TOP_K),
        agreement=0.7,
        credit_left=0.2,
    )


def test_exact_answers_have_no_facts(model: ServedModel) -> None:
    bench = Bench(model, default_budget=0.01)
    submit = bench.generate(quality_budget=0.0, max_tokens=1)
    bench.step(submit, 4, None, "length")
    assert bench.finished().routing is None


def test_credit_survives_the_scheduler(model: ServedModel) -> None:
    """A new one continues with what was left: a kill must not refill an account, nor empty it."""
    bench = Bench(model)
    first = bench.generate(lost_mass=0.1)
    bench.step(first, 4, RoutingReport(credit=0.4, events=5, changed=0, swaps=0, lost=0.0), None)
    bench.step(first, 5, RoutingReport(credit=0.15, events=5, changed=2, swaps=3, lost=0.25), None)
    bench.engine.on_restart()
    again = bench.engine.submitted[-1]
    assert (again.stream, again.serial, again.credit) == (first.stream, first.serial, 0.15)
    assert (again.epsilon, again.lossy_from) == (0.1, len(PROMPT))
    assert (again.committed, again.computed) == (6, 5)
    bench.step(again, 6, RoutingReport(credit=0.2, events=5, changed=1, swaps=1, lost=0.05), "length")
    facts = bench.finished().routing
    assert facts is not None
    assert (facts.events, facts.swaps) == (15, 4)  # of both


# ---- vectors ----


def embed(bench: Bench, **fields: object) -> Submit:
    request = m.Embed(**{"id": f"e{len(bench.engine.submitted)}", "token_ids": PROMPT} | fields)  # type: ignore[arg-type]
    bench.service.embed("client", OWNER, request)
    return bench.engine.submitted[-1]


def pool(bench: Bench, submit: Submit, computed: int, values: list[float], finish: str | None = None) -> None:
    units = (np.array(values) * 2**32).astype(np.int64)
    part = StreamStep(
        stream=submit.stream, serial=submit.serial, computed=computed, finish=finish, pooled=units.tobytes()
    )
    bench.engine.on_step(Step(number=1, busy_ns=1, streams=[part]))


def test_vector_is_the_sum_of_the_steps_that_were_committed(model: ServedModel) -> None:
    bench = Bench(model, default_budget=0.01)
    first = embed(bench, pooling="mean", normalize=False)
    assert (first.pooling, first.prompt_logprobs, first.epsilon) == ("mean", False, 0.0)
    pool(bench, first, 2, [1.0, 2.0])
    bench.engine.on_restart()
    again = bench.engine.submitted[-1]
    assert (again.pooling, again.computed, again.committed) == ("mean", 2, len(PROMPT))
    pool(bench, again, 4, [3.0, 0.5], "stop")
    (answer,) = bench.sent  # no `accepted` before it
    assert isinstance(answer, m.Embedded)
    assert np.frombuffer(answer.vector, "<f4").tolist() == [1.0, 0.625]
    assert (answer.dim, answer.pooling) == (2, "mean")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 0)
    assert (bench.service.totals.finished, bench.service.num_running) == (1, 0)


def test_cancelled_vector_is_an_error(model: ServedModel) -> None:
    bench = Bench(model)
    submit = embed(bench)
    bench.service.cancel("client", "e0")
    (answer,) = bench.sent
    assert isinstance(answer, m.Failed)
    assert (answer.id, answer.code) == ("e0", "cancelled")
    pool(bench, submit, 4, [1.0], "stop")  # a step that ran meanwhile
    assert len(bench.sent) == 1


def test_text_to_embed_may_fill_the_context_and_no_more(model: ServedModel) -> None:
    assert embed(Bench(model), token_ids=[5] * 64).prompt_length == 64
    with pytest.raises(TooLong, match=r"the prompt has 65 tokens; the context has 64$"):
        embed(Bench(model), token_ids=[5] * 65)


def test_text_that_is_not_worth_tokenizing_is_refused_by_its_length(model: ServedModel) -> None:
    """The limit is no promise: a text of that length is tokenized, and may be too long then."""
    most = model.max_prompt_chars
    with pytest.raises(TooLong, match=r"the prompt has \d+ tokens; the context has 64$"):
        embed(Bench(model), token_ids=None, prompt="a" * most)
    with pytest.raises(TooLong) as caught:
        embed(Bench(model), token_ids=None, prompt="a" * (most + 1))
    assert str(caught.value) == (
        f"the prompt has {most + 1} characters; for a context of 64 tokens no more than {most} are tokenized"
    )


def test_text_to_embed_ends_as_the_tokenizer_says(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = embed(Bench(model), token_ids=None, prompt="a king").prompt_length
    monkeypatch.setattr(model.tokenizer, "adds_eos", True)
    bench = Bench(model)
    ended = embed(bench, token_ids=None, prompt="a king")
    assert ended.prompt_length == plain + 1
    assert bench.memory.streams.tokens[ended.stream, plain] == model.tokenizer.eos_id
    assert embed(bench).prompt_length == len(PROMPT)  # token ids are taken as they are


def test_file_says_how_to_pool(model: ServedModel, tmp_path: Path) -> None:
    assert model.default_pooling == "last"  # it says nothing
    pooled = pooled_model(tmp_path, 2)
    assert pooled.default_pooling == "cls"
    pooled.close()


def test_file_of_a_reranker_makes_no_vector_unless_asked(tmp_path: Path) -> None:
    model = pooled_model(tmp_path, 4)
    with pytest.raises(BadRequest, match=r"says 4 .*ask for mean, cls or last"):
        embed(Bench(model))
    assert embed(Bench(model), pooling="cls").pooling == "cls"
    model.close()


def pooled_model(folder: Path, value: int) -> ServedModel:
    """Open the embedded model with `pooling_type` among its keys."""
    path = folder / "pooled.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    added = {"deepseek2.pooling_type": MetadataDetails(gguf.GGUFValueType.UINT32, value)}
    copy_with_new_metadata(gguf.GGUFReader(embedded_model()), writer, added, [])
    return ServedModel.load(Config(model=path, max_num_seqs=2, ctx_size=64))


# ---- figures ----


def test_mean_time_between_ends_forgets_what_is_old() -> None:
    totals = Totals()
    assert totals.seconds_per_end(0.0) is None
    for now_s in (1.0, 2.0, 3.0, 4.0):
        totals.end(now_s)
    assert totals.seconds_per_end(5.0) == 2.5
    assert totals.seconds_per_end(12.5) == 5.0
    assert totals.seconds_per_end(100.0) is None
