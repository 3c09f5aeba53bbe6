"""F32, F16 and BF16 matrices, sixteen rows interleaved: [group][column][16 rows], no scales."""

from __future__ import annotations

from .kernel import kernel
from .simd.ops import (
    add_f32,
    broadcast_f32,
    fma_f32,
    load_bf16,
    load_f16,
    load_f32,
    store_f32,
    zero_f32,
)

F32, F16, BF16 = 0, 1, 2
BLOCK = 4  # columns come in fours: four sums run side by side


def nbytes(rows: int, columns: int, width: int) -> int:
    """Return the packed size; `rows` is padded to 16, `width` is bytes per element."""
    return -(-rows // 16) * 16 * columns * width


@kernel
def _weights(kind, w, at):
    if kind == F32:
        return load_f32(w, at)
    if kind == F16:
        return load_f16(w, at)
    return load_bf16(w, at)


@kernel
def gemm(
    form, w, codes_at, scales_at, groups, columns, x, q, x_scales, x_sums, rows, count, scratch, out, out_at,
    out_step,
):  # fmt: skip
    """out[t, :] = W @ x[rows[t]] for t < count; arguments as ternary.gemm.

    Four partial sums over columns 0, 1, 2, 3 modulo 4 are added as (0 + 1) + (2 + 3).
    """
    width = 4 if form == F32 else 2
    step = 16 * width
    for group in range(groups):
        start = codes_at + group * columns * step
        for t in range(count):
            a0 = zero_f32()
            a1 = zero_f32()
            a2 = zero_f32()
            a3 = zero_f32()
            base = rows[t] * columns
            for k in range(0, columns, 4):
                p = start + k * step
                c = 4 * (base + k)
                a0 = fma_f32(_weights(form, w, p), broadcast_f32(x, c), a0)
                a1 = fma_f32(_weights(form, w, p + step), broadcast_f32(x, c + 4), a1)
                a2 = fma_f32(_weights(form, w, p + 2 * step), broadcast_f32(x, c + 8), a2)
                a3 = fma_f32(_weights(form, w, p + 3 * step), broadcast_f32(x, c + 12), a3)
            total = add_f32(add_f32(a0, a1), add_f32(a2, a3))
            store_f32(out, 4 * (out_at + group * 16 + t * out_step), total)
