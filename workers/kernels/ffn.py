"""One expert's feed-forward network, and whole batches of them: down(silu(gate x) * (up x)).

Matrices lie in a uint8 arena and are named by (format, codes_at, scales_at). The formats are those
of `ternary`, `q8` and `floating`; `multiply` picks the kernel.
"""

from __future__ import annotations

from . import floating, q8, ternary
from .activations import quantize_rows
from .kernel import kernel, piece
from .simd.mathematics import silu_f32
from .simd.ops import load_f32, mul_f32, store_f32

F32, F16, BF16, Q8, TL1 = 0, 1, 2, 3, 4

_ternary_gemm = ternary.gemm
_q8_gemm = q8.gemm
_floating_gemm = floating.gemm


def scratch_nbytes(columns: int, tokens: int) -> int:
    """Return the size of the scratch for products over up to `columns` columns and `tokens` tokens."""
    return max(ternary.scratch_nbytes(columns, tokens), q8.scratch_nbytes(columns, tokens))


@kernel
def multiply(
    form, w, codes_at, scales_at, groups, columns, x, q, scales, sums, rows, count, scratch, out, out_at, step
):  # fmt: skip
    """out[t] = W @ x[rows[t]]: float formats read x, the others (q, scales, sums)."""
    if form == TL1:
        _ternary_gemm(
            w, codes_at, scales_at, groups, columns, q, scales, sums, rows, count, scratch, out, out_at, step
        )
    elif form == Q8:
        _q8_gemm(
            w, codes_at, scales_at, groups, columns, q, scales, sums, rows, count, scratch, out, out_at, step
        )
    else:
        _floating_gemm(form, w, codes_at, groups, columns, x, rows, count, out, out_at, step)


@kernel
def multiply_heads(
    form, w, codes_at, scales_at, codes_step, scales_step, heads, groups, columns,
    x, q, scales, sums, index, count, scratch, out,
):  # fmt: skip
    """out[t, h] = W[h] @ x[index[h, t]] for one matrix of 16 * groups rows per head, `*_step` bytes apart.

    index: int32 (heads, >= count); out: float32 (count, heads * 16 * groups).
    """
    for h in range(heads):
        multiply(
            form, w, codes_at + h * codes_step, scales_at + h * scales_step, groups, columns,
            x, q, scales, sums, index[h], count, scratch, out, h * 16 * groups, heads * 16 * groups,
        )  # fmt: skip


@piece
def gated(gate, up, count, width):
    """gate = silu(gate) * up for `count` contiguous rows of `width` float32."""
    for i in range(0, count * width, 16):
        store_f32(gate, 4 * i, mul_f32(silu_f32(load_f32(gate, 4 * i)), load_f32(up, 4 * i)))


@piece
def feed_forward(
    w, matrices, m, d_model, d_ff, x, q, scales, sums, rows, count,
    gate, up, hq, h_scales, h_sums, identity, scratch, out, out_at, out_step,
):  # fmt: skip
    """Compute expert `m` for the tokens `rows`; out row t starts at element out_at + t * out_step.

    matrices: int64 (experts, 3, 3): gate, up, down as (format, codes_at, scales_at); gate, up:
    float32 scratch (count, d_ff); hq, h_scales, h_sums: scratch for the quantised middle;
    identity: int32 0, 1, 2, ...; scratch: uint8, see scratch_nbytes. d_model and d_ff are multiples of 16.
    """
    groups = d_ff // 16
    g_form, g_codes, g_scales = matrices[m, 0, 0], matrices[m, 0, 1], matrices[m, 0, 2]
    u_form, u_codes, u_scales = matrices[m, 1, 0], matrices[m, 1, 1], matrices[m, 1, 2]
    d_form, d_codes, d_scales = matrices[m, 2, 0], matrices[m, 2, 1], matrices[m, 2, 2]
    multiply(
        g_form, w, g_codes, g_scales, groups, d_model, x, q, scales, sums, rows, count, scratch, gate, 0, d_ff
    )
    multiply(
        u_form, w, u_codes, u_scales, groups, d_model, x, q, scales, sums, rows, count, scratch, up, 0, d_ff
    )
    gated(gate, up, count, d_ff)
    if d_form == TL1:
        quantize_rows(gate, count, d_ff, 256, hq, h_scales, h_sums)
    elif d_form == Q8:
        quantize_rows(gate, count, d_ff, 32, hq, h_scales, h_sums)
    blocks = d_ff // (256 if d_form == TL1 else 32)
    multiply(
        d_form, w, d_codes, d_scales, d_model // 16, d_ff, gate, hq,
        h_scales.ravel()[: count * blocks].reshape(count, blocks),
        h_sums.ravel()[: count * blocks].reshape(count, blocks),
        identity, count, scratch, out, out_at, out_step,
    )  # fmt: skip


@kernel
def expert_batch(
    w, matrices, starts, rows, d_model, d_ff, x, q, scales, sums,
    gate, up, hq, h_scales, h_sums, identity, scratch, out,
):  # fmt: skip
    """Compute all experts of a batch: expert m for rows[starts[m]:starts[m + 1]].

    out: float32 (pairs, d_model), in the order of `rows`; the other arguments as feed_forward.
    """
    for m in range(matrices.shape[0]):
        first, last = starts[m], starts[m + 1]
        feed_forward(
            w, matrices, m, d_model, d_ff, x, q, scales, sums, rows[first:last], last - first,
            gate, up, hq, h_scales, h_sums, identity, scratch, out, first * d_model, d_model,
        )  # fmt: skip
