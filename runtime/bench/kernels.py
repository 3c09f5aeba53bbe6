"""The kernel benchmark: what is measured, in which order, and the report that comes out.

Everything is measured in this run, nothing is judged. Not in here: arguments and tables
(`cli_kernels`, `bench_report`), operands and timing (`bench_operands`), the peer (`bench_llama`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ...workers.checkpoint.held.formats import ActivationKind, Format, activation_kind
from ...workers.kernels.measure import bandwidth, peak
from ...workers.kernels.measure.bandwidth import ReadBandwidth
from ...workers.pinned import PinnedThreads
from .experts import ExpertRow, measure_experts
from .llama import LlamaCpp
from .machine import describe_machine
from .operands import Clock, Matrix, Product, Timing, TokenRows, heads_for, time_call

SCHEMA = 1
ROUNDS = 3  # ours, theirs, ours, theirs, ours, theirs
_QUANTISED_TOKENS = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure: (rows, columns) of matrices, tokens at once, formats; seconds for each figure."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    formats: tuple[Format, ...]
    seconds: float
    threads: int
    llama_cpp: LlamaCpp | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductRow:
    """What one product took."""

    format: str
    rows: int
    columns: int
    tokens: int
    threads: int
    weights: str
    """"cached": one matrix again and again; "streamed": a ring of them."""
    seconds: float
    """For one matrix on one thread."""
    median_seconds: float
    gmac_per_s: float
    """Rate of all threads together."""
    gb_per_s: float
    """Rate of all threads together, counting the packed matrices alone."""
    bandwidth_share: float | None
    """Of what as many threads read from the same memory in turns with the products;
    None where that says nothing."""
    peak_share: float | None
    """Of the arithmetic peak; None where that says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingRow:
    """Packing from file bytes: gb_per_s counts those; and quantising a token, for all matrices it meets."""

    format: str
    file_type: str
    rows: int
    columns: int
    gb_per_s: float
    quantise_seconds_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """Our product, quantising its tokens included, against llama.cpp's dot product of the same type.

    ratio is best against best, `ratios` those of each round. Weights are cached, one core.
    """

    file_type: str
    rows: int
    columns: int
    tokens: int
    ours_gmac_per_s: float
    theirs_gmac_per_s: float
    ratio: float
    ratios: tuple[float, ...]


