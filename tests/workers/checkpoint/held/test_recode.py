"""Rows from one file type to another: the gguf package's bytes, no needless loss, bad values."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.held.encode import relative_error
from sterna.workers.checkpoint.held.recode import WRITABLE, Loss, Recoder, chunks_of
from sterna.workers.checkpoint.types.plain import PLAIN
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME, Bytes, Floats, dequantize

F32 = TYPES_BY_NAME["F32"]


def weights(rows: int = 7, columns: int = 512, seed: int = 2) -> Floats:
    values = np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32) / 50
    values[1, :64] = 0
    return values


def frozen(array: np.ndarray) -> Bytes:  # type: ignore[type-arg]
    """Return the bytes of an array as a mapped file gives them."""
    return np.frombuffer(array.tobytes(), np.uint8)


def recoded(
    raw: Bytes, source: str, target: str, shape: tuple[int, int], **options: object
) -> tuple[Bytes, Loss]:
    out = np.empty(TYPES_BY_NAME[target].nbytes(shape), np.uint8)
    types = TYPES_BY_NAME[source], TYPES_BY_NAME[target]
    loss = Recoder().recode(raw, *types, shape[1], out, **options)  # type: ignore[arg-type]
    return frozen(out), loss


@pytest.mark.parametrize("name", PLAIN)
def test_plain_types_are_written_as_the_reference_package_writes_them(name: str) -> None:
    values = weights()
    found, _ = recoded(frozen(values), "F32", name, values.shape)
    assert found.tobytes() == quantize(values, GGMLQuantizationType[name]).tobytes()


@pytest.mark.parametrize("name", WRITABLE)
def test_what_is_lost_is_what_is_said(name: str) -> None:
    values = weights(300)  # several chunks
    found, loss = recoded(frozen(values), "F32", name, values.shape)
    after = dequantize(TYPES_BY_NAME[name], found, values.shape)
    assert loss.lost / loss.whole == pytest.approx(relative_error(values, after), rel=1e-4)
    _, part = recoded(frozen(values), "F32", name, values.shape, measure_every=2)
    assert 0.4 < part.whole / loss.whole < 0.7
    assert chunks_of(300, 512) == 3


@pytest.mark.parametrize("through", ["F32", "F16", "BF16", "TQ1_0"])
def test_a_ternary_matrix_comes_back_bit_for_bit(through: str) -> None:
    random = np.random.default_rng(4)
    signs = random.integers(-1, 2, (6, 512)).astype(np.float32)
    scales = (2.0 ** random.integers(-8, 0, (6, 2))).repeat(256, axis=1).astype(np.float32)
    original, _ = recoded(frozen(signs * scales), "F32", "TQ2_0", signs.shape)
    there, _ = recoded(original, "TQ2_0", through, signs.shape)
    for rule in ("lloyd-max", "least-squares"):
        back, loss = recoded(there, through, "TQ2_0", signs.shape, scales=rule)
        assert (back == original).all()
        assert loss.lost == 0


@pytest.mark.parametrize("name", [name for name in WRITABLE if name != "F32"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_bad_value_is_named_by_its_row(name: str, bad: float) -> None:
    values = weights(300)
    values[257, 3] = bad
    with pytest.raises(
        ModelFileError, match=f"type {name}: row 1257: a weight that is not finite or too large"
    ):
        recoded(frozen(values), "F32", name, values.shape, first_row=1000)


def test_rows_that_no_kernel_decodes() -> None:
    values = weights(3, 32)[:, :4].copy()  # 12 values: no whole vector of half floats
    there, _ = recoded(frozen(values), "F32", "F16", values.shape)
    back, _ = recoded(there, "F16", "F32", values.shape)
    assert (back.view("<f4") == values.astype(np.float16).astype(np.float32).reshape(-1)).all()
