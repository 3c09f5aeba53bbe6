"""One expert's feed-forward network, and whole batches of them: down(activation(gate x, up x)).

Matrices lie in a uint8 arena and are named by (product, format, codes_at, scales_at, block): `product` is
the address of the format's kernel in this process, see `products`; `block` is how many activations share
a scale, 0 where the kernel reads floats.

Called in every layer, with flat arguments: see `kernel.kernel`.
"""

from __future__ import annotations

import numpy as np

from ...activation import CLAMP, CLAMPED_SLOPE, Activation
from ..kernel import kernel, piece
from ..products.table import multiply
from ..simd.mathematics import exp_f32, silu_f32
from ..simd.ops import add_f32, div_f32, load_f32, max_f32, min_f32, mul_f32, splat_f32, store_f32, zero_f32
from .activations import quantize_rows

_RELU2, _CLAMPED = int(Activation.RELU2), int(Activation.CLAMPED)
_ONE, _LIMIT, _SLOPE = np.float32(1.0), np.float32(CLAMP), np.float32(CLAMPED_SLOPE)


@kernel
def gated(gate, up, first, last, width, activation):
    """gate = what `activation` (see `workers.activation`) makes of gate and up, rows first..last - 1.

    gate, up: float32 rows of `width`, a multiple of 16; activation: an int that is checked before.
    """
    start, end = first * width, last * width
    if activation == _RELU2:
        for i in range(start, end, 16):
            g = max_f32(load_f32(gate, 4 * i), zero_f32())
            store_f32(gate, 4 * i, mul_f32(mul_f32(g, g), load_f32(up, 4 * i)))
    elif activation == _CLAMPED:
        for i in range(start, end, 16):
            g = min_f32(load_f32(gate, 4 * i), splat_f32(_LIMIT))
            u = max_f32(min_f32(load_f32(up, 4 * i), splat_f32(_LIMIT)), splat_f32(-_LIMIT))
            below = add_f32(splat_f32(_ONE), exp_f32(mul_f32(g, splat_f32(-_SLOPE))))
            store_f32(gate, 4 * i, mul_f32(div_f32(g, below), add_f32(u, splat_f32(_ONE))))
    else:
        for i in range(start, end, 16):
            store_f32(gate, 4 * i, mul_f32(silu_f32(load_f32(gate, 4 * i)), load_f32(up, 4 * i)))


@kernel
def add_bias(w, at, x, x_at, x_step, count, width):
    """x[x_at + t * x_step + i] += bias[i] for `count` rows; the bias: float32 at byte `at` of w, none: -1."""
    if at < 0:
        return
    for t in range(count):
        for i in range(0, width, 16):
            offset = 4 * (x_at + t * x_step + i)
            store_f32(x, offset, add_f32(load_f32(x, offset), load_f32(w, at + 4 * i)))


@piece
def feed_forward(
    w, matrices, biases, m, d_model, d_ff, activation, x, q, scales, sums, rows, count,
    gate, up, hq, h_scales, h_sums, identity, scratch, out, out_at, out_step,
):  # fmt: skip
    """Compute expert `m` for the tokens `rows`; out row t starts at element out_at + t * out_step.

    matrices: int64 (experts, 3, 5): gate, up, down as (product, format, codes_at, scales_at, block);
    biases: int64 (experts, 3): the byte in w where a float32 vector begins that is added to what the matrix
    gives, -1: none; activation: an int, see `gated`;
    gate, up: float32 scratch (count, d_ff); hq, h_scales, h_sums: scratch for the quantised middle;
    identity: int32 0, 1, 2, ...; scratch: uint8, see `scratch.product_nbytes`. d_model and d_ff are
    multiples of 16.
    """
    groups = d_ff // 16
    for half, middle in ((0, gate), (1, up)):
        multiply(
            matrices[m, half, 0], matrices[m, half, 1], w, matrices[m, half, 2], matrices[m, half, 3], groups,
            d_model, x, q, scales, sums, rows, count, scratch, middle, 0, d_ff,
        )  # fmt: skip
        add_bias(w, biases[m, half], middle, 0, d_ff, count, d_ff)
    gated(gate, up, 0, count, d_ff, activation)
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
    add_bias(w, biases[m, 2], out, out_at, out_step, count, d_model)


@kernel
def expert_batch(
    w, matrices, biases, starts, rows, d_model, d_ff, activation, x, q, scales, sums,
    gate, up, hq, h_scales, h_sums, identity, scratch, out,
):  # fmt: skip
    """Compute all experts of a batch: expert m for rows[starts[m]:starts[m + 1]].

    out: float32 (pairs, d_model), in the order of `rows`; the other arguments as feed_forward.
    """
    for m in range(matrices.shape[0]):
        first, last = starts[m], starts[m + 1]
        feed_forward(
            w, matrices, biases, m, d_model, d_ff, activation, x, q, scales, sums, rows[first:last],
            last - first, gate, up, hq, h_scales, h_sums, identity, scratch, out, first * d_model, d_model,
        )  # fmt: skip
