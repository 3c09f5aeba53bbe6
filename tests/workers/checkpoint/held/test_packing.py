"""Matrices of any type can be held as float16, whatever kernel they have."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.workers.checkpoint.held.formats import Format, MatrixShape
from sterna.workers.checkpoint.held.packing import pack_matrix
from sterna.workers.checkpoint.held.samples import sample
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME, dequantize


@pytest.mark.parametrize("name", ["TQ2_0", "Q8_0", "Q4_K", "I2_S", "IQ2_BN_R4", "BF16"])
def test_float16_holds_what_the_file_says(name: str) -> None:
    rows, columns = 20, 256
    file_type = TYPES_BY_NAME[name]
    raw = sample(file_type, rows, columns, np.random.default_rng(1), worst=False)
    values = dequantize(file_type, raw, (rows, columns)).astype(np.float16)
    shape = MatrixShape(form=Format.F16, rows=rows, columns=columns)
    found, expected = (np.zeros(64 + shape.nbytes, np.uint8) for _ in range(2))
    pack_matrix(raw, file_type, shape, found, 64)
    pack_matrix(np.frombuffer(values.tobytes(), np.uint8), TYPES_BY_NAME["F16"], shape, expected, 64)
    assert found.any()
    assert (found == expected).all()
