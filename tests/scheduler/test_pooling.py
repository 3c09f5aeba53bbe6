"""Vectors of prompts: what numpy makes of the engine's hidden states, however they were computed."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest

from sterna.runtime.config import embedded_model
from sterna.scheduler.decoder.decoder import Mixture
from sterna.scheduler.decoder.token_batch import TokenBatch
from sterna.scheduler.messages import Pooling
from sterna.scheduler.pooling import MAX_SUM, PooledPrompt, step_part
from sterna.scheduler.state import Segment
from sterna.shm.errors import InternalError

from . import altered_model as altered
from .local_engine import LocalEngine

GOLDEN = Path(__file__).parent.parent / "data" / "tales-golden.json"
PROMPTS = [case["prompt_ids"] for case in json.loads(GOLDEN.read_text())["cases"]]
LONG = [token for prompt in PROMPTS for token in prompt][:150]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@cache
def engine(workers: int = 1, max_batch_tokens: int = 512) -> LocalEngine:
    return LocalEngine(workers=workers, max_batch_tokens=max_batch_tokens, streams=8, context=160)


@pytest.fixture(scope="module", autouse=True)
def forget_engines() -> Iterator[None]:
    yield
    engine.cache_clear()


def vector(
    pooling: Pooling, parts: list[bytes], length: int, *, normalize: bool = True
) -> npt.NDArray[np.float32]:
    whole = PooledPrompt(pooling, normalize=normalize)
    for part in parts:
        whole.add(part)
    return whole.vector(length)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> npt.NDArray[np.float64]:
    """Return the engine's hidden states of LONG, normed by numpy."""
    local = engine()
    model = local.engine._model
    forward, seen = model.forward, []

    def watched(batch: TokenBatch, mixture: Mixture) -> npt.NDArray[np.float32]:
        seen.append(forward(batch, mixture).astype(np.float64))
        return model.x[: len(batch.ids)]

    monkeypatch.setattr(model, "forward", watched)
    local.run([LONG], 1)
    (x,) = seen
    scale = np.sqrt((x * x).mean(axis=1, keepdims=True) + local.plan.hyper.eps)
    normed: npt.NDArray[np.float64] = x / scale * altered.values("output_norm.weight")
    return normed


def test_vectors_are_numpys(states: npt.NDArray[np.float64]) -> None:
    expected = {"mean": states.mean(axis=0), "cls": states[0], "last": states[-1]}
    assert np.abs(expected["last"] - expected["mean"]).max() > 0.1
    found = engine().run([LONG] * 3, 1, pooling=POOLINGS)
    for pooling, one in zip(POOLINGS, found, strict=True):
        raw = vector(pooling, one.pooled, len(LONG), normalize=False)
        assert raw.dtype == np.float32
        np.testing.assert_allclose(raw, expected[pooling], rtol=1e-5, atol=1e-6)
        unit = vector(pooling, one.pooled, len(LONG))
        assert np.linalg.norm(unit.astype(np.float64)) == pytest.approx(1.0, abs=1e-6)
        length = np.linalg.norm(expected[pooling])
        np.testing.assert_allclose(unit, expected[pooling] / length, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("workers", "tokens"), [(1, 7), (2, 64), (3, 512)])
def test_bytes_do_not_depend_on_chunks_workers_or_neighbours(workers: int, tokens: int) -> None:
    expected = {p: engine().run([LONG], 1, pooling=[p])[0].pooled for p in POOLINGS}
    assert [len(parts) for parts in expected.values()] == [1, 1, 1]
    beside = [LONG, PROMPTS[4], LONG, LONG]
    found = engine(workers, tokens).run(beside, 5, pooling=["mean", None, "cls", "last"])
    assert len(found[1].tokens) == 5
    for pooling, one in zip(POOLINGS, (found[0], found[2], found[3]), strict=True):
        assert one.tokens == []
        assert one.reason == "stop"
        ours = vector(pooling, one.pooled, len(LONG))
        assert ours.tobytes() == vector(pooling, expected[pooling], len(LONG)).tobytes()
    assert (len(found[0].pooled) > 1) == (tokens < len(LONG))


def test_a_prompt_may_fill_the_context() -> None:
    full = (LONG * 2)[:160]
    (found,) = engine().run([full], 1, pooling=["last"])
    assert found.reason == "stop"
    assert len(found.pooled[0]) == 4 * engine().plan.hyper.d_model


def part_of(pooling: Pooling, state: npt.NDArray[np.float32]) -> bytes | None:
    whole = Segment(stream=0, serial=1, start=0, count=len(state), sample=False)
    return step_part(pooling, whole, 0, len(state), lambda rows: state[rows])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, MAX_SUM])
def test_what_is_no_number_is_an_error(pooling: Pooling, bad: float) -> None:
    states = np.full((1, 32), bad, np.float32)
    if pooling != "mean" and np.isfinite(bad):
        assert part_of(pooling, states) == states.tobytes()
        return
    with pytest.raises(InternalError):
        part_of(pooling, states)


def test_sums_are_exact_and_zeros_stay_zeros() -> None:
    states = np.zeros((40, 32), np.float32)  # more than are normed at once
    part = part_of("mean", states)
    assert part is not None
    assert not vector("mean", [part], 40).any()
    states[:, 0] = [2.0**20, 2.0**-20] * 20
    part = part_of("mean", states)
    assert part is not None
    assert vector("mean", [part], 40, normalize=False)[0] == (2.0**20 + 2.0**-20) / 2


def test_a_prompt_without_a_step_has_no_vector() -> None:
    with pytest.raises(InternalError, match="without a hidden state"):
        PooledPrompt("cls", normalize=True).vector(3)


# ---- against llama.cpp ----


def llama_cpps(tokens: list[int], pooling: Pooling) -> npt.NDArray[np.float32]:
    """Return the vector that llama.cpp computes of the embedded model, not normalized; skips without it.

    LLAMA_CPP_LIB_PATH names the folder with libllama.so where the Python package brings none of its own.
    """
    lib = pytest.importorskip("llama_cpp.llama_cpp")
    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(str(embedded_model()).encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.embeddings = True
    settings.pooling_type = {"mean": 1, "cls": 2, "last": 3}[pooling]
    context = lib.llama_init_from_model(model, settings)
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
    assert lib.llama_decode(context, batch) == 0
    values = lib.llama_get_embeddings_seq(context, 0)
    found = np.array(np.ctypeslib.as_array(values, (lib.llama_model_n_embd(model),)))
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return found


@pytest.mark.bench
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_llama_cpps(pooling: Pooling) -> None:
    theirs = llama_cpps(LONG, pooling).astype(np.float64)
    (found,) = engine().run([LONG], 1, pooling=[pooling])
    ours = vector(pooling, found.pooled, len(LONG), normalize=False).astype(np.float64)
    cosine = float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))
    apart = float(np.abs(ours - theirs).max())
    print(f"{pooling}: cosine {cosine:.6f}, largest difference {apart:.4f} of {np.abs(theirs).max():.2f}")
    assert cosine > 0.999
