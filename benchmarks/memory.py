"""Speed of a model under limits of memory: ours exact, ours with a quality budget, and llama.cpp.

    python benchmarks/memory.py MODEL [--limits 700MiB,900MiB,1200MiB,none] [--llama-bench PATH] [--json]

Each run is a new process (ours: a daemon and its children) in a memory cgroup of its own that holds it to
the limit, page cache included, and starts with none of the file cached. Ours finds its budget in the cgroup.
A run computes a prompt of random tokens and then, with one of its own, a greedy answer; before that a short
request warms it up, as llama-bench does. Runs are interleaved, the order is reversed every other time, and
medians are reported. It prints what it measured and judges nothing.

Where no cgroup can be made, only "none" is measured. benchmarks/glm_shaped.py writes a model to measure with.
Runs and their measuring are in `memory_runs.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from memory_cgroup import why_no_cgroup
from memory_runs import Llama, Measurement, Ours, Runner, Task, compile_kernels

from sterna.runtime.sizes import parse_size

_COLUMNS = ("memory", "runner", "prompt tok/s", "answer tok/s", "x peer", "faults/token", "MB/token",
            "hits", "peak MiB", "reread MB", "start s", "load")  # fmt: skip
NONE = "none"


def parse_limit(text: str) -> int | None:
    """Return bytes of `700MiB`, `1.2GB` or such, None for `none`; raises ValueError."""
    return None if text.strip().lower() == NONE else parse_size(text)


def name_of(limit: int | None) -> str:
    """Return how a limit is shown."""
    return NONE if limit is None else f"{limit / (1 << 20):.0f} MiB"


def runners(given: argparse.Namespace, notes: list[str]) -> list[Runner]:
    """Return what is to be measured; what cannot be is said in `notes`."""
    budget = ("--routing", "budget", "--quality-budget", given.quality_budget)
    found: list[Runner] = [Ours("ours exact"), Ours(f"ours {given.quality_budget}", budget)]
    if given.llama_bench is None:
        notes.append("llama.cpp is not measured: say where it is with --llama-bench")
    else:
        found.append(Llama("llama.cpp", given.llama_bench))
    return found


def measure(
    given: argparse.Namespace, limits: Sequence[int | None], who: Sequence[Runner], confined: bool
) -> list[Measurement]:
    """Run everything `--runs` times and return all measurements; a line of progress each on stderr."""
    results = []
    pairs = [(limit, runner) for limit in limits for runner in who]
    for run in range(given.runs):
        for limit, runner in pairs if run % 2 == 0 else reversed(pairs):
            slow = limit is not None and isinstance(runner, Llama)
            task = Task(
                model=given.model,
                limit_bytes=limit,
                confined=confined,
                prompt_tokens=given.prompt,
                answer_tokens=given.peer_tokens if slow else given.tokens,
                seed=run,
                peer_threads=given.peer_threads,
                timeout_s=given.timeout,
            )
            results.append(runner.run(task))
            shown = results[-1].error or f"{results[-1].answer_rate or 0:.2f} tok/s"
            print(f"run {run + 1}, {name_of(limit)}, {runner.name}: {shown}", file=sys.stderr, flush=True)
    return results


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summary(results: Sequence[Measurement]) -> list[Measurement]:
    """Return one measurement for each limit and runner: the medians of its runs that did not fail."""
    groups: dict[tuple[int | None, str], list[Measurement]] = {}
    for result in results:
        groups.setdefault((result.limit_bytes, result.runner), []).append(result)
    rows = []
    for (limit, runner), runs in groups.items():
        errors = [run.error for run in runs if run.error]
        fields = {
            field.name: _median([getattr(run, field.name) for run in runs if not run.error])
            for field in dataclasses.fields(Measurement)
            if field.name not in ("runner", "limit_bytes", "error")
        }
        rows.append(
            Measurement(runner=runner, limit_bytes=limit, error=errors[0] if errors else None, **fields)
        )
    return rows


def _cells(row: Measurement, peers: dict[int | None, float]) -> list[str]:
    def number(value: float | None, digits: int, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value / scale:.{digits}f}"

    peer = peers.get(row.limit_bytes)
    ratio = row.answer_rate / peer if row.answer_rate and peer else None
    return [
        name_of(row.limit_bytes), row.runner, number(row.prompt_rate, 1), number(row.answer_rate, 2),
        number(ratio, 2), number(row.faults_per_token, 1), number(row.read_bytes_per_token, 2, 1e6),
        number(row.hit_rate, 3), number(row.peak_bytes, 0, 1 << 20), number(row.reread_bytes, 0, 1e6),
        number(row.start_s, 1), number(row.load_at_start, 1),
    ]  # fmt: skip


def print_table(rows: Sequence[Measurement]) -> None:
    """Print the medians side by side; below them what failed, and what was not cold."""
    peers = {
        row.limit_bytes: row.answer_rate for row in rows if row.runner == "llama.cpp" and row.answer_rate
    }
    lines = [list(_COLUMNS), *(_cells(row, peers) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    for line in lines:
        left = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
        right = [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join(left + right))
    for row in rows:
        if row.error:
            print(f"{name_of(row.limit_bytes)}, {row.runner}: {row.error}")
        if row.cached_at_start:
            print(f"{name_of(row.limit_bytes)}, {row.runner}: {row.cached_at_start:.1%} was cached at start")
    if peers:
        print("llama.cpp: faults and reads are those of its whole run, loading included, per token")
    print("load: average of the minute before a run; that of the run before is in it")


def arguments() -> argparse.Namespace:
    """Return the checked arguments; ends the process with a line of usage when they make no sense."""
    parser = argparse.ArgumentParser(description="Measure a model's speed under limits of memory.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--limits", default="700MiB,900MiB,1200MiB,none", metavar="LIMIT,...")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's program")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs of each [3]")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of an answer [64]")
    parser.add_argument(
        "--peer-tokens", type=int, default=8, metavar="N", help="the same, for llama.cpp under a limit [8]"
    )
    parser.add_argument(
        "--peer-threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="threads of llama.cpp, whose threads wait for each other spinning [one per CPU]",
    )  # fmt: skip
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of the prompt [128]")
    parser.add_argument("--quality-budget", default="0.5%", metavar="SHARE")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for each run [600]")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args()
    given.model = given.model.resolve()
    for path in (given.model, given.llama_bench):
        if path is not None and not path.is_file():
            parser.error(f"{path}: no such file")
    if min(given.runs, given.tokens, given.peer_tokens, given.peer_threads, given.prompt) < 1:
        parser.error("--runs, --tokens, --peer-tokens, --peer-threads, --prompt: expected 1 or more")
    try:
        given.limits = list(dict.fromkeys(parse_limit(text) for text in given.limits.split(",")))
    except ValueError as e:
        parser.error(str(e))
    return given


def main() -> None:
    """Measure and print."""
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and groups are removed
    notes: list[str] = []
    limits = given.limits
    reason = why_no_cgroup()
    if reason is not None:
        notes.append(f"only without a limit: no memory cgroup can be made: {reason}")
        limits = [None]
    who = runners(given, notes)
    compile_kernels(given.model, given.timeout)
    results = measure(given, limits, who, confined=reason is None)
    rows = summary(results)
    if given.json:
        body = {"model": str(given.model), "file_bytes": given.model.stat().st_size, "notes": notes,
                "cpus": len(os.sched_getaffinity(0)), "medians": [dataclasses.asdict(row) for row in rows],
                "runs": [dataclasses.asdict(result) for result in results]}  # fmt: skip
        print(json.dumps(body))
        return
    for note in notes:
        print(note)
    print_table(rows)


if __name__ == "__main__":
    main()
