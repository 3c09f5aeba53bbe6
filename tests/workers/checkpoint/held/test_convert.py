"""Conversion on page-in: fast decoders, what may become what, and that bytes are packed as what they say."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.shm.errors import InternalError, ModelFileError
from sterna.workers.checkpoint.held.convert import Converter
from sterna.workers.checkpoint.held.encode import Encoder, relative_error
from sterna.workers.checkpoint.held.formats import MatrixShape, Storage, format_of
from sterna.workers.checkpoint.held.packing import pack_matrix
from sterna.workers.checkpoint.held.precisions import (
    TARGETS,
    conversion,
    held_nbytes,
    held_type,
    is_convertible,
)
from sterna.workers.checkpoint.held.samples import sample
from sterna.workers.checkpoint.types.table import TENSOR_TYPES, TYPES_BY_NAME, Bytes, TensorType, dequantize

SOURCES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q4_0", "IQ4_NL", "MXFP4")
TERNARY = ("TQ1_0", "TQ2_0", "BITNET_T158", "Q2_0", "PQ2_0", "I2_S", "IQ1_BN", "IQ2_BN", "TL1", "TL2")
ROWS, COLUMNS = 20, 512  # not a multiple of the rows that are decoded at a time


def file_bytes(name: str, seed: int = 5) -> Bytes:
    """Return a matrix as a file holds it, with scales that differ from block to block."""
    file_type = TYPES_BY_NAME[name]
    random = np.random.default_rng(seed)
    if name == "F32":
        return np.frombuffer(random.standard_normal(ROWS * COLUMNS).astype(np.float32).tobytes(), np.uint8)
    raw = sample(file_type, ROWS, COLUMNS, random).reshape(-1, file_type.block_bytes).copy()
    for at in {"Q8_0": (0,), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(name, ()):
        scales = random.uniform(0.001, 0.01, len(raw)).astype(np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return np.frombuffer(raw.tobytes(), np.uint8)


@pytest.mark.parametrize("name", SOURCES)
def test_conversion_is_decoding_and_encoding(name: str) -> None:
    """The decoders that are kernels give the very values of the others, and every row is there."""
    file_type, raw, converter = TYPES_BY_NAME[name], file_bytes(name), Converter()
    values = dequantize(file_type, raw, (ROWS, COLUMNS))
    done = 0
    for target in (TYPES_BY_NAME[name] for name in TARGETS):
        if is_convertible(file_type, target, ROWS, COLUMNS):
            expected = np.zeros(target.nbytes(values.shape), np.uint8)
            Encoder().encode(values, target, expected)
            found = converter.convert(raw, file_type, ROWS, COLUMNS, target)
            assert (found == expected).all()
            assert not found.flags.writeable
            after = dequantize(target, expected, values.shape)
            assert converter.error(raw, file_type, ROWS, COLUMNS, target) == relative_error(values, after)
            done += 1
    assert done >= 2


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_weights_are_never_quantised_again(name: str) -> None:
    file_type = TYPES_BY_NAME[name]
    for target in TARGETS:
        assert not is_convertible(file_type, TYPES_BY_NAME[target], 256, 256)
        assert held_type(file_type, target, 256, 256) is file_type
        raw = np.zeros(file_type.nbytes((256, 256)) if name not in ("TL1", "TL2") else 1, np.uint8)
        with pytest.raises(InternalError, match=rf"type {name} is not converted to .*ternary"):
            Converter().convert(raw, file_type, 256, 256, TYPES_BY_NAME[target])


def test_nothing_is_converted_to_more_bytes_or_as_many() -> None:
    for file_type in TENSOR_TYPES.values():
        for target in (TYPES_BY_NAME[name] for name in TARGETS):
            if file_type.name in SOURCES and held_nbytes(target, 16, 256) >= held_nbytes(file_type, 16, 256):
                with pytest.raises(InternalError, match="gets no smaller"):
                    Converter().convert(np.zeros(1, np.uint8), file_type, 16, 256, target)
    pairs = [(source, target) for source in SOURCES[5:8] for target in TARGETS]
    allowed = [p for p in pairs if is_convertible(TYPES_BY_NAME[p[0]], TYPES_BY_NAME[p[1]], 16, 256)]
    assert allowed == [
        ("Q5_K", "Q4_K"), ("Q5_K", "Q3_K"), ("Q5_K", "Q2_K"), ("Q5_K", "TQ2_0"),
        ("Q4_K", "Q3_K"), ("Q4_K", "Q2_K"), ("Q4_K", "TQ2_0"),
        ("Q3_K", "Q2_K"), ("Q3_K", "TQ2_0"),
    ]  # fmt: skip


def test_columns_that_no_block_divides_stay() -> None:
    assert held_type(TYPES_BY_NAME["Q8_0"], "Q4_K", 16, 288) is TYPES_BY_NAME["Q8_0"]
    assert held_type(TYPES_BY_NAME["Q8_0"], "Q4_K", 16, 512) is TYPES_BY_NAME["Q4_K"]
    assert held_type(TYPES_BY_NAME["Q8_0"], "file", 16, 512) is TYPES_BY_NAME["Q8_0"]


def test_bytes_that_are_not_a_matrix_are_refused() -> None:
    with pytest.raises(ModelFileError, match="expected 544 bytes"):
        Converter().convert(np.zeros(543, np.uint8), TYPES_BY_NAME["Q8_0"], 1, 512, TYPES_BY_NAME["Q2_K"])
    values = np.ones((ROWS, COLUMNS), np.float16)
    values[18, 3] = np.inf
    raw = np.frombuffer(values.tobytes(), np.uint8)
    with pytest.raises(ModelFileError, match="row 18"):
        Converter().convert(raw, TYPES_BY_NAME["F16"], ROWS, COLUMNS, TYPES_BY_NAME["Q4_K"])


@pytest.mark.parametrize("storage", [Storage(), Storage(small=True, per_token=True)])
@pytest.mark.parametrize("target", TARGETS)
def test_format_says_what_was_converted_to(target: str, storage: Storage) -> None:
    """The format of a slot and the file's type are enough to know the conversion (INV-4)."""
    file_type, wanted = TYPES_BY_NAME["Q8_0"], TYPES_BY_NAME[target]
    form = format_of(wanted, COLUMNS, "test", storage)
    assert conversion(file_type, form) is wanted
    assert conversion(file_type, format_of(file_type, COLUMNS, "test", storage)) is None
    assert conversion(wanted, form) is None
    shape = MatrixShape(form=form, rows=ROWS, columns=COLUMNS)
    arena = np.zeros(shape.nbytes, np.uint8)
    raw = Converter().convert(file_bytes("Q8_0"), file_type, ROWS, COLUMNS, wanted)
    pack_matrix(raw, wanted, shape, arena, 0)
    again = np.zeros(shape.nbytes, np.uint8)
    pack_matrix(np.frombuffer(raw.tobytes(), np.uint8), wanted, shape, again, 0)
    assert (arena == again).all()
    assert arena.any()


def test_no_type_that_is_packed_is_taken_for_a_converted_one() -> None:
    """Whatever the file holds, in its own format nothing is converted."""
    for file_type in TENSOR_TYPES.values():
        for storage in (Storage(), Storage(small=True, per_token=True)):
            try:
                form = format_of(file_type, 256, "test", storage)
            except ModelFileError:
                continue
            assert conversion(file_type, form) is None


def test_buffers_serve_matrices_of_all_sizes() -> None:
    converter, target = Converter(), TYPES_BY_NAME["Q3_K"]

    def made(rows: int, columns: int) -> bytes:
        file_type: TensorType = TYPES_BY_NAME["Q8_0"]
        raw = np.frombuffer(file_bytes("Q8_0").tobytes()[: file_type.nbytes((rows, columns))], np.uint8)
        return converter.convert(raw, file_type, rows, columns, target).tobytes()

    first = made(3, 256)
    assert len(made(20, 512)) == target.nbytes((20, 512))
    assert made(3, 256) == first
