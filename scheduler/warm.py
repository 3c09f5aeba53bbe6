"""Compiling every kernel, or loading it from the cache, before a process is forked that needs it.

Each step runs a kernel once on the smallest input with the argument types of the real calls: what is
compiled here is what runs later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from ..workers import selftest
from ..workers.activation import Activation
from ..workers.checkpoint.held import convert
from ..workers.checkpoint.held.formats import KERNEL_TYPES, Format, MatrixShape, Storage, format_of
from ..workers.checkpoint.held.packing import matrix_entry
from ..workers.checkpoint.types.table import TYPES_BY_NAME
from ..workers.kernels import crew as crew_kernels
from ..workers.kernels.crew import job_address
from ..workers.kernels.layers import attention, ffn, norms, shared_dense
from ..workers.kernels.layers.activations import QuantizedRows
from ..workers.kernels.measure import bandwidth
from ..workers.kernels.routing import top_k
from ..workers.kernels.scratch import attention_shapes
from .decoder.crew import Crew
from .residency.policies import DEFAULT_POLICY, Policy
from .residency.predictor import ExpertPredictor

Cache = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

_ARENA = np.zeros(1 << 20, np.uint8)
_SCRATCH = np.zeros(1 << 14, np.uint8)
_INDEX = np.zeros(1, np.int32)
_ROWS = np.zeros((1, 256), np.float32)
_NOTHING = np.zeros(0, np.float32)


# Every file type that has a kernel of its own, with its format.
ALL_MATRIX_TYPES = tuple(
    dict.fromkeys(
        (name, format_of(TYPES_BY_NAME[name], 256, name, storage))
        for storage in (Storage(), Storage(small=True, per_token=True))
        for name in KERNEL_TYPES
    )
)


def steps(
    matrix_types: Sequence[tuple[str, int]] = ALL_MATRIX_TYPES,
    conversion: bool = False,
    value_nbytes: int = 2,
) -> list[tuple[str, Callable[[], None]]]:
    """Return (name, function) pairs; running each once makes every later call start at once.

    matrix_types: the (file type, format) of the matrices that will be packed and multiplied. Each is also
    tested: a wrong kernel raises InternalError. conversion: whether experts are converted when read in.
    value_nbytes: of the cache of keys and values, as `StreamShape`'s.
    """
    cache = _ARENA if value_nbytes == 2 else _ARENA.view(np.float32)
    return [
        ("quantise activations", selftest.check_quantize),
        *(
            (f"kernels for {name}", partial(selftest.check, name, Format(form)))
            for name, form in matrix_types
        ),
        ("read bandwidth", bandwidth.warm),
        ("threads", _crew),
        ("matrix products", _multiply),
        ("feed-forward", _feed_forward),
        ("experts", _experts),
        ("norms", partial(_norms, cache)),
        ("attention", partial(_attention, cache)),
        ("routing", _routing),
        ("residency", _residency),
        ("prediction", _predict),
        *([("conversion", convert.warm)] if conversion else []),
    ]


def _crew() -> None:
    """Helpers that leave at once."""
    board = Crew(1).board
    crew_kernels.stop(board)
    crew_kernels.help_out(board, 1)


def _multiply() -> None:
    q = QuantizedRows.allocate(1, 256, 256)
    out = np.zeros((1, 16), np.float32)
    product, form, codes_at, scales_at, _ = _matrix(16)
    crew = Crew(1)
    shared_dense.multiply_heads(
        crew.board, crew.heads_job, product, form, _ARENA, codes_at, scales_at, 0, 0, 1, 1, 256, _ROWS, q.q,
        q.scales, q.sums, _INDEX.reshape(1, 1), 1, _SCRATCH, out,
    )  # fmt: skip


def _feed_forward() -> None:
    q = QuantizedRows.allocate(1, 256, 256)
    gate, up, out = (np.zeros((1, 256), np.float32) for _ in range(3))
    crew = Crew(1)
    shared_dense.shared_feed_forward(
        crew.board, crew.heads_job, crew.middle_job, _ARENA, np.array([_matrix(256)] * 3, np.int64),
        np.zeros((3, 2), np.int64), 256, 256, int(Activation.SILU), _NOTHING, np.float32(0.0), _ROWS, q.q,
        q.scales, q.sums, _INDEX.reshape(1, 1), 1, gate, up, q.q, q.scales, q.sums, _SCRATCH, out,
    )  # fmt: skip


def _experts() -> None:
    q, m = QuantizedRows.allocate(1, 256, 256), QuantizedRows.allocate(1, 256, 32)
    gate, up, out = (np.zeros((1, 256), np.float32) for _ in range(3))
    ffn.expert_batch(
        _ARENA, np.array([[_matrix(256)] * 3], np.int64), np.full((1, 3), -1, np.int64),
        np.array([0, 1], np.int64), _INDEX, 256, 256, int(Activation.SILU), _ROWS, q.q,
        q.scales, q.sums, gate, up, m.q, m.scales, m.sums, _INDEX, _SCRATCH, out,
    )  # fmt: skip


def _matrix(rows: int) -> tuple[int, int, int, int, int]:
    """Return a matrix of zeros: a float format, whose product is the smallest."""
    return matrix_entry(MatrixShape(form=Format.F16, rows=rows, columns=256), 0)


def _norms(cache: Cache) -> None:
    one, out = np.ones(256, np.float32), np.zeros((1, 256), np.float32)
    table = np.zeros((1, 16), np.float32)
    norms.rms_rows(_ROWS, 256, one, np.float32(1e-6), 1, 256, out)
    norms.rope_pairs(out.reshape(-1), 0, 256, 1, 0, 16, _INDEX, table, table, 1)
    norms.rope_halves(out.reshape(-1), 0, 256, 1, 0, 16, _INDEX, table, table, 1)
    norms.add_vector(out, one, 1, 256)
    norms.add_scaled_rows(out, out, np.float32(1.0), 1, 256)
    norms.scale_rows(out, np.float32(1.0), 1, 256)
    norms.store_latent(out, out.reshape(-1), 32, 48, 32, 48, np.zeros(1, np.int64), 1, cache, 0)
    norms.add_rows(out, out, 1, 256)
    norms.gate_rows(out, out, 16, 1, 256)
    norms.first_bad_row(out, 1, 256)


def _attention(cache: Cache) -> None:
    latent, grouped = attention.latent_chunk, attention.grouped_chunk
    if cache.dtype == np.float32:
        latent, grouped = attention.latent_chunk_f32, attention.grouped_chunk_f32
    q, flat = np.zeros((1, 32), np.float32), np.zeros(48, np.float32)
    scratch, offsets = (np.zeros(shape) for shape in attention_shapes(1, 16, 32, 48))
    attention.latent_attention(
        Crew(1).board, job_address(latent), q, flat, 32, 48, 48, 1, 32, 48, np.float32(1.0),
        cache, 0, np.zeros((1, 1), np.int32), _INDEX, _INDEX, 16, 1, scratch.astype(np.float32),
        offsets.astype(np.int64), np.zeros((1, 32), np.float32),
    )  # fmt: skip
    scratch, offsets = (np.zeros(shape) for shape in attention_shapes(1, 16, 32, 32))
    attention.grouped_attention(
        Crew(1).board, job_address(grouped), q, 1, 1, 32, np.float32(1.0), 0, _NOTHING,
        cache, 0, np.zeros((1, 1), np.int32), _INDEX, _INDEX, 16, 1, scratch.astype(np.float32),
        offsets.astype(np.int64), np.zeros((1, 32), np.float32),
    )  # fmt: skip


def _residency() -> None:
    policy = Policy(DEFAULT_POLICY, 4, layers=2)
    policy.touch(np.zeros(1, np.int32), np.ones(1, np.float32))
    policy.admitted(0)
    policy.evicted(policy.victim(np.ones(4, np.uint8)))


def _predict() -> None:
    predictor, one = ExpertPredictor(num_layers=1, num_experts=4), np.zeros((1, 1), np.int32)
    predictor.observe(0, one, one)
    predictor.scores(0, one)


def _routing() -> None:
    logits, bias, work = (np.zeros(shape, np.float32) for shape in ((1, 16), 2, (3, 2)))
    selected, weights = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
    ends, pairs = np.zeros(3, np.int32), np.zeros(1, np.int32)
    y = np.zeros((1, 1, 256), np.float32)
    one = np.float32(1.0)
    top_k.route_top_k(logits, bias, 1, 2, 2, 1, 1, True, one, work, selected.copy(), selected, weights)
    present, accounts = np.zeros(2, np.uint8), np.zeros((1, 5), np.float64)
    top_k.route_resident(
        logits, bias, 1, 2, 2, 1, 1, True, one, work, selected.copy(), selected, weights, _INDEX, accounts[0],
        1.0, 1, 1.0, 0.5, present, present.copy(), accounts,
    )  # fmt: skip
    top_k.group_by_expert(selected, 1, ends, pairs, pairs.copy())
    rows = np.frombuffer(bytes(1024), np.float32).reshape(1, 256)
    top_k.scatter_pairs(rows, pairs, pairs, 0, 1, y)
    top_k.all_below(_INDEX, 1)
    top_k.combine(np.zeros((1, 256), np.float32), y, weights, np.zeros((1, 256), np.float32), 1)
