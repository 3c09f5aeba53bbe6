"""Matrix products and a feed-forward network shared among the threads of a crew (see `crew`).

A chunk is a range of pairs of row groups, so that each thread streams weights of its own; every output
element is computed by one thread as it is by a single one: the bits do not depend on how many there are.

Called in every layer, with flat arguments: see `kernel.kernel`.
"""

from __future__ import annotations

from numba import types

from ..calls import borrower, lend
from ..crew import ARGUMENTS, THREADS, run, threads_for
from ..kernel import kernel
from ..products.table import multiply
from .activations import quantize_rows
from .ffn import gated
from .norms import rms_row

_bytes = borrower(types.Array(types.uint8, 1, "C"))
_floats = borrower(types.Array(types.float32, 2, "C"))
_vector = borrower(types.Array(types.float32, 1, "C"))
_float = borrower(types.float32)
_codes = borrower(types.Array(types.int8, 2, "C"))
_indices = borrower(types.Array(types.int32, 2, "C"))

_CHUNKS_PER_THREAD = 4
_NUMBERS = ARGUMENTS + 9  # where a job's numbers begin, behind its nine arrays


@kernel
def heads_chunk(board, chunk, thread):
    """Compute one chunk of `multiply_heads`, whose arguments lie on the board."""
    w, x, q, scales = (
        _bytes(board, ARGUMENTS), _floats(board, ARGUMENTS + 1), _codes(board, ARGUMENTS + 2),
        _floats(board, ARGUMENTS + 3),
    )  # fmt: skip
    sums, index = _indices(board, ARGUMENTS + 4), _indices(board, ARGUMENTS + 5)
    scratch, out = _bytes(board, ARGUMENTS + 6), _floats(board, ARGUMENTS + 7)
    n = board[_NUMBERS:]
    product, form, codes_at, scales_at, codes_step, scales_step = n[0], n[1], n[2], n[3], n[4], n[5]
    heads, groups, columns, count, chunks, scratch_each = n[6], n[7], n[8], n[9], n[10], n[11]
    own = scratch[thread * scratch_each : (thread + 1) * scratch_each]
    pairs = (groups + 1) // 2
    at, end = heads * pairs * chunk // chunks, heads * pairs * (chunk + 1) // chunks
    while at < end:
        h, first = at // pairs, at % pairs
        last = min(pairs, first + end - at)
        multiply(
            product, form, w, codes_at + h * codes_step + 2 * first * (codes_step // groups),
            scales_at + h * scales_step + 2 * first * (scales_step // groups),
            min(groups, 2 * last) - 2 * first, columns, x, q, scales, sums, index[h], count, own, out,
            h * 16 * groups + 32 * first, heads * 16 * groups,
        )  # fmt: skip
        at += last - first


@kernel
def multiply_heads(
    board, job, product, form, w, codes_at, scales_at, codes_step, scales_step, heads, groups, columns,
    x, q, scales, sums, index, count, scratch, out,
):  # fmt: skip
    """out[t, h] = W[h] @ x[index[h, t]] for one matrix of 16 * groups rows per head, `*_step` bytes apart.

    board: see `crew`; job: address of heads_chunk; index: int32 (heads, >= count); out: float32 (count,
    heads * 16 * groups); scratch: uint8, a product's scratch for each thread of the board.
    """
    threads = threads_for(board, heads * groups * 16 * columns * count, count)
    chunks = min(threads * _CHUNKS_PER_THREAD, heads * ((groups + 1) // 2)) if threads > 1 else 1
    lend(board, ARGUMENTS, w)
    lend(board, ARGUMENTS + 1, x)
    lend(board, ARGUMENTS + 2, q)
    lend(board, ARGUMENTS + 3, scales)
    lend(board, ARGUMENTS + 4, sums)
    lend(board, ARGUMENTS + 5, index)
    lend(board, ARGUMENTS + 6, scratch)
    lend(board, ARGUMENTS + 7, out)
    n = board[_NUMBERS:]
    n[0], n[1], n[2], n[3], n[4], n[5] = product, form, codes_at, scales_at, codes_step, scales_step
    n[6], n[7], n[8], n[9], n[10] = heads, groups, columns, count, chunks
    n[11] = len(scratch) // board[THREADS]
    run(board, job, chunks, threads)


@kernel
def middle_chunk(board, chunk, thread):
    """Compute the middle for one chunk of rows: activation, norm, quantised."""
    gate, up, q = _floats(board, ARGUMENTS), _floats(board, ARGUMENTS + 1), _codes(board, ARGUMENTS + 2)
    scales, sums = _floats(board, ARGUMENTS + 3), _indices(board, ARGUMENTS + 4)
    norm, eps = _vector(board, ARGUMENTS + 5), _float(board, ARGUMENTS + 6)
    n = board[_NUMBERS:]
    count, width, block, chunks, activation = n[0], n[1], n[2], n[3], n[4]
    first, last = count * chunk // chunks, count * (chunk + 1) // chunks
    gated(gate, up, first, last, width, activation)
    if len(norm):
        for row in range(first, last):
            rms_row(gate, row * width, norm, eps, width, gate, row * width)
    if block:
        quantize_rows(gate, first, last, width, block, q, scales, sums)


@kernel
def _middle(board, job, gate, up, count, width, activation, norm, eps, block, q, scales, sums):
    """gate = the middle of `count` rows, normed, and quantised to (q, scales, sums) unless block is 0."""
    # An element costs about as much as a hundred multiply-adds of a product.
    threads = threads_for(board, 100 * count * width, count) if count > 1 else 1
    chunks = min(threads * _CHUNKS_PER_THREAD, count) if threads > 1 else 1
    lend(board, ARGUMENTS, gate)
    lend(board, ARGUMENTS + 1, up)
    lend(board, ARGUMENTS + 2, q)
    lend(board, ARGUMENTS + 3, scales)
    lend(board, ARGUMENTS + 4, sums)
    lend(board, ARGUMENTS + 5, norm)
    lend(board, ARGUMENTS + 6, eps)
    n = board[_NUMBERS:]
    n[0], n[1], n[2], n[3], n[4] = count, width, block, chunks, activation
    run(board, job, chunks, threads)


@kernel
def shared_feed_forward(
    board, heads_job, middle_job, w, matrices, sizes, d_model, d_ff, activation, norm, eps,
    x, q, scales, sums, index, count, gate, up, hq, h_scales, h_sums, scratch, out,
):  # fmt: skip
    """out[t] = down(norm(activation(gate x[t], up x[t]))), each step shared among the threads of `board`.

    matrices: int64 (3, 5): gate, up, down as `ffn` names them; sizes: int64 (3, 2): bytes of their codes
    and scales; activation: an int, see `workers.activation`; norm: float32 (d_ff,), the weights of an RMS
    norm of the middle, or (0,): none; eps: its float32; gate, up: float32 (capacity, d_ff); hq, h_scales,
    h_sums: the middle quantised as down reads it, (capacity, d_ff) and (capacity, d_ff / block);
    index: int32 (1, capacity): 0, 1, 2, ...; the jobs: addresses of heads_chunk and middle_chunk; the rest as
    multiply_heads.
    """
    groups = d_ff // 16
    for i in range(2):
        m = matrices[i]
        multiply_heads(
            board, heads_job, m[0], m[1], w, m[2], m[3], sizes[i, 0], sizes[i, 1], 1, groups, d_model,
            x, q, scales, sums, index, count, scratch, gate if i == 0 else up,
        )  # fmt: skip
    m = matrices[2]
    _middle(board, middle_job, gate, up, count, d_ff, activation, norm, eps, m[4], hq, h_scales, h_sums)
    multiply_heads(
        board, heads_job, m[0], m[1], w, m[2], m[3], sizes[2, 0], sizes[2, 1], 1, d_model // 16, d_ff,
        gate, hq, h_scales, h_sums, index, count, scratch, out,
    )  # fmt: skip
