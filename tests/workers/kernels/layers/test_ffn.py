"""Whole experts: gate, up, SiLU, down, in every pairing of formats, and batches of experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from sterna.scheduler.decoder.crew import Crew
from sterna.workers.activation import Activation
from sterna.workers.checkpoint.held.formats import Format, MatrixShape
from sterna.workers.kernels.layers import ffn, shared_dense
from sterna.workers.kernels.layers.activations import QuantizedRows
from sterna.workers.kernels.products import table as products

from .... import oracles
from ..packed import (
    F32,
    U8,
    Packed,
    Scratch,
    Tokens,
    multiply,
    pack_floating,
    pack_q8,
    pack_ternary,
    same_bits,
)

D_MODEL, D_FF = 256, 512
FORMS = {
    "F32": products.F32,
    "F16": products.F16,
    "BF16": products.BF16,
    "Q8": products.Q8,
    "TL1": products.TL1,
}
PAIRS = [
    ("TL1", "TL1"), ("TL1", "Q8"), ("TL1", "F16"), ("Q8", "Q8"), ("Q8", "TL1"), ("F32", "F32"),
    ("F16", "BF16"), ("BF16", "TL1"),
]  # fmt: skip


def matrix(form: int, rows: int, columns: int, seed: int) -> tuple[Packed, F32]:
    """Return a packed matrix and its values."""
    rng = np.random.default_rng(seed)
    if form == products.TL1:
        codes = rng.integers(0, 3, (rows, columns), dtype=np.uint8)
        scales = rng.uniform(0.02, 0.05, (rows, columns // 256)).astype(np.float16).astype(np.float32)
        return pack_ternary(codes, scales), (codes.astype(np.float32) - 1) * scales.repeat(256, axis=1)
    if form == products.Q8:
        values = rng.integers(-127, 128, (rows, columns), dtype=np.int8)
        scales = rng.uniform(2e-4, 5e-4, (rows, columns // 32)).astype(np.float16).astype(np.float32)
        return pack_q8(values, scales), values * scales.repeat(32, axis=1)
    return pack_floating(form, (rng.standard_normal((rows, columns)) * 0.03).astype(np.float32))


@dataclass
class Experts:
    """Experts in one arena, as a worker sees them."""

    arena: U8
    table: oracles.I64
    values: list[tuple[F32, F32, F32]]
    biases: oracles.I64 | None = None

    @classmethod
    def make(cls, wide: int, down: int, number: int) -> Experts:
        arenas: list[U8] = []
        table = np.zeros((number, 3, 5), np.int64)
        values = []
        at = 0
        for m in range(number):
            parts = [
                matrix(wide, D_FF, D_MODEL, 10 * m),
                matrix(wide, D_FF, D_MODEL, 10 * m + 1),
                matrix(down, D_MODEL, D_FF, 10 * m + 2),
            ]
            for j, (packed, _) in enumerate(parts):
                table[m, j] = packed.entry
                table[m, j, 2:4] += at
                arenas.append(packed.arena)
                at += len(packed.arena)
            values.append(tuple(value for _, value in parts))
        return cls(np.concatenate(arenas), table, values)

    def with_biases(self, seed: int) -> tuple[Experts, list[F32]]:
        """Return the same experts with biases behind them, and these as (gate, up, down) of each."""
        rng = np.random.default_rng(seed)
        vectors = [
            rng.standard_normal(width).astype(np.float32)
            for _ in self.values
            for width in (D_FF, D_FF, D_MODEL)
        ]
        ends = len(self.arena) + np.cumsum([vector.nbytes for vector in vectors])
        starts = np.array([len(self.arena), *ends[:-1]], np.int64).reshape(-1, 3)
        arena = np.concatenate([self.arena, *(vector.view(np.uint8) for vector in vectors)])
        return Experts(arena, self.table, self.values, starts), vectors

    def run(self, x: F32, starts: list[int], rows: list[int], activation: int = 0) -> F32:
        """Return expert_batch's output (pairs, D_MODEL); arrays are frames' as in a worker."""
        tokens = activations(x, int(self.table[0, 0, 1]))
        pairs = max(1, starts[-1])
        out = np.full((pairs + 1, D_MODEL), np.float32(7.0))
        middle = np.zeros((2, pairs, D_FF), np.float32)
        scratch = Scratch(max(D_MODEL, D_FF), pairs)
        biases = np.full((len(self.table), 3), -1, np.int64) if self.biases is None else self.biases
        ffn.expert_batch(
            self.arena, self.table, biases, np.array(starts, np.int64), framed(np.array(rows, np.int32)),
            D_MODEL, D_FF, activation, framed(tokens.x), framed(tokens.q), framed(tokens.scales),
            framed(tokens.sums), middle[0], middle[1], np.zeros((pairs, D_FF), np.int8),
            np.zeros((pairs, D_FF // 32), np.float32), np.zeros((pairs, D_FF // 32), np.int32),
            np.arange(pairs, dtype=np.int32), scratch.array, out,
        )  # fmt: skip
        scratch.check()
        assert (out[starts[-1] :] == 7.0).all()
        return out[: starts[-1]]


def framed(array: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Return the array as a worker has it: over the memory of a frame."""
    return np.frombuffer(bytearray(array.tobytes()), array.dtype).reshape(array.shape)


