"""The tile sizes of TL1 and TL2 tensors, which a GGUF file does not hold with them.

They come from the key `sterna.tl1.<rows>x<columns>` (or `tl2`), an array BM, BY, bm, or from the
`kernel_config.ini` with which the file was made, beside it.
"""

from __future__ import annotations

import configparser
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from ....shm.errors import ModelFileError
from ..types.bitnet import CONFIG_NAME, Tiling
from .metadata import GgufArray

MAX_CONFIG_BYTES: Final = 1 << 16
MAX_TILE: Final = 1 << 20


class TiledFile(Protocol):
    """What `find_tiling` needs of an open model file."""

    @property
    def path(self) -> str:
        """Where it lies."""

    def get(self, key: str, value_type: type[GgufArray], default: None) -> GgufArray | None:
        """Return an array of its metadata."""


def find_tiling(file: TiledFile, type_name: str, rows: int, columns: int) -> Tiling | None:
    """Return the tile sizes for a `rows` x `columns` matrix of type "TL1" or "TL2", or None.

    Looks for the file's key `sterna.tl1.<rows>x<columns>` (`tl2`), then for kernel_config.ini in the
    file's folder. ModelFileError for sizes that are there but make no sense.
    """
    key = f"sterna.{type_name.lower()}.{rows}x{columns}"
    values = file.get(key, GgufArray, None)
    if values is not None:
        return _tile_sizes(list(values[:4]), f"key {key!r}")
    return _configured(Path(file.path).with_name(CONFIG_NAME), rows, columns)


def _tile_sizes(values: Sequence[object], where: str) -> Tiling:
    numbers = [value for value in values if isinstance(value, int) and 0 < value <= MAX_TILE]
    if len(numbers) != len(values) or len(numbers) != 3:
        raise ModelFileError(
            f"{where}: expected three positive sizes BM, BY, bm, found {str(list(values))[:80]}"
        )
    return Tiling(*numbers)


def _configured(path: Path, rows: int, columns: int) -> Tiling | None:
    """Return the tile sizes for a shape from the configuration at `path`; None if it has none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise ModelFileError(f"{path}: expected at most {MAX_CONFIG_BYTES} characters")
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read_string(text)
        for name in config.sections():
            section = config[name]
            if (int(section["m"]), int(section["k"])) == (rows, columns):
                return _tile_sizes(
                    [int(section[key]) for key in ("bm", "bk", "bmm")], f"{path}: section {name!r}"
                )
    except (configparser.Error, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelFileError(f"{path}: expected sections with m, k, bm, bk, bmm: {reason}") from None
    return None
