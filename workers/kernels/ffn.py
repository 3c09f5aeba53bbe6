"""One expert's feed-forward network, and whole batches of them: down(silu(gate x) * (up x)).

Matrices lie in a uint8 arena and are named by (product, format, codes_at, scales_at, block): `product` is
the address of the format's kernel in this process, see `products`; `block` is how many activations share
a scale, 0 where the kernel reads floats.
"""

from __future__ import annotations

from .activations import quantize_rows
from .kernel import kernel, piece
from .products import multiply
from .simd.mathematics import silu_f32
from .simd.ops import load_f32, mul_f32, store_f32


@kernel
def gated(gate, up, first, last, width):
    """gate = silu(gate) * up for the rows first..last - 1 of `width` float32."""
    for i in range(first * width, last * width, 16):
        store_f32(gate, 4 * i, mul_f32(silu_f32(load_f32(gate, 4 * i)), load_f32(up, 4 * i)))


@piece
def feed_forward(
    w, matrices, m, d_model, d_ff, x, q, scales, sums, rows, count,
    gate, up, hq, h_scales, h_sums, identity, scratch, out, out_at, out_step,
):  # fmt: skip
    """Compute expert `m` for the tokens `rows`; out row t starts at element out_at + t * out_step.

    matrices: int64 (experts, 3, 5): gate, up, down as (product, format, codes_at, scales_at, block);
    gate, up: float32 scratch (count, d_ff); hq, h_scales, h_sums: scratch for the quantised middle;
    identity: int32 0, 1, 2, ...; scratch: uint8, see scratch_nbytes. d_model and d_ff are multiples of 16.
    """
    groups = d_ff // 16
    for half, middle in ((0, gate), (1, up)):
        multiply(
            matrices[m, half, 0], matrices[m, half, 1], w, matrices[m, half, 2], matrices[m, half, 3], groups,
            d_model, x, q, scales, sums, rows, count, scratch, middle, 0, d_ff,
        )  # fmt: skip
    gated(gate, up, 0, count, d_ff)
    block = matrices[m, 2, 4]
    if block:
        quantize_rows(gate, 0, count, d_ff, block, hq, h_scales, h_sums)
    blocks = d_ff // max(block, 32)
    multiply(
        matrices[m, 2, 0], matrices[m, 2, 1], w, matrices[m, 2, 2], matrices[m, 2, 3], d_model // 16, d_ff,
        gate, hq,
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
