"""How the K-quants lie in memory: bit planes of codes, sixteen rows interleaved, and their scales.

Codes come in chunks of 32 columns, [group of 16 rows][column / 32]. Byte j of dword lane i belongs to
row i; k = 0..7 counts the chunk's quartets of columns, 4 k + j being the column. A chunk's planes lie
one after the other and give the low bits first:

    nibbles  256 bytes  4 times [16 rows][4]; byte n: quartet n in the low half, n + 4 in the high half
    pairs    128 bytes  2 times [16 rows][4]; byte n: quartets 4 n + s in bits 2 s and 2 s + 1
    bits      64 bytes          [16 rows][4]; quartet k in bit k

Q4_K has nibbles, Q5_K nibbles and bits, Q6_K nibbles and pairs, Q3_K pairs and bits, Q2_K pairs: no
more bits than in the file. Scales, for each group and 256 columns (subs: 32 columns for Q4_K and Q5_K,
16 for the others):

    Q4_K, Q5_K  [8 subs][16 rows] scales, 2 times [16 rows][4 subs] minima, one byte each
    Q2_K        [8 chunks][16 rows] scales of a chunk's halves in the nibbles; then 2 times
                [16 rows][4 subs] minima: subs 4 n + i in the low nibble, 4 (n + 2) + i in the high
    Q3_K, Q6_K  [16 subs][16 rows] scales, int8

and at byte 256 float16 [16 rows] d; at byte 288, where there are minima, dmin. That is the file's size
but for the six-bit scales of Q3_K, Q4_K and Q5_K, which become bytes: 4 bytes more per 256 weights.
"""

from __future__ import annotations

import numpy as np

from ..kernel import kernel, piece
from ..simd.codes import load_dword, store_dword
from ..simd.planes import D_AT, DMIN_AT, MINIMA_AT, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K

BLOCK = 256

# Of each format, beginning with Q2_K: bytes of a block in the file; of the codes and of the integer
# scales of 16 rows of 32 columns; of all scales of 16 rows of 256 columns.
FILE_NBYTES = (84, 110, 144, 176, 210)
CHUNK_NBYTES = (128, 192, 256, 320, 384)
CHUNK_SCALES_NBYTES = (16, 32, 16, 16, 32)
SCALE_NBYTES = (320, 288, 320, 320, 288)
SUBS = (16, 16, 8, 8, 16)  # blocks with a scale of their own in 256 columns
QUADS = (4, 0, 2, 2, 0)  # vectors of minima, of four subs each
OFFSETS = (0, 4, 0, 0, 32)  # taken off a code: weight = scale * (code - offset)
WORK_NBYTES = 292  # of pack's scratch: codes, scales, minima, d and dmin of one block


@kernel
def _six_bits(raw, at, out, out_at):
    """Unpack the 8 scales and 8 minima of Q4_K and Q5_K from 12 bytes."""
    for j in range(4):
        out[out_at + j] = raw[at + j] & 63
        out[out_at + 8 + j] = raw[at + 4 + j] & 63
        out[out_at + 4 + j] = (raw[at + 8 + j] & 15) | ((raw[at + j] >> 6) << 4)
        out[out_at + 12 + j] = (raw[at + 8 + j] >> 4) | ((raw[at + 4 + j] >> 6) << 4)


@piece
def _field(word, shift, mask):
    """Return the bits of `mask` of four bytes at once, shifted right by `shift` (none may cross a byte)."""
    return np.uint32((np.uint32(word) >> np.uint32(shift)) & np.uint32(mask))


@kernel
def _unpack_four(five, raw, low, high, out):
    """Spread the codes of Q4_K, or with the bits at `high` of Q5_K, to out[:256]."""
    for j in range(4):
        for i in range(0, 32, 4):
            word = load_dword(raw, low + 32 * j + i)
            first, second = _field(word, 0, 0x0F0F0F0F), _field(word, 4, 0x0F0F0F0F)
            if five:
                bits = load_dword(raw, high + i)
                first |= _field(bits, 2 * j, 0x01010101) << np.uint32(4)
                second |= _field(bits, 2 * j + 1, 0x01010101) << np.uint32(4)
            store_dword(out, 64 * j + i, first)
            store_dword(out, 64 * j + 32 + i, second)


