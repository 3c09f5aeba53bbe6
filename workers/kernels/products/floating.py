"""F32, F16 and BF16 matrices, sixteen rows interleaved: [group][column][16 rows], no scales."""

from __future__ import annotations

from ..kernel import kernel, merged, named
from ..simd.ops import add_f32, broadcast_f32, fma_f32, load_bf16, load_f16, load_f32, store_f32, zero_f32

F32, F16, BF16 = 0, 1, 2
BLOCK = 4  # columns come in fours: four sums run side by side


def nbytes(rows: int, columns: int, width: int) -> int:
    """Return the packed size; `rows` is padded to 16, `width` is bytes per element."""
    return -(-rows // 16) * 16 * columns * width


@merged
def _weights(form, w, at):
    if form == F32:
        return load_f32(w, at)
    if form == F16:
        return load_f16(w, at)
    return load_bf16(w, at)


@kernel
def _one_token(form, w, first, second, columns, x, row, out, element):
    """Compute two groups of 16 rows, at bytes `first` and `second` of w, for one token."""
    step = 64 if form == F32 else 32
    a0, a1, a2, a3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    b0, b1, b2, b3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    for k in range(0, columns, 4):
        p, r = first + k * step, second + k * step
        c = 4 * (row * columns + k)
        x0, x1 = broadcast_f32(x, c), broadcast_f32(x, c + 4)
        x2, x3 = broadcast_f32(x, c + 8), broadcast_f32(x, c + 12)
        a0 = fma_f32(_weights(form, w, p), x0, a0)
        b0 = fma_f32(_weights(form, w, r), x0, b0)
        a1 = fma_f32(_weights(form, w, p + step), x1, a1)
        b1 = fma_f32(_weights(form, w, r + step), x1, b1)
        a2 = fma_f32(_weights(form, w, p + 2 * step), x2, a2)
        b2 = fma_f32(_weights(form, w, r + 2 * step), x2, b2)
        a3 = fma_f32(_weights(form, w, p + 3 * step), x3, a3)
        b3 = fma_f32(_weights(form, w, r + 3 * step), x3, b3)
    store_f32(out, 4 * element, add_f32(add_f32(a0, a1), add_f32(a2, a3)))
    if second != first:
        store_f32(out, 4 * (element + 16), add_f32(add_f32(b0, b1), add_f32(b2, b3)))


@kernel
def _three_tokens(form, w, start, columns, x, r0, r1, r2, out, element, out_step):
    """Compute a group of 16 rows at byte `start` of w for three tokens, loading its weights once."""
    step = 64 if form == F32 else 32
    a0, a1, a2, a3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    b0, b1, b2, b3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    c0, c1, c2, c3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    for k in range(0, columns, 4):
        p = start + k * step
        x0, x1, x2 = 4 * (r0 * columns + k), 4 * (r1 * columns + k), 4 * (r2 * columns + k)
        v = _weights(form, w, p)
        a0 = fma_f32(v, broadcast_f32(x, x0), a0)
        b0 = fma_f32(v, broadcast_f32(x, x1), b0)
        c0 = fma_f32(v, broadcast_f32(x, x2), c0)
        v = _weights(form, w, p + step)
        a1 = fma_f32(v, broadcast_f32(x, x0 + 4), a1)
        b1 = fma_f32(v, broadcast_f32(x, x1 + 4), b1)
        c1 = fma_f32(v, broadcast_f32(x, x2 + 4), c1)
        v = _weights(form, w, p + 2 * step)
        a2 = fma_f32(v, broadcast_f32(x, x0 + 8), a2)
        b2 = fma_f32(v, broadcast_f32(x, x1 + 8), b2)
        c2 = fma_f32(v, broadcast_f32(x, x2 + 8), c2)
        v = _weights(form, w, p + 3 * step)
        a3 = fma_f32(v, broadcast_f32(x, x0 + 12), a3)
        b3 = fma_f32(v, broadcast_f32(x, x1 + 12), b3)
        c3 = fma_f32(v, broadcast_f32(x, x2 + 12), c3)
    store_f32(out, 4 * element, add_f32(add_f32(a0, a1), add_f32(a2, a3)))
    store_f32(out, 4 * (element + out_step), add_f32(add_f32(b0, b1), add_f32(b2, b3)))
    store_f32(out, 4 * (element + 2 * out_step), add_f32(add_f32(c0, c1), add_f32(c2, c3)))


@kernel
def _gemm(form, w, codes_at, groups, columns, x, rows, count, out, out_at, out_step):
    group_nbytes = columns * (64 if form == F32 else 32)
    threes = count // 3 * 3
    for group in range(0, groups, 2):
        first = codes_at + group * group_nbytes
        here = min(2, groups - group)
        for g in range(here):
            for t in range(0, threes, 3):
                _three_tokens(
                    form, w, first + g * group_nbytes, columns, x, rows[t], rows[t + 1], rows[t + 2], out,
                    out_at + (group + g) * 16 + t * out_step, out_step,
                )  # fmt: skip
        second = first + group_nbytes * (here - 1)
        for t in range(threes, count):
            _one_token(form, w, first, second, columns, x, rows[t], out, out_at + group * 16 + t * out_step)


def _gemm_of(number):
    """Return the product of the format `number` alone."""

    def gemm(
        form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out,
        out_at, out_step,
    ):  # fmt: skip
        """out[t, :] = W @ x[rows[t]] for t < count; arguments as ternary.gemm.

        Four partial sums over columns 0, 1, 2, 3 modulo 4 are added as (0 + 1) + (2 + 3).
        """
        _gemm(number, w, codes_at, groups, columns, x, rows, count, out, out_at, out_step)

    return kernel(named(gemm, number))


GEMMS = {number: _gemm_of(number) for number in (F32, F16, BF16)}
