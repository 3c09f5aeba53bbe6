"""TL1 and TL2 of BitNet: weights as indices into tables of sums, in tiles the file does not describe.

The tile sizes belong to a shape; `file/tilings.py` finds them.
Indices that stand for no weights are given as code 3, which the caller refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from ....shm.errors import ModelFileError

Bytes: TypeAlias = npt.NDArray[np.uint8]

CONFIG_NAME: Final = "kernel_config.ini"
_SCALE_NBYTES: Final = 32  # one float32 and padding
# Within 32 rows the second and third eight are swapped.
_SLOTS: Final = np.arange(32).reshape(4, 8)[[0, 2, 1, 3]].reshape(-1)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of a matrix: `rows` x `columns` (BM, BY), of which `inner_rows` (bm) lie together."""

    rows: int
    columns: int
    inner_rows: int


TILED = ("TL1", "TL2")
"""Types whose tile sizes do not stand in the tensor."""


def _checked(name: str, rows: int, columns: int, tiling: Tiling | None) -> Tiling:
    if tiling is None:
        raise ModelFileError(
            f"type {name}: the tile sizes of a {rows} x {columns} matrix are not known; expected the key"
            f" 'sterna.{name.lower()}.{rows}x{columns}' = [BM, BY, bm] in the file or {CONFIG_NAME} beside it"
        )
    inner = 256 // tiling.inner_rows  # columns that lie together
    if name == "TL2":
        whole = tiling.inner_rows == 32 and tiling.columns % 24 == 0
        rest = columns % tiling.columns
        whole = whole and rest % 32 == 0 and rest <= 256
    else:
        whole = tiling.inner_rows % 16 == 0 and 256 % tiling.inner_rows == 0 and inner % 4 == 0
        whole = whole and tiling.columns % inner == 0 and columns % tiling.columns == 0
    if not whole or rows % tiling.rows or tiling.rows % tiling.inner_rows:
        raise ModelFileError(
            f"type {name}: BM, BY, bm of {tiling.rows}, {tiling.columns}, {tiling.inner_rows} do not divide"
            f" a {rows} x {columns} matrix"
        )
    return tiling


def _matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ModelFileError(f"type {name}: expected 2 dimensions, found shape {shape}")
    return shape[0], shape[1]


def tl1_nbytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of a TL1 tensor."""
    rows, columns = _matrix_shape("TL1", shape)
    return rows * columns // 4 + _SCALE_NBYTES


def tl2_nbytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of a TL2 tensor: codes padded as if the last 256 columns were in pairs."""
    return _tl2_codes_nbytes(*_matrix_shape("TL2", shape)) + _SCALE_NBYTES


def _tl2_codes_nbytes(rows: int, columns: int) -> int:
    if columns < 256:
        raise ModelFileError(f"type TL2: expected at least 256 columns, found {columns}")
    codes = (columns - 256) * rows // 3 * 5 // 8 + 64 * rows
    return -(-codes // 32) * 32


def _scale(data: Bytes, at: int) -> np.float32:
    return np.float32(data[at : at + 4].copy().view("<f4")[0])


def _nibbles(packed: Bytes) -> Bytes:
    """Return the high, then the low half of each byte on a new last axis."""
    return np.stack((packed >> np.uint8(4), packed & np.uint8(15)), axis=-1)


def _pair_codes(index: Bytes) -> Bytes:
    """Return the codes of pairs, 3 * first + second, on a new last axis; 3 for an index beyond 8."""
    first, second = np.divmod(index, np.uint8(3))
    codes = np.stack((first, second), axis=-1)
    codes[index > 8] = 3
    return codes


def read_tl1(data: Bytes, rows: int, columns: int, tiling: Tiling | None) -> tuple[Bytes, np.float32]:
    """Return codes uint8 (rows, columns) and the scale; ModelFileError if the tiles are not known."""
    tiles = _checked("TL1", rows, columns, tiling)
    inner = 256 // tiles.inner_rows
    count = rows * columns // 4
    packed = data[:count].reshape(
        rows // tiles.rows, columns // tiles.columns, tiles.rows // tiles.inner_rows,
        tiles.columns // inner, tiles.inner_rows // 16, inner // 4, 16,
    )  # fmt: skip
    # (I, P, s, Q, u, v, lane, nibble) -> rows (I, s, u, lane), pairs (P, Q, v, nibble)
    index = _nibbles(packed).transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(rows, columns // 2)
    return _pair_codes(index).reshape(rows, columns), _scale(data, count)


def read_tl2(data: Bytes, rows: int, columns: int, tiling: Tiling | None) -> tuple[Bytes, np.float32]:
    """Return codes uint8 (rows, columns) and the scale; ModelFileError if the tiles are not known."""
    tiles = _checked("TL2", rows, columns, tiling)
    outer, subs = rows // tiles.rows, tiles.rows // 32
    in_threes = columns - columns % tiles.columns
    steps = in_threes // tiles.columns
    signs_at = rows * in_threes // 6
    pairs_at = signs_at + rows * in_threes // 24
    codes = np.empty((rows, columns), np.uint8)

    packed = data[:signs_at].reshape(outer, steps, subs, tiles.columns // 6, 32)[..., _SLOTS]
    # (I, P, s, Q, r2, nibble) -> rows (I, s, r2), triples (P, Q, nibble)
    index = _nibbles(packed).transpose(0, 2, 4, 1, 3, 5).reshape(rows, in_threes // 3)
    words = data[signs_at:pairs_at].copy().view("<u2")
    words = words.reshape(outer, steps, subs, tiles.columns // 24, 16, 1)
    bits = (words >> np.arange(15, -1, -1, dtype=np.uint16)) & np.uint16(1)
    # (I, P, s, G, row mod 16, t, row div 16) -> rows (I, s, row div 16, row mod 16), triples (P, G, t)
    bits = bits.reshape(*words.shape[:-1], 8, 2).transpose(0, 2, 6, 4, 1, 3, 5)
    negative = bits.reshape(rows, in_threes // 3).astype(bool)
    value = np.where(negative, np.uint8(13) - index, np.uint8(13) + index)
    threes = np.stack((value // 9, value // 3 % 3, value % 3), axis=-1)
    threes[index > 13] = 3
    codes[:, :in_threes] = threes.reshape(rows, in_threes)

    rest = columns - in_threes
    packed = data[pairs_at : pairs_at + rows * rest // 4].reshape(outer, rest // 32, subs, 8, 32)[..., _SLOTS]
    index = _nibbles(packed).transpose(0, 2, 4, 1, 3, 5).reshape(rows, rest // 2)
    codes[:, in_threes:] = _pair_codes(index).reshape(rows, rest)
    return codes, _scale(data, _tl2_codes_nbytes(rows, columns))
