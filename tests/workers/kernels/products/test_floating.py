"""F32, F16 and BF16 matrices: four chains of fused multiply-adds, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.workers.kernels.products import table

from .... import oracles
from ..packed import Tokens, multiply, pack_floating, padding_of, same_bits

FORMS = {"F32": table.F32, "F16": table.F16, "BF16": table.BF16}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (15, 8), (16, 20), (17, 256), (40, 100), (33, 1028)])
def test_sums_follow_the_documented_order(form: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows * columns)
    matrix, weights = pack_floating(form, rng.standard_normal((rows, columns)).astype(np.float32))
    x = rng.standard_normal((5, columns)).astype(np.float32)
    found = multiply(matrix, Tokens.floats(x), [4, 0, 0, 2, 1, 3])
    assert same_bits(found, oracles.floating_gemm(weights, x)[[4, 0, 0, 2, 1, 3]])
    assert (padding_of(matrix, Tokens.floats(x)) == 0).all()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_whole_numbers_are_exact(form: int) -> None:
    rng = np.random.default_rng(3)
    matrix, weights = pack_floating(form, rng.integers(-128, 129, (24, 512)).astype(np.float32))
    x = rng.integers(-255, 256, (3, 512)).astype(np.float32)
    expected = x.astype(np.int64) @ weights.astype(np.int64).T
    assert np.abs(expected).max() < 2**24
    assert (multiply(matrix, Tokens.floats(x), range(3)) == expected).all()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("at", [1, 2, 17, 63])
def test_arena_offsets_need_no_alignment(form: int, at: int) -> None:
    rng = np.random.default_rng(at)
    matrix, weights = pack_floating(form, rng.standard_normal((20, 64)).astype(np.float32), at)
    x = rng.standard_normal((2, 64)).astype(np.float32)
    assert same_bits(multiply(matrix, Tokens.floats(x), [0, 1]), oracles.floating_gemm(weights, x))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_token_has_the_same_bits_alone_and_in_a_batch(form: int) -> None:
    rng = np.random.default_rng(4)
    matrix, _ = pack_floating(form, rng.standard_normal((18, 128)).astype(np.float32))
    tokens = Tokens.floats(rng.standard_normal((9, 128)).astype(np.float32))
    for count in range(1, 10):
        order = rng.integers(0, 9, count).tolist()
        together = multiply(matrix, tokens, order)
        for i, row in enumerate(order):
            assert same_bits(together[i], multiply(matrix, tokens, [row])[0])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_surfaces(form: int, bad: float) -> None:
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((20, 64)).astype(np.float32)
    x = rng.standard_normal((2, 64)).astype(np.float32)
    x[1, 33] = bad
    found = multiply(pack_floating(form, weights)[0], Tokens.floats(x), [0, 1])
    assert np.isfinite(found[0]).all()
    assert not np.isfinite(found[1]).any()
    weights[7, 5] = bad
    found = multiply(pack_floating(form, weights)[0], Tokens.floats(x), [0])
    assert not np.isfinite(found[0, 7])
    assert np.isfinite(np.delete(found[0], 7)).all()


def test_subnormal_values_are_kept() -> None:
    tiny = np.full((1, 4), 2.0**-24, np.float32)
    matrix, values = pack_floating(table.F16, tiny)
    assert (values == tiny).all()
    x = np.ones((1, 4), np.float32)
    assert multiply(matrix, Tokens.floats(x), [0])[0, 0] == np.float32(2.0**-22)
    matrix, _ = pack_floating(table.F32, np.full((1, 4), 1e-40, np.float32))
    assert multiply(matrix, Tokens.floats(x), [0])[0, 0] == 4 * np.float32(1e-40)


def test_products_that_differ_have_names_of_their_own() -> None:
    """Else two that were compiled in different processes could have one symbol, and one address."""
    kernels = {id(table.kernel_of(form)): table.kernel_of(form) for form in table.FORMS}
    functions = [kernel.py_func for kernel in kernels.values()]  # type: ignore[attr-defined]
    assert len({(f.__module__, f.__qualname__) for f in functions}) == len(functions)
