"""Compiling every kernel, or loading it from the cache, before a process is forked that needs it.

Each step runs a kernel once on the smallest input with the argument types of the real calls: what is
compiled here is what runs later.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..workers.kernels import attention, ffn, floating, norms, q8, routing, selftest, ternary
from ..workers.kernels.activations import QuantizedRows

_ARENA = np.zeros(1 << 16, np.uint8)
_SCRATCH = np.zeros(1 << 14, np.uint8)
_INDEX = np.zeros(1, np.int32)
_ROWS = np.zeros((1, 256), np.float32)


def steps() -> list[tuple[str, Callable[[], None]]]:
    """Return (name, function) pairs; running each once makes every later call start at once."""
    return [
        ("pack ternary", _pack_ternary),
        ("pack 8 bit", _pack_q8),
        ("pack floats", _pack_floats),
        ("quantise activations", _quantize),
        ("matrix products", _multiply),
        ("experts", _experts),
        ("norms", _norms),
        ("attention", _attention),
        ("routing", _routing),
        ("self-test", selftest.run),
    ]


def _pack_ternary() -> None:
    ternary.pack(np.zeros((1, 256), np.uint8), np.zeros((1, 1), np.uint16), _ARENA, 0, 1024)


def _read_only() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return bytes as a file mapping gives them: numba has a type of its own for read-only arrays."""
    return np.frombuffer(bytes(256 * 4), np.uint8)


def _pack_q8() -> None:
    q8.pack(_read_only(), 1, 32, _ARENA, 0, 512)


def _pack_floats() -> None:
    floating.pack(_read_only(), 1, 4, 4, _ARENA, 0)


def _quantize() -> None:
    for block in (32, 256):
        QuantizedRows.allocate(1, 256, block).fill(_ROWS, 1)


def _multiply() -> None:
    q = QuantizedRows.allocate(1, 256, 256)
    out = np.zeros((1, 16), np.float32)
    ffn.multiply_heads(
        ffn.TL1, _ARENA, 0, 1024, 0, 0, 1, 1, 256, _ROWS, q.q, q.scales, q.sums, _INDEX.reshape(1, 1), 1,
        _SCRATCH, out,
    )  # fmt: skip


def _experts() -> None:
    q, m = QuantizedRows.allocate(1, 256, 256), QuantizedRows.allocate(1, 256, 32)
    gate, up, out = (np.zeros((1, 256), np.float32) for _ in range(3))
    ffn.expert_batch(
        _ARENA, _matrices(), np.array([0, 1], np.int64), _INDEX, 256, 256, _ROWS, q.q, q.scales, q.sums,
        gate, up, m.q, m.scales, m.sums, _INDEX, _SCRATCH, out,
    )  # fmt: skip


def _matrices() -> np.ndarray[tuple[int, int, int], np.dtype[np.int64]]:
    place = (ffn.TL1, 0, 256 * 256 // 4)
    return np.array([[place, place, place]], np.int64)


def _norms() -> None:
    one, out = np.ones(256, np.float32), np.zeros((1, 256), np.float32)
    table = np.zeros((1, 16), np.float32)
    norms.rms_rows(_ROWS, 256, one, np.float32(1e-6), 1, 256, out)
    norms.rope_pairs(out.reshape(-1), 0, 256, 1, 0, 16, _INDEX, table, table, 1)
    norms.store_latent(out, out.reshape(-1), 32, 48, 32, 48, np.zeros(1, np.int64), 1, _ARENA, 0)
    norms.add_rows(out, out, 1, 256)
    norms.first_bad_row(out, 1, 256)


def _attention() -> None:
    q = np.zeros((1, 32), np.float32)
    flat = np.zeros(48, np.float32)
    attention.latent_attention(
        q, flat, 32, 48, 48, 1, 32, 48, np.float32(1.0), _ARENA, 0, np.zeros((1, 1), np.int32), _INDEX,
        _INDEX, 16, 1, np.zeros(32, np.float32), np.zeros(32, np.int64), np.zeros((1, 32), np.float32),
    )  # fmt: skip


def _routing() -> None:
    logits, bias, p = np.zeros((1, 16), np.float32), np.zeros(2, np.float32), np.zeros(2, np.float32)
    selected, weights = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
    ends, pairs = np.zeros(3, np.int32), np.zeros(1, np.int32)
    y = np.zeros((1, 1, 256), np.float32)
    routing.route_top_k(logits, bias, 1, 2, 2, True, np.float32(1.0), p, selected, weights)
    routing.group_by_expert(selected, 1, ends, pairs, pairs.copy())
    rows = np.frombuffer(bytes(1024), np.float32).reshape(1, 256)
    routing.scatter_pairs(rows, pairs, pairs, 0, 1, y)
    routing.all_below(_INDEX, 1)
    routing.combine(np.zeros((1, 256), np.float32), y, weights, np.zeros((1, 256), np.float32), 1)