@dataclass(slots=True)
class _Bench:
    """One run: its options, clock and threads, and what it has found so far."""

    options: Options
    clock: Clock
    threads: PinnedThreads
    read: ReadBandwidth
    peak_macs_per_s: float

    def measure_limits(self) -> None:
        """Measure bandwidth and peak once more and keep the best: others use this machine, too."""
        seconds = self.options.seconds / ROUNDS
        buffer = bandwidth.allocate(self.read.buffer_nbytes)
        again = bandwidth.measure(
            self.clock, seconds=seconds, max_threads=self.options.threads, buffer=buffer
        )
        self.read = self.read.best_of(again)
        self.peak_macs_per_s = max(self.peak_macs_per_s, _peak(self.clock, seconds, self.threads))

    def products(self, matrix: Matrix) -> Iterator[ProductRow]:
        """Measure the matrix cached with each number of tokens, and streamed with the smallest."""
        if matrix.shape.nbytes <= (self.read.cache_nbytes or matrix.shape.nbytes):
            for count in self.options.tokens:
                yield self._row(matrix, count, 1, "cached", self._cached(matrix, count, self.options.seconds))
        fewest = min(self.options.tokens)
        for threads in sorted({1, self.options.threads}):
            timing, read = self._streamed(matrix, fewest, threads)
            yield self._row(matrix, fewest, threads, "streamed", timing, read)

    def packing(self, matrix: Matrix) -> PackingRow:
        """Measure what it costs to fetch the matrix, and to quantise a token for it."""
        out = np.zeros(matrix.shape.nbytes, np.uint8)
        pack = self._alone(partial(matrix.pack_into, out), self.options.seconds)
        return PackingRow(
            format=matrix.form.name,
            file_type=matrix.file_type,
            rows=matrix.rows,
            columns=matrix.columns,
            gb_per_s=matrix.raw.size / pack.best_s / 1e9,
            quantise_seconds_per_token=self._quantising(matrix),
        )

    def against(self, peer: LlamaCpp, matrix: Matrix) -> Iterator[PeerRow]:
        """Measure theirs and ours in turns, on the same CPU."""
        quantise_s = self._quantising(matrix)
        seconds = self.options.seconds / ROUNDS
        theirs: list[float] = []
        ours: dict[int, list[float]] = {count: [] for count in self.options.tokens}
        for _ in range(ROUNDS):
            for count, rates in ours.items():
                time_s = self._cached(matrix, count, seconds).best_s + count * quantise_s
                rates.append(matrix.num_weights * count / time_s)
            theirs.append(peer.weights_per_s(matrix.file_type, matrix.columns, seconds, self.threads))
        for count, rates in ours.items():
            yield PeerRow(
                file_type=matrix.file_type,
                rows=matrix.rows,
                columns=matrix.columns,
                tokens=count,
                ours_gmac_per_s=max(rates) / 1e9,
                theirs_gmac_per_s=max(theirs) / 1e9,
                ratio=max(rates) / max(theirs),
                ratios=tuple(a / b for a, b in zip(rates, theirs, strict=True)),
            )

    def _alone(self, call: Callable[[], object], seconds: float) -> Timing:
        """Time a call on the first pinned thread."""
        (timing,) = self.threads.run([partial(time_call, self.clock, seconds, call)])
        return timing

    def _quantising(self, matrix: Matrix) -> float:
        if activation_kind(matrix.form) is ActivationKind.FLOAT:
            return 0.0
        tokens = TokenRows(matrix.form, _QUANTISED_TOKENS, matrix.columns)
        return self._alone(tokens.quantise, self.options.seconds / ROUNDS).per(_QUANTISED_TOKENS).best_s

    def _cached(self, matrix: Matrix, count: int, seconds: float) -> Timing:
        heads = heads_for(matrix, count)
        tokens = TokenRows(matrix.form, count, matrix.columns)
        product = Product(matrix.shape, matrix.packed, 0, heads, tokens)
        return self._alone(product, seconds).per(heads)

    def _streamed(self, matrix: Matrix, count: int, threads: int) -> tuple[Timing, float]:
        """Time passes over a ring larger than the cache, a part of it for each thread.

        Returns the time of one matrix, and the bytes per second at which the ring was merely read.
        """
        nbytes, heads = matrix.shape.nbytes, heads_for(matrix, count)
        wanted = bandwidth.buffer_nbytes(self.read.cache_nbytes)
        calls = max(1, -(-wanted // (nbytes * heads * threads)))
        ring = matrix.ring(threads * calls * heads)
        tasks = []
        for i in range(threads):
            tokens = TokenRows(matrix.form, count, matrix.columns)
            product = Product(matrix.shape, ring, nbytes, heads, tokens)
            tasks.append(partial(_go_through, product, i * calls * heads * nbytes, calls, heads * nbytes))
        # In turns: what others do to the memory meanwhile hits both.
        reads: list[float] = []

        def read() -> None:
            reads.append(bandwidth.read_once(self.clock, self.threads, ring, threads))

        multiply = partial(self.threads.run, tasks)
        whole = time_call(self.clock, 2 * self.options.seconds, multiply, between=read)
        return whole.per(calls * heads), max(reads)

    def _row(
        self, matrix: Matrix, count: int, threads: int, weights: str, timing: Timing, read: float = 0.0
    ) -> ProductRow:
        bytes_per_s = matrix.shape.nbytes * threads / timing.best_s
        return ProductRow(
            format=matrix.form.name,
            rows=matrix.rows,
            columns=matrix.columns,
            tokens=count,
            threads=threads,
            weights=weights,
            seconds=timing.best_s,
            median_seconds=timing.median_s,
            gmac_per_s=matrix.num_weights * count * threads / timing.best_s / 1e9,
            gb_per_s=bytes_per_s / 1e9,
            bandwidth_share=bytes_per_s / read if read else None,
            peak_share=None,
        )

    def with_peak_share(self, row: ProductRow) -> ProductRow:
        """Return the row with its share of the best peak of the whole run."""
        if row.weights == "streamed" or activation_kind(Format[row.format]) is ActivationKind.FLOAT:
            return row
        return replace(row, peak_share=row.gmac_per_s * 1e9 / self.peak_macs_per_s)


def run(options: Options, clock: Clock, progress: Progress) -> dict[str, Any]:
    """Measure all and return the report, plain values ready for JSON; docs/benchmarks.md describes it.

    clock: seconds, such as time.perf_counter; progress: called with (phase, done, total).
    """
    machine = describe_machine()  # first: the load of others, not ours
    cases = [(form, shape) for form in options.formats for shape in options.shapes]
    products: list[ProductRow] = []
    packing: list[PackingRow] = []
    experts: list[ExpertRow] = []
    peers: list[PeerRow] = []
    progress("measuring", 0, len(cases) + 1)
    with PinnedThreads(options.threads) as threads:
        read = bandwidth.measure(clock, seconds=2 * options.seconds, max_threads=options.threads)
        bench = _Bench(options, clock, threads, read, _peak(clock, options.seconds, threads))
        for done, (form, shape) in enumerate(cases, start=1):
            progress("measuring", done, len(cases) + 1)
            bench.measure_limits()
            matrix = Matrix(form, *shape)
            products.extend(bench.products(matrix))
            packing.append(bench.packing(matrix))
            experts.extend(measure_experts(matrix, clock, options.seconds, threads, read.cache_nbytes))
            if options.llama_cpp is not None and options.llama_cpp.measures(matrix.file_type):
                peers.extend(bench.against(options.llama_cpp, matrix))
        bench.measure_limits()
    read = bench.read
    progress("measuring", len(cases) + 1, len(cases) + 1)
    return {
        "schema": SCHEMA,
        "machine": machine,
        "seconds_per_figure": options.seconds,
        "read_bandwidth": {
            "buffer_nbytes": read.buffer_nbytes,
            "cache_nbytes": read.cache_nbytes,
            "gb_per_s": {str(count): rate / 1e9 for count, rate in read.bytes_per_s},
            "streaming_threads": read.streaming_threads(),
        },
        "peak_gmac_per_s": bench.peak_macs_per_s / 1e9,
        "products": [asdict(bench.with_peak_share(row)) for row in products],
        "packing": [asdict(row) for row in packing],
        "experts": [asdict(row) for row in experts],
        "llama_cpp": None
        if options.llama_cpp is None
        else {"program": str(options.llama_cpp.program), "products": [asdict(row) for row in peers]},
    }


def _go_through(product: Product, first: int, calls: int, step: int) -> None:
    for i in range(calls):
        product(first + i * step)


def _peak(clock: Clock, seconds: float, threads: PinnedThreads) -> float:
    """Return the multiply-accumulates per second of one core's byte dot products in registers."""
    rounds = 20_000
    call = partial(peak.dot_rounds, peak.make_buffer(), rounds)
    (timing,) = threads.run([partial(time_call, clock, seconds, call)])
    return rounds * peak.MACS_PER_ROUND / timing.best_s
