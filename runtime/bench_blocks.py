"""Random matrices as a file would hold them, for the benchmark: valid blocks with sane scales.

No scale or float weight is near zero: a denormal number costs some CPUs a hundred cycles, and would be
measured instead of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..workers.checkpoint.formats import Format
from ..workers.checkpoint.types import TYPES_BY_NAME

Bytes = npt.NDArray[np.uint8]
_Fill = Callable[[np.random.Generator, Bytes], None]

# Arena format -> file type that is packed into it, where the two have different names.
_FILE_TYPES = {"Q8": "Q8_0", "TL1": "TQ2_0"}
# File type -> where a block holds its float16 scales.
_SCALES_AT = {
    "Q4_0": (0,), "Q8_0": (0,), "IQ4_NL": (0,), "TQ2_0": (64,), "TQ1_0": (52,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def file_type_of(form: Format) -> str:
    """Return the name of the file type whose matrices are measured for `form`."""
    return _FILE_TYPES.get(form.name, form.name)


def random_matrix(file_type: str, rows: int, columns: int, seed: int) -> Bytes:
    """Return the bytes of a (rows, columns) matrix, uint8 (nbytes,), read-only as a file mapping is.

    Raises KeyError for a type that cannot be made, ModelFileError for columns that are no whole blocks.
    """
    kind = TYPES_BY_NAME[file_type]
    random = np.random.default_rng(seed)
    count = kind.nbytes((rows, columns)) // kind.block_bytes
    blocks = random.integers(0, 256, (count, kind.block_bytes), np.uint8)
    for at in _SCALES_AT.get(file_type, ()):
        blocks[:, at : at + 2] = random.uniform(0.002, 0.02, (count, 1)).astype(np.float16).view(np.uint8)
    fill = _FILLS.get(file_type)
    if fill is None and file_type not in _SCALES_AT:
        raise KeyError(file_type)
    if fill is not None:
        fill(random, blocks)
    # numba compiles a function anew for arrays that can be written: this is the type of the real calls.
    return np.frombuffer(blocks.tobytes(), np.uint8)


def _weights(random: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    """Return values of either sign, 0.005 to 0.05 from zero."""
    sizes = random.uniform(0.005, 0.05, count).astype(np.float32)
    return np.where(random.integers(0, 2, count), sizes, -sizes)


def _fill_f32(random: np.random.Generator, blocks: Bytes) -> None:
    blocks[:] = _weights(random, len(blocks)).view(np.uint8).reshape(-1, 4)


def _fill_f16(random: np.random.Generator, blocks: Bytes) -> None:
    blocks[:] = _weights(random, len(blocks)).astype(np.float16).view(np.uint8).reshape(-1, 2)


def _fill_bf16(random: np.random.Generator, blocks: Bytes) -> None:
    blocks[:] = _weights(random, len(blocks)).view(np.uint8).reshape(-1, 4)[:, 2:]


def _fill_mxfp4(random: np.random.Generator, blocks: Bytes) -> None:
    blocks[:, 0] = random.integers(112, 122, len(blocks))  # exponents: 2^-16 to 2^-7, halved


def _fill_tq2_0(random: np.random.Generator, blocks: Bytes) -> None:
    codes = random.integers(0, 3, (len(blocks), 64, 4), np.uint8)
    blocks[:, :64] = np.bitwise_or.reduce(codes << np.array([0, 2, 4, 6], np.uint8), axis=2)


def _fill_tq1_0(random: np.random.Generator, blocks: Bytes) -> None:
    numbers = random.integers(0, 243, (len(blocks), 52))
    numbers[:, 48:] = numbers[:, 48:] // 3 * 3  # four digits, the fifth is 0
    blocks[:, :52] = (numbers * 256 + 242) // 243


_FILLS: dict[str, _Fill] = {
    "F32": _fill_f32,
    "F16": _fill_f16,
    "BF16": _fill_bf16,
    "MXFP4": _fill_mxfp4,
    "TQ2_0": _fill_tq2_0,
    "TQ1_0": _fill_tq1_0,
}