def activations(x: F32, form: int) -> Tokens:
    if form == products.TL1:
        return Tokens.quantized(x, 256)
    return Tokens.quantized(x, 32) if form == products.Q8 else Tokens.floats(x)


@pytest.mark.parametrize(("wide", "down"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_an_expert_agrees_with_float64(wide: str, down: str) -> None:
    experts = Experts.make(FORMS[wide], FORMS[down], 1)
    x = np.random.default_rng(1).standard_normal((9, D_MODEL)).astype(np.float32)
    found = experts.run(x, [0, 9], list(range(9)))  # eight tokens at once and one alone
    gate, up, low = (part.astype(np.float64) for part in experts.values[0])
    true = oracles.feed_forward(gate, up, low, x)
    error = ((found - true) ** 2).sum() / (true**2).sum()
    # The middle's largest of 256 is some ten times its rms: int8 then costs (10 / 127)^2 / 12 = 5e-4
    # of the power. A wrong kernel costs about 1; the next test looks closer.
    whole = {"F32", "F16", "BF16"} >= {wide, down}
    assert error < (1e-12 if whole else 1e-3)


@pytest.mark.parametrize("form", ["TL1", "Q8"])
def test_a_quantised_expert_is_the_composition_of_its_parts(form: str) -> None:
    """With int8 activations the only freedom left is SiLU's last bit, which may turn one code."""
    experts = Experts.make(FORMS[form], FORMS[form], 1)
    block = 256 if form == "TL1" else 32
    x = np.random.default_rng(2).standard_normal((9, D_MODEL)).astype(np.float32)
    tokens = Tokens.quantized(x, block)
    gate, up, down = (part.astype(np.float64) for part in experts.values[0])
    heard = (tokens.q.reshape(9, -1, block) * tokens.scales[:, :, None].astype(np.float64)).reshape(9, -1)
    middle = oracles.silu(heard @ gate.T) * (heard @ up.T)
    q, scales, _ = oracles.quantize_rows(middle.astype(np.float32), block)
    passed = (q.reshape(9, -1, block) * scales[:, :, None].astype(np.float64)).reshape(9, -1)
    true = passed @ down.T
    found = experts.run(x, [0, 9], list(range(9)))
    assert ((found - true) ** 2).sum() / (true**2).sum() < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_experts_gives_the_bits_of_each_token_alone(form: str) -> None:
    experts = Experts.make(FORMS[form], FORMS[form], 4)
    x = np.random.default_rng(3).standard_normal((7, D_MODEL)).astype(np.float32)
    # Five tokens alone, none, one, and seventeen: two tiles of eight and one alone.
    starts, rows = (
        [0, 5, 5, 6, 23],
        [0, 2, 3, 5, 6, 4, *(6, 5, 4, 3, 2, 1, 0, 0, 6), *(1, 3, 5, 2, 2, 4, 0, 6)],
    )
    together = experts.run(x, starts, rows)
    for m in range(4):
        one = Experts(experts.arena, experts.table[m : m + 1], [experts.values[m]])
        for pair in range(starts[m], starts[m + 1]):
            row = rows[pair]
            assert same_bits(one.run(x[row : row + 1], [0, 1], [0])[0], together[pair])


@pytest.mark.parametrize("activation", list(Activation))
def test_the_middle_agrees_with_float64(activation: Activation) -> None:
    """Over all magnitudes, with the edges of the clamps; rows outside first..last - 1 stay."""
    rng = np.random.default_rng(activation)
    gate, up = (rng.standard_normal((2, 5, 320)) * 10.0 ** rng.integers(-3, 2, (2, 5, 320))).astype(
        np.float32
    )
    gate[2, :6], up[2, :6] = [7, 8, -7, -100, 7, 0], [7, 8, -7, -8, -1, 1e30]
    found = gate.copy()
    ffn.gated(found, up, 1, 4, 320, int(activation))
    true = oracles.activated(gate[1:4], up[1:4], activation)
    # The argument of exp, rounded to float32, is off by up to 88 * 2^-24.
    np.testing.assert_allclose(found[1:4], true, rtol=1e-5, atol=1e-30)
    assert same_bits(found[[0, 4]], gate[[0, 4]])


@pytest.mark.parametrize("activation", list(Activation))
def test_a_nan_in_the_middle_surfaces(activation: Activation) -> None:
    for row in (0, 1):
        middle = np.ones((2, 1, 16), np.float32)
        middle[row, 0, 3] = np.nan
        ffn.gated(middle[0], middle[1], 0, 1, 16, int(activation))
        assert np.flatnonzero(np.isnan(middle[0, 0])).tolist() == [3]


@pytest.mark.parametrize("activation", list(Activation))
def test_biases_are_added_before_the_activation_and_behind_down(activation: Activation) -> None:
    experts, vectors = Experts.make(products.F32, products.F32, 2).with_biases(7)
    x = np.random.default_rng(1).standard_normal((4, D_MODEL)).astype(np.float32)
    starts, rows = [0, 3, 5], [0, 1, 3, 2, 1]
    found = experts.run(x, starts, rows, int(activation))
    for m in range(2):
        gate, up, down = (part.astype(np.float64) for part in experts.values[m])
        b_gate, b_up, b_down = vectors[3 * m : 3 * m + 3]
        for pair in range(starts[m], starts[m + 1]):
            wide = x[rows[pair]].astype(np.float64)
            true = oracles.activated(gate @ wide + b_gate, up @ wide + b_up, activation) @ down.T + b_down
            np.testing.assert_allclose(found[pair], true, rtol=0, atol=2e-4)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("activation", list(Activation))
def test_a_dense_network_agrees_with_float64(activation: Activation, normed: bool, threads: int) -> None:
    """Activation and norm of the middle in every combination, alone and shared among threads."""
    rng = np.random.default_rng(3)
    experts, count = Experts.make(products.F32, products.F32, 1), 5
    x = rng.standard_normal((count, D_MODEL)).astype(np.float32)
    norm = rng.standard_normal(D_FF if normed else 0).astype(np.float32)
    tokens, none, out = (
        Tokens.floats(x),
        QuantizedRows.allocate(1, 1, 1),
        np.zeros((count, D_MODEL), np.float32),
    )
    gate, up = np.zeros((2, count, D_FF), np.float32)
    shapes = ((D_FF, D_MODEL), (D_FF, D_MODEL), (D_MODEL, D_FF))
    sizes = [(MatrixShape(form=Format.F32, rows=n, columns=k).codes_nbytes, 0) for n, k in shapes]
    crew = Crew(threads, least_work=0)
    try:
        shared_dense.shared_feed_forward(
            crew.board, crew.heads_job, crew.middle_job, experts.arena, experts.table[0], np.array(sizes),
            D_MODEL, D_FF, int(activation), norm, np.float32(1e-5), tokens.x, none.q, none.scales, none.sums,
            np.arange(count, dtype=np.int32).reshape(1, count), count, gate, up, none.q, none.scales,
            none.sums, np.zeros(threads * 65536, np.uint8), out,
        )  # fmt: skip
    finally:
        crew.close()
    wide, high, low = (part.astype(np.float64) for part in experts.values[0])
    middle = oracles.activated(x @ wide.T, x @ high.T, activation)
    if normed:
        middle = oracles.rms_rows(middle, norm, 1e-5)  # type: ignore[arg-type]
    true = middle @ low.T
    np.testing.assert_allclose(out, true, rtol=0, atol=3e-6 * np.abs(true).max() + 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_activation_reaches_the_output_of_its_token(form: str) -> None:
    experts = Experts.make(FORMS[form], FORMS[form], 1)
    x = np.random.default_rng(4).standard_normal((10, D_MODEL)).astype(np.float32)
    x[[2, 9], 100] = np.nan  # in the tile of eight, and alone
    found = experts.run(x, [0, 10], list(range(10)))
    assert np.isnan(found[[2, 9]]).all()
    assert np.isfinite(np.delete(found, [2, 9], axis=0)).all()


def test_a_large_gate_overflows_visibly() -> None:
    """Products beyond float32 must come out as inf or NaN, never as a plausible number."""
    experts = Experts.make(products.F32, products.TL1, 1)
    x = np.full((1, D_MODEL), 1e30, np.float32)
    assert not np.isfinite(experts.run(x, [0, 1], [0])).any()


@pytest.mark.parametrize("count", [5, 9])
@pytest.mark.parametrize("rows", [16, 32, 48])
@pytest.mark.parametrize("form", FORMS)
def test_heads_are_matrices_under_each_other(form: str, rows: int, count: int) -> None:
    """Head h of the product over all heads is that of its own rows."""
    heads = 3
    whole, _ = matrix(FORMS[form], heads * rows, D_MODEL, 5)
    shape = MatrixShape(form=Format(whole.form), rows=rows, columns=D_MODEL)
    x = np.random.default_rng(6).standard_normal((count * heads, D_MODEL)).astype(np.float32)
    tokens = activations(x, FORMS[form])
    index = np.array([[t * heads + h for t in range(count)] for h in range(heads)], np.int32)
    out = np.full((count, heads * rows), np.float32(7.0))
    scratch = Scratch(D_MODEL, count)
    crew = Crew(1)
    shared_dense.multiply_heads(
        crew.board, crew.heads_job,
        products.product(whole.form), whole.form, whole.arena, whole.codes_at, whole.scales_at,
        shape.codes_nbytes, shape.scales_nbytes, heads, shape.groups, D_MODEL, tokens.x, tokens.q,
        tokens.scales, tokens.sums, index, count, scratch.array, out,
    )  # fmt: skip
    scratch.check()
    for h in range(heads):
        expected = multiply(whole, tokens, index[h].tolist())[:, h * rows : (h + 1) * rows]
        assert same_bits(out[:, h * rows : (h + 1) * rows].copy(), expected)
