"""Threads that share a step: the same bits with any number of them, and none left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from sterna.scheduler.decoder.crew import Crew
from sterna.workers.checkpoint.held.formats import Format, MatrixShape, activation_kind
from sterna.workers.checkpoint.held.packing import matrix_entry, pack_matrix
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME
from sterna.workers.kernels.layers import shared_dense
from sterna.workers.kernels.layers.activations import QuantizedRows
from sterna.workers.kernels.scratch import product_nbytes

from ..local_engine import LocalEngine


@contextmanager
def crew_of(threads: int, least_work: int = 0) -> Iterator[Crew]:
    crew = Crew(threads, least_work=least_work)
    try:
        yield crew
    finally:
        crew.close()


def product(crew: Crew, name: str, form: Format, heads: int, groups: int, count: int) -> bytes:
    """Return the bytes of a product over `heads` random matrices with `crew`."""
    rng = np.random.default_rng(heads * 100 + groups)
    columns, rows = 256, heads * groups * 16
    if name == "TQ2_0":
        raw = (rng.integers(0, 256, (rows, 66)) & 0x55).astype(np.uint8)
        raw[:, 64:] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    else:
        raw = rng.standard_normal((rows, columns)).astype(np.float32).view(np.uint8)
    whole = MatrixShape(form=form, rows=rows, columns=columns)
    head = MatrixShape(form=form, rows=groups * 16, columns=columns)
    arena = np.zeros(whole.nbytes, np.uint8)
    pack_matrix(np.frombuffer(raw.tobytes(), np.uint8), TYPES_BY_NAME[name], whole, arena, 0)
    x = rng.standard_normal((count * heads, columns)).astype(np.float32)
    q = QuantizedRows.allocate(len(x), columns, int(activation_kind(form)) or columns)
    q.fill(x, len(x))
    index = (np.arange(count)[None, :] * heads + np.arange(heads)[:, None]).astype(np.int32)
    out = np.full((count, heads * groups * 16), np.nan, np.float32)
    address, number, codes_at, scales_at, _ = matrix_entry(whole, 0)
    shared_dense.multiply_heads(
        crew.board, crew.heads_job, address, number, arena, codes_at, scales_at, head.codes_nbytes,
        head.scales_nbytes, heads, groups, columns, x, q.q, q.scales, q.sums, np.ascontiguousarray(index),
        count, np.zeros(crew.threads * product_nbytes(columns, count), np.uint8), out,
    )  # fmt: skip
    assert np.isfinite(out).all()
    return out.tobytes()


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (1, 7), (3, 1), (3, 5), (5, 4)])
@pytest.mark.parametrize(("name", "form"), [("TQ2_0", Format.TL1), ("F32", Format.F32)])
def test_products_have_the_same_bits_with_any_number_of_threads(
    name: str, form: Format, heads: int, groups: int, count: int
) -> None:
    expected = product(Crew(1), name, form, heads, groups, count)
    for threads in (2, 3, 5):
        with crew_of(threads) as crew:
            assert product(crew, name, form, heads, groups, count) == expected


def test_many_small_jobs_in_a_row() -> None:
    """Helpers that wake late find another job there, or none: no chunk is lost or done twice."""
    expected = [product(Crew(1), "TQ2_0", Format.TL1, 1, groups, 1) for groups in range(1, 6)]
    with crew_of(4) as crew:
        for turn in range(3000):
            assert product(crew, "TQ2_0", Format.TL1, 1, turn % 5 + 1, 1) == expected[turn % 5]


def test_generated_tokens_and_scores_do_not_depend_on_threads() -> None:
    prompts = [list(range(1, 40)), [5, 6, 7], [9] * 17]
    expected = LocalEngine().run(prompts, 6)
    with crew_of(3) as crew:
        found = LocalEngine(crew=crew).run(prompts, 6)
    assert [(r.tokens, r.logprobs) for r in found] == [(r.tokens, r.logprobs) for r in expected]


def test_helpers_sleep_and_leave() -> None:
    before = threading.active_count()
    with crew_of(4) as crew:
        assert threading.active_count() == before + 3
        assert crew.threads == 4
    assert threading.active_count() == before
