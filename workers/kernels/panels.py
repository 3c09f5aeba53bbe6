"""Activations of several tokens side by side, as the tile kernels of `nibbles` and `kquants` read them.

    panel of eight tokens = for each 4 columns: [token 0: 4 int8] ... [token 7: 4 int8]

Eight panels' worth of tokens follow one another; `columns` * 8 bytes each.
"""

from __future__ import annotations

from .kernel import kernel
from .simd.codes import load_dword, store_dword

TILE = 8


@kernel
def copy_panels(q, columns, rows, count, scratch, at):
    """Copy rows[:count] of `q` (int8), `count` a multiple of eight, to panels from byte `at`."""
    for t in range(0, count, TILE):
        for i in range(TILE):
            source = rows[t + i] * columns
            place = at + t * columns + 4 * i
            for k in range(columns // 4):
                store_dword(scratch, place + k * 4 * TILE, load_dword(q, source + 4 * k))