@kernel
def _unpack_six(raw, at, out):
    """Spread the codes of Q6_K to out[:256]."""
    for n in range(2):
        for i in range(0, 32, 4):
            high = load_dword(raw, at + 128 + 32 * n + i)
            for k in range(4):
                low = load_dword(raw, at + 64 * n + 32 * (k % 2) + i)
                code = _field(low, k // 2 * 4, 0x0F0F0F0F)
                code |= _field(high, 2 * k, 0x03030303) << np.uint32(4)
                store_dword(out, 128 * n + 32 * k + i, code)


@kernel
def _unpack_pairs(three, raw, low, high, out):
    """Spread the codes of Q2_K, or with the bits at `high` of Q3_K, to out[:256]."""
    for n in range(8):
        for i in range(0, 32, 4):
            code = _field(load_dword(raw, low + 32 * (n // 4) + i), 2 * (n % 4), 0x03030303)
            if three:
                code |= _field(load_dword(raw, high + i), n, 0x01010101) << np.uint32(2)
            store_dword(out, 32 * n + i, code)


@kernel
def _unpack(form, raw, at, out):
    """Spread a block of the file: out[:256] codes, from 256 scales, then minima, at 288 d and dmin.

    Scales and minima are 16 and 16 bytes for Q2_K, 8 and 8 for Q4_K and Q5_K, else 16 scales.
    """
    d_at, dmin_at = at, at + 2
    if form == Q4_K:
        _six_bits(raw, at + 4, out, 256)
        _unpack_four(False, raw, at + 16, 0, out)
    elif form == Q5_K:
        _six_bits(raw, at + 4, out, 256)
        _unpack_four(True, raw, at + 48, at + 16, out)
    elif form == Q6_K:
        d_at = at + 208
        _unpack_six(raw, at, out)
        for i in range(0, 16, 4):
            store_dword(out, 256 + i, load_dword(raw, at + 192 + i))
    elif form == Q3_K:
        d_at = at + 108
        _unpack_pairs(True, raw, at + 32, at, out)
        for i in range(16):
            low = raw[at + 96 + i % 8] >> (4 * (i // 8))
            high = raw[at + 104 + i % 4] >> (2 * (i // 4))
            out[256 + i] = np.uint8((((low & 15) | ((high & 3) << 4)) - 32) & 255)
    else:
        d_at, dmin_at = at + 80, at + 82
        _unpack_pairs(False, raw, at + 16, 0, out)
        for i in range(0, 16, 4):
            word = load_dword(raw, at + i)
            store_dword(out, 256 + i, _field(word, 0, 0x0F0F0F0F))
            store_dword(out, 272 + i, _field(word, 4, 0x0F0F0F0F))
    for i in range(2):
        out[288 + i] = raw[d_at + i]
        out[290 + i] = raw[dmin_at + i]


@kernel
def _place_codes(form, work, out, at, lane):
    """Write a row's 256 codes into its lane of the eight chunks from `at`."""
    step = CHUNK_NBYTES[form - Q2_K]
    nibbles = form >= Q4_K
    pairs, pair_shift = form not in (Q4_K, Q5_K), 4 if form == Q6_K else 0
    bits, bit_shift = form in (Q3_K, Q5_K), 4 if form == Q5_K else 2
    for chunk in range(8):
        byte = at + chunk * step + lane * 4
        source = chunk * 32
        if nibbles:
            for n in range(4):
                low = _field(load_dword(work, source + 4 * n), 0, 0x0F0F0F0F)
                high = _field(load_dword(work, source + 16 + 4 * n), 0, 0x0F0F0F0F)
                store_dword(out, byte + 64 * n, low | (high << np.uint32(4)))
            byte += 256
        if pairs:
            for n in range(2):
                whole = np.uint32(0)
                for s in range(4):
                    code = _field(load_dword(work, source + 16 * n + 4 * s), pair_shift, 0x03030303)
                    whole |= np.uint32(code << np.uint32(2 * s))
                store_dword(out, byte + 64 * n, whole)
            byte += 128
        if bits:
            whole = np.uint32(0)
            for k in range(8):
                code = _field(load_dword(work, source + 4 * k), bit_shift, 0x01010101)
                whole |= np.uint32(code << np.uint32(k))
            store_dword(out, byte, whole)


@kernel
def _place_scales(form, work, out, at, lane):
    """Write a row's scales of one block into its lane."""
    if form in (Q4_K, Q5_K):
        for s in range(8):
            out[at + s * 16 + lane] = work[256 + s]
            out[at + MINIMA_AT + (s // 4) * 64 + lane * 4 + s % 4] = work[264 + s]
    elif form == Q2_K:
        for s in range(8):
            out[at + s * 16 + lane] = work[256 + 2 * s] | (work[257 + 2 * s] << 4)
            byte = at + MINIMA_AT + (s // 4) * 64 + lane * 4 + s % 4
            out[byte] = work[272 + s] | (work[280 + s] << 4)
    else:
        for s in range(16):
            out[at + s * 16 + lane] = work[256 + s]
    for i in range(2):
        out[at + D_AT + lane * 2 + i] = work[288 + i]
        if form not in (Q3_K, Q6_K):
            out[at + DMIN_AT + lane * 2 + i] = work[290 + i]


@kernel
def pack(form, raw, rows, columns, work, out, codes_at, scales_at):
    """Pack the file's blocks (raw: uint8) of a (rows, columns) matrix into `out`.

    work: uint8 (WORK_NBYTES,). Rows beyond N up to the next multiple of 16 become zero weights.
    """
    block_nbytes = FILE_NBYTES[form - Q2_K]
    blocks = columns // BLOCK
    for group in range((rows + 15) // 16):
        for lane in range(16):
            row = group * 16 + lane
            for b in range(blocks):
                if row < rows:
                    _unpack(form, raw, (row * blocks + b) * block_nbytes, work)
                else:
                    work[:] = 0
                block = group * blocks + b
                _place_codes(form, work, out, codes_at + block * 8 * CHUNK_NBYTES[form - Q2_K], lane)
                _place_scales(form, work, out, scales_at + block * SCALE_NBYTES[form - Q2_K], lane)
