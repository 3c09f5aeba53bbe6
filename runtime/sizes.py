"""Sizes and shares as people write them: "700MiB", "3GiB", "1.5G", "25%". Pure functions."""

from __future__ import annotations

import re
from fractions import Fraction

# A bare letter is binary, as in every tool that limits memory.
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}{end}": 2 ** (10 * (i + 1)) for i, letter in enumerate("KMGT") for end in ("", "IB")}
_UNITS |= {f"{letter}B": 10 ** (3 * (i + 1)) for i, letter in enumerate("KMGT")}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})")
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%")
MAX_SIZE = 2**60


def parse_size(text: str) -> int:
    """Return bytes: a number, then nothing or B, KiB..TiB or K..T (powers of 1024), kB..TB (of 1000).

    Raises ValueError with a line for the user, also above 1 EiB; a fraction of a byte is cut off.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ValueError(f"expected a size such as 700MiB, 3GiB or 1.5G, found {text[:40]!r}")
    size = int(Fraction(found[1]) * unit)
    if size > MAX_SIZE:
        raise ValueError(f"a size of {text[:40]!r} is above the limit of 1 EiB")
    return size


def parse_share(text: str) -> float:
    """Return 0..1 for a percentage such as "25%" or "0.5 %"; raises ValueError with a line for the user."""
    found = _SHARE.fullmatch(text.strip())
    if found is None or Fraction(found[1]) > 100:
        raise ValueError(f"expected a share such as 25%, at most 100%, found {text[:40]!r}")
    return float(Fraction(found[1]) / 100)


def format_size(size: int) -> str:
    """Return a size with the largest binary unit of which it is one or more: "700 MiB", "1.5 GiB"."""
    return _in_units(size, 1024, ("KiB", "MiB", "GiB", "TiB"))


def format_given(size: int) -> str:
    """Return a size that somebody may have given, as `format_size`, or in decimal units: "10 MB".

    Decimal ones are taken where they give the size exactly and binary ones do not.
    """
    binary, decimal = format_size(size), _in_units(size, 1000, ("kB", "MB", "GB", "TB"))
    return decimal if parse_size(binary) != size == parse_size(decimal) else binary


def _in_units(size: int, base: int, units: tuple[str, ...]) -> str:
    value, unit = float(size), "B"
    for larger in units:
        if abs(value) < base:
            break
        value, unit = value / base, larger
    digits = f"{value:.1f}".removesuffix(".0") if abs(value) < 100 else f"{value:.0f}"
    return f"{digits} {unit}"
