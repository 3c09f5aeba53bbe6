"""Random matrices as files hold them, for the self-test and for measuring; no model is made of these."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..types.table import Bytes, TensorType
from .formats import ROW_SCALED, Format

# Where a block keeps its float16 scales; the other bytes may be anything, but for ternary codes.
_SCALES_AT = {
    "Q8_0": (0,), "TQ2_0": (64,), "BITNET_T158": (64,), "TQ1_0": (52,), "Q4_0": (0,), "IQ4_NL": (0,),
    "Q5_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "F32": (), "F16": (), "BF16": (), "MXFP4": (), **dict.fromkeys(ROW_SCALED[:4], ()),
}  # fmt: skip
_SCALE = np.float16(2.0**-10)  # keeps partial sums of integers exact in float32


_FILE_TYPES = {"Q8": "Q8_0", "TL1": "TQ2_0", "B3": "TQ1_0", "TL1_ROW": "I2_S", "TL1_TOKEN": "I2_S"}


def file_type_of(form: Format) -> str:
    """Return the name of the file type that samples of `form` come from."""
    return _FILE_TYPES.get(form.name, form.name)


def sample(
    file_type: TensorType, rows: int, columns: int, random: np.random.Generator, *, worst: bool = False
) -> Bytes:
    """Return the bytes of a (rows, columns) matrix of `file_type`, uint8, as a file holds it.

    Scales are 2^-10, or 2^-8 for MXFP4, floats small integers; worst: the largest codes of all. The array
    is read-only as a mapping is: numba has a type of its own for that. Raises KeyError for a type that has
    no kernel of its own or holds its tile sizes elsewhere, ModelFileError for columns that it cannot have.
    """
    if file_type.name not in _SCALES_AT:
        raise KeyError(file_type.name)
    nbytes = file_type.nbytes((rows, columns))
    if file_type.name in ("F32", "F16", "BF16"):
        values = random.integers(-8, 9, (rows, columns)).astype(np.float32)
        narrow: dict[str, npt.NDArray[np.generic]] = {
            "F32": values,
            "F16": values.astype(np.float16),
            "BF16": values.view(np.uint16)[:, 1::2],
        }
        return np.frombuffer(narrow[file_type.name].tobytes(), np.uint8)
    if file_type.name in ROW_SCALED:
        return _row_scaled(file_type.name, rows, columns, random, worst)
    blocks = random.integers(0, 256, (nbytes // file_type.block_bytes, file_type.block_bytes))
    if worst:
        blocks[:] = {"Q8_0": 0x7F, "Q5_0": 0x00}.get(file_type.name, 0xAA)
    elif file_type.name in ("TQ2_0", "BITNET_T158"):
        blocks &= 0x55 << random.integers(0, 2, blocks.shape)  # no code 3
    elif file_type.name == "Q8_0":
        blocks[blocks == 0x80] = 0x81  # no encoder writes -128
    raw = blocks.astype(np.uint8)
    for at in _SCALES_AT[file_type.name]:
        raw[:, at : at + 2] = np.frombuffer(_SCALE.tobytes(), np.uint8)
    if file_type.name == "MXFP4":
        raw[:, 0] = 120  # its scale, 2^(120 - 128)
    return np.frombuffer(raw.tobytes(), np.uint8)


def _row_scaled(name: str, rows: int, columns: int, random: np.random.Generator, worst: bool) -> Bytes:
    """Return a matrix of a type with float32 (IQ1_BN: float16) scales beside or behind the codes."""
    per_row = columns // 64 * 13 if name == "IQ1_BN" else columns // 4
    codes = random.integers(0, 256, (rows, per_row))
    if name != "IQ1_BN":
        codes &= 0x55 << random.integers(0, 2, codes.shape)  # no code 3
    if worst:
        codes[:] = 0xFF if name == "IQ1_BN" else 0xAA
    raw = codes.astype(np.uint8)
    scale = np.array([_SCALE], np.float16 if name == "IQ1_BN" else np.float32).view(np.uint8)
    if name == "I2_S":
        behind = np.zeros(32, np.uint8)
        behind[:4] = scale
        return np.frombuffer(raw.tobytes() + behind.tobytes(), np.uint8)
    together = 4 if name == "IQ2_BN_R4" else 1  # rows whose scales stand in front of their codes
    lines = raw.reshape(rows // together, together * per_row)
    scales = np.tile(scale, (len(lines), together))
    return np.frombuffer(np.concatenate((scales, lines), axis=1).tobytes(), np.uint8)
