"""How much scratch kernels need: for who allocates it and who plans memory. Pure arithmetic, no numba.

A product's scratch depends on the target: on how many groups of rows and tokens it takes at a time. Its
module says what its own kernel needs by these formulas; buffers are allocated for the most that any target
takes, so that the daemon, which does not know the target when it plans, counts exactly what is allocated.
"""

from __future__ import annotations

MOST_GROUPS = 2
"""Groups of sixteen rows that a target takes at a time: see `simd.groups`."""

MOST_TOKENS = 8
"""Tokens that a target takes at a time."""

SPREAD = 64 * 64
"""Bytes between the groups' unpacked codes: a block of 256 columns, one byte a code."""

HEADS = 4
"""Heads that attention computes at a time."""

K_SIDE = 24
"""Dwords that products of K formats read along with each block of 256 activations."""


def areas_nbytes(columns: int, tokens: int, groups: int) -> int:
    """Return the bytes for up to `tokens` tokens in up to four areas, of blocks of 256: `products.areas`."""
    a_token = columns + 8 * (columns // 256) + 64 * groups
    return 64 + groups * SPREAD + 4 * 64 + (tokens + 1) * a_token


def base3_nbytes(columns: int, tokens: int, groups: int, tile: int) -> int:
    """Return the bytes for up to `tokens` tokens: `products.base3`."""
    tiled = -(-tokens // tile) * tile
    return areas_nbytes(columns, tiled, groups) + 4 * tiled


def panels_nbytes(columns: int, tokens: int, groups: int) -> int:
    """Return the bytes for up to `tokens` tokens, in blocks of 32: `products.panels`."""
    return 64 + groups * SPREAD + 64 + tokens * (columns + 8 * (columns // 32) + 64 * groups)


def kquants_nbytes(columns: int, tokens: int, groups: int, tile: int) -> int:
    """Return the bytes for up to `tokens` tokens: `products.kquants`."""
    blocks = -(-columns // 256)
    area_at = groups * (SPREAD + 16 * 64 + 4 * 64 + tile * 64)
    return 64 + area_at + 64 + tokens * (blocks * (256 + 8 + 4 * K_SIDE) + 64 * groups)


def product_nbytes(columns: int, tokens: int) -> int:
    """Return the bytes for any product over up to `columns` columns and `tokens` tokens, on any target."""
    return max(
        base3_nbytes(columns, tokens, MOST_GROUPS, MOST_TOKENS),
        panels_nbytes(columns, tokens, MOST_GROUPS),
        kquants_nbytes(columns, tokens, MOST_GROUPS, MOST_TOKENS),
    )


def attention_shapes(
    threads: int, context: int, rank: int, width: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of attention's `scratch` (float32) and `rows` (int64) for up to `context` positions.

    rank, width: elements of a value and of a key; in grouped attention both are a head's.
    """
    return (threads, HEADS * (width + context + 16 + rank)), (threads, context + 16)
