"""The kernel benchmark's report as tables. Pure: the report in, cells out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FigureTable:
    """A table for people: a title, the head's cells, the rows' cells."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def summary(report: Report) -> list[str]:
    """Return lines on the machine, what it can at most, and how it was measured."""
    machine, read = report["machine"], report["read_bandwidth"]
    speeds = ", ".join(f"{rate:.1f} with {count}" for count, rate in read["gb_per_s"].items())
    return [
        f"{machine['cpu']}, {machine['cpus']} CPUs, last-level cache "
        f"{machine['last_level_cache_nbytes'] / 2**20:.1f} MiB, "
        f"memory {machine['memory_nbytes'] / 2**30:.1f} GiB",
        f"kernels for {machine['target']} ({' '.join(machine['features'])})",
        f"sterna {machine['sterna']}, Python {machine['python']}, numba {machine['numba']}, "
        f"llvmlite {machine['llvmlite']}, numpy {machine['numpy']}, {machine['system']}, "
        f"load before {machine['load_1min']:.2f}",
        f"reading memory, GB/s by threads: {speeds}; {read['streaming_threads']} suffice",
        f"byte dot products in registers: {report['peak_gmac_per_s']:.0f} GMAC/s on one core",
    ]


def tables(report: Report) -> Iterator[FigureTable]:
    """Yield the report's tables; those without rows are left out."""
    found = [_products(report), _experts(report), _packing(report)]
    if report["llama_cpp"] is not None:
        found.append(_peers(report))
    yield from (table for table in found if table.rows)


def _products(report: Report) -> FigureTable:
    head = ("format", "matrix", "weights", "tokens", "threads", "us", "GMAC/s", "GB/s", "of reading",
            "of peak")  # fmt: skip
    rows = [
        (
            row["format"], f"{row['rows']}x{row['columns']}", row["weights"], str(row["tokens"]),
            str(row["threads"]), f"{row['seconds'] * 1e6:.1f}", f"{row['gmac_per_s']:.1f}",
            f"{row['gb_per_s']:.1f}", _percent(row["bandwidth_share"]), _percent(row["peak_share"]),
        )
        for row in report["products"]
    ]  # fmt: skip
    return FigureTable("Matrix products", head, rows)


def _experts(report: Report) -> FigureTable:
    head = ("format", "expert", "whole us", "its products us", "ratio")
    rows = [
        (
            row["format"], f"{row['d_model']}x{row['d_ff']}", f"{row['expert_seconds'] * 1e6:.1f}",
            f"{row['products_seconds'] * 1e6:.1f}", f"{row['ratio']:.2f}",
        )
        for row in report["experts"]
    ]  # fmt: skip
    return FigureTable("A whole expert, one token", head, rows)


def _packing(report: Report) -> FigureTable:
    head = ("file type", "format", "matrix", "packing GB/s", "quantising us/token")
    rows = [
        (
            row["file_type"], row["format"], f"{row['rows']}x{row['columns']}", f"{row['gb_per_s']:.2f}",
            f"{row['quantise_seconds_per_token'] * 1e6:.2f}" if row["quantise_seconds_per_token"] else "-",
        )
        for row in report["packing"]
    ]  # fmt: skip
    return FigureTable("Packing from file bytes", head, rows)


def _peers(report: Report) -> FigureTable:
    head = ("type", "matrix", "tokens", "GMAC/s", "llama.cpp", "ratio", "ratio of each round")
    rows = [
        (
            row["file_type"], f"{row['rows']}x{row['columns']}", str(row["tokens"]),
            f"{row['ours_gmac_per_s']:.1f}", f"{row['theirs_gmac_per_s']:.1f}", f"{row['ratio']:.2f}",
            " ".join(f"{ratio:.2f}" for ratio in row["ratios"]),
        )
        for row in report["llama_cpp"]["products"]
    ]  # fmt: skip
    return FigureTable("Against llama.cpp's vec_dot, quantising included in ours", head, rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
