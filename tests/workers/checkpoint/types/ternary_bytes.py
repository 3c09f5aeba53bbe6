"""Encoders of ternary file types, written one weight at a time from the layouts' text; no test in here.

`codes` are uint8 (rows, columns), weight + 1. Block types take scales float16 (rows, columns / block),
row types float32 or float16 (rows,), tensor types one float.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]


def base3(trits: list[int]) -> int:
    """Return ceil(v * 256 / 243) for five trits, the most significant first."""
    value = 0
    for trit in [*trits, 0, 0, 0, 0][:5]:
        value = 3 * value + trit
    return -(-value * 256 // 243)


def _blocks(codes: U8, block: int) -> Iterator[tuple[int, int, list[int]]]:
    for row in range(len(codes)):
        for b in range(codes.shape[1] // block):
            yield row, b, codes[row, b * block : (b + 1) * block].tolist()


def _joined(parts: list[bytes]) -> U8:
    """Return the bytes as a file gives them: read-only."""
    return np.frombuffer(b"".join(parts), np.uint8)


def read_only(array: npt.NDArray[np.generic]) -> U8:
    """Return the bytes of `array` as a file gives them."""
    return _joined([array.tobytes()])


def _packed(count: int, fields: Iterator[tuple[int, int, int]]) -> bytes:
    """Return `count` bytes with (byte, bit, code) or-ed in."""
    out = bytearray(count)
    for byte, bit, code in fields:
        out[byte] |= code << bit
    return bytes(out)


def tq2_0(codes: U8, scales: F16) -> U8:
    parts = []
    for row, b, w in _blocks(codes, 256):
        fields = ((h + m, 2 * i, w[4 * h + 32 * i + m]) for h in (0, 32) for m in range(32) for i in range(4))
        parts.append(_packed(64, fields) + scales[row, b].tobytes())
    return _joined(parts)


def tq1_0(codes: U8, scales: F16) -> U8:
    parts = []
    for row, b, w in _blocks(codes, 256):
        qs = [base3([w[32 * n + m] for n in range(5)]) for m in range(32)]
        qs += [base3([w[160 + 16 * n + m] for n in range(5)]) for m in range(16)]
        qs += [base3([w[240 + 4 * n + j] for n in range(4)]) for j in range(4)]
        parts.append(bytes(qs) + scales[row, b].tobytes())
    return _joined(parts)


def ptq1_0(codes: U8, scales: F16) -> U8:
    parts = []
    for row, b, w in _blocks(codes, 128):
        qs = [base3([w[16 * n + m] for n in range(5)]) for m in range(16)]
        qs += [base3([w[80 + 8 * n + m] for n in range(5)]) for m in range(8)]
        qs += [base3([w[120 + 2 * n + j] for n in range(4)]) for j in range(2)]
        parts.append(bytes(qs) + scales[row, b].tobytes())
    return _joined(parts)


def _in_order(w: list[int]) -> bytes:
    return _packed(len(w) // 4, ((i // 4, 2 * (i % 4), code) for i, code in enumerate(w)))


def q2_0(codes: U8, scales: F16, block: int = 64) -> U8:
    return _joined([scales[row, b].tobytes() + _in_order(w) for row, b, w in _blocks(codes, block)])


def pq2_0(codes: U8, scales: F16) -> U8:
    return q2_0(codes, scales, 128)


def t158(codes: U8, scales: F16) -> U8:
    return _joined([_in_order(w) + scales[row, b].tobytes() for row, b, w in _blocks(codes, 256)])


def i2_s(codes: U8, scale: float) -> U8:
    parts = []
    for _, _, w in _blocks(codes.reshape(1, -1), 128):
        parts.append(_packed(32, ((j, 6 - 2 * i, w[32 * i + j]) for i in range(4) for j in range(32))))
    return _joined([*parts, struct.pack("<f28x", scale)])


def iq2_bn(codes: U8, scales: F32) -> U8:
    parts = []
    for row, b, w in _blocks(codes, 64):
        head = scales[row].tobytes() if b == 0 else b""
        parts.append(head + _packed(16, ((j, 2 * i, w[16 * i + j]) for i in range(4) for j in range(16))))
    return _joined(parts)


def iq2_bn_r4(codes: U8, scales: F32) -> U8:
    parts = []
    for first in range(0, len(codes), 4):
        parts.append(scales[first : first + 4].tobytes())
        for b in range(codes.shape[1] // 64):
            w = codes[first : first + 4, 64 * b : 64 * b + 64].tolist()
            fields = (
                (16 * q + 4 * k + i, 2 * s, w[k][16 * q + 4 * s + i])
                for q in range(4)
                for k in range(4)
                for i in range(4)
                for s in range(4)
            )
            parts.append(_packed(64, fields))
    return _joined(parts)


def iq1_bn(codes: U8, scales: F16) -> U8:
    parts = []
    for row, b, w in _blocks(codes, 64):
        head = scales[row].tobytes() if b == 0 else b""
        ql = [base3([w[16 * g + 5 * k + j] for j in (4, 3, 2, 1, 0)]) for g in range(4) for k in range(3)]
        extra = base3([0, *(w[16 * g + 15] for g in (3, 2, 1, 0))])
        parts.append(head + bytes([*ql, extra]))
    return _joined(parts)


def tl1(codes: U8, scale: float, tiles: tuple[int, int, int]) -> U8:
    (m, k), (bm_outer, by_outer, bm) = codes.shape, tiles
    by = 256 // bm
    out = bytearray(m * k // 4)
    for r in range(m):
        i, r1 = divmod(r, bm_outer)
        s, r2 = divmod(r1, bm)
        u, lane = divmod(r2, 16)
        for p in range(k // 2):
            outer, p1 = divmod(p, by_outer // 2)
            q, p2 = divmod(p1, by // 2)
            at = i * (k // by_outer) + outer
            at = (at * (bm_outer // bm) + s) * (by_outer // by) + q
            at = ((at * (bm // 16) + u) * (by // 4) + p2 // 2) * 16 + lane
            index = 3 * (int(codes[r, 2 * p]) - 1) + int(codes[r, 2 * p + 1]) - 1 + 4
            out[at] |= index << (0 if p2 % 2 else 4)
    return _joined([bytes(out), struct.pack("<f28x", scale)])


def tl2(codes: U8, scale: float, tiles: tuple[int, int]) -> U8:
    (m, k), (bm, by) = codes.shape, tiles
    k3 = k - k % by
    size = int(Fraction((k - 256) * m // 3 * 5 // 8 + 256 * m // 2 * 4 // 8))
    out = bytearray(size + -size % 32)
    weights = codes.astype(int) - 1
    for r in range(m):
        i, r1 = divmod(r, bm)
        s, r2 = divmod(r1, 32)
        slot = (0, 2, 1, 3)[r2 // 8] * 8 + r2 % 8
        for p in range(k3 // 3):
            a, b, c = weights[r, 3 * p : 3 * p + 3].tolist()
            value = 9 * a + 3 * b + c
            outer, p1 = divmod(p, by // 3)
            tile = (i * (k3 // by) + outer) * (bm // 32) + s
            out[(tile * (by // 6) + p1 // 2) * 32 + slot] |= abs(value) << (0 if p1 % 2 else 4)
            if value < 0:
                word = (tile * (by // 24) + p1 // 8) * 16 + r2 % 16
                bit = 15 - (2 * (p1 % 8) + r2 // 16)
                out[m * k3 // 6 + 2 * word + bit // 8] |= 1 << (bit % 8)
        for p in range((k - k3) // 2):
            w0, w1 = weights[r, k3 + 2 * p : k3 + 2 * p + 2].tolist()
            outer, p1 = divmod(p, 16)
            tile = (i * ((k - k3) // 32) + outer) * (bm // 32) + s
            at = m * k3 // 6 + m * k3 // 24 + (tile * 8 + p1 // 2) * 32 + slot
            out[at] |= (3 * w0 + w1 + 4) << (0 if p1 % 2 else 4)
    return _joined([bytes(out), struct.pack("<f28x", scale)])


BlockEncoder = Callable[[U8, F16], U8]
BLOCK_TYPES: dict[str, tuple[BlockEncoder, int]] = {
    "TQ1_0": (tq1_0, 256),
    "TQ2_0": (tq2_0, 256),
    "Q2_0": (q2_0, 64),
    "PQ2_0": (pq2_0, 128),
    "PTQ1_0": (ptq1_0, 128),
    "BITNET_T158": (t158, 256),
}
