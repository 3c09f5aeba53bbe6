"""The commands `sterna warm` and `sterna bench kernels`: compiling the kernels, and measuring them.

In here: arguments and output. numba is imported only after `kernel_environment.prepare`. Imported by
`cli.main`, so that nothing heavy may be imported at the top.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import click

from ....shm.errors import StartFailed, UsageError
from ..options import JSON_OPTION, FractionRange, NumberRange
from ..progress import StartProgress
from ..signals import exit_on_sigterm

if TYPE_CHECKING:
    from ....workers.checkpoint.held.formats import Format
    from ...bench.kernels import Options
    from ...processes.kernel_environment import KernelEnvironment

MatrixTypes: TypeAlias = Sequence[tuple[str, int]]

WARM_TIMEOUT_S = 1800.0  # a small board compiles for minutes
_PROOF = "finding the instructions that work here"
MAX_THREADS, MAX_TOKENS, MAX_EXTENT = 1024, 4096, 1 << 20


@click.command()
@JSON_OPTION
@click.option(
    "--timeout",
    type=FractionRange(0.1, 86_400.0),
    default=WARM_TIMEOUT_S,
    metavar="SECONDS",
    help=f"Give up after this time [{WARM_TIMEOUT_S:.0f}].",
)
def warm(as_json: bool, timeout: float) -> int:
    """Compile and test all kernels ahead of the first start.

    Kernels are kept where the daemon looks for them; a second call finds all of them there.
    """
    exit_on_sigterm()
    began = time.monotonic()
    environment, new, steps = _warm(timeout, None)
    seconds = time.monotonic() - began
    kept = len(environment.compiled())
    if as_json:
        body = {
            "seconds": seconds,
            "compiled": new,
            "kept": kept,
            "target": environment.target,
            "cache": str(environment.folder),
            "steps": steps,
        }
        click.echo(json.dumps(body, ensure_ascii=False))
    elif new:
        click.echo(
            f"compiled {new} kernels for {environment.target} in {seconds:.1f} s: {environment.folder}"
        )
    else:
        click.echo(
            f"all {kept} kernels for {environment.target} were there ({seconds:.1f} s): {environment.folder}"
        )
    return 0


@click.group()
def bench() -> None:
    """Measure this machine and Sterna on it."""


@bench.command()
@JSON_OPTION
@click.option("--llama-cpp", metavar="DIR", help="Compare with the build of llama.cpp in DIR.")
@click.option(
    "--shapes", default="2048x1536", metavar="ROWSxCOLUMNS,...", help="Sizes of matrices [2048x1536]."
)
@click.option("--tokens", default="1,8,64", metavar="N,...", help="Tokens multiplied at once [1,8,64].")
@click.option("--formats", metavar="NAME,...", help="Formats or file types, such as TL1 or Q4_K [all].")
@click.option(
    "--seconds",
    type=FractionRange(0.001, 60.0),
    default=0.2,
    metavar="S",
    help="Time for each figure [0.2].",
)
@click.option("--threads", type=NumberRange(1, MAX_THREADS), metavar="N", help="Most threads [all CPUs].")
def kernels(
    as_json: bool,
    llama_cpp: str | None,
    shapes: str,
    tokens: str,
    formats: str | None,
    seconds: float,
    threads: int | None,
) -> int:
    """Measure every kernel.

    Printed are weights per second, and shares of what the machine can at most. With --llama-cpp also the
    ratio to its dot products, measured in turns on the same CPU. DIR holds its program test-quantize-perf,
    or bin/ or build/bin/ with it.
    """
    exit_on_sigterm()
    extents = _shapes(shapes)
    counts = tuple(sorted({_integer("--tokens", text, MAX_TOKENS) for text in tokens.split(",")}))
    cpus = len(os.sched_getaffinity(0))
    if threads is not None and threads > cpus:
        raise UsageError(f"--threads: {threads}, but this process may use {cpus} CPUs")
    chosen = _formats(formats, extents)
    peer = None
    if llama_cpp is not None:
        from ...bench.llama import LlamaCpp

        peer = LlamaCpp.find(Path(llama_cpp).expanduser())
    _warm(WARM_TIMEOUT_S, _matrix_types(chosen))
    from ...bench.kernels import Options

    options = Options(
        shapes=extents,
        tokens=counts,
        formats=chosen,
        seconds=seconds,
        threads=threads or cpus,
        llama_cpp=peer,
    )
    report = _measure(options)
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
    else:
        _print_report(report)
    return 0


def _measure(options: Options) -> dict[str, Any]:
    from ...bench.kernels import run

    with StartProgress() as progress:
        return run(options, time.perf_counter, progress.update)


class _TimedOut(BaseException):
    """The time for compiling is over; no Exception, because numba catches those while it compiles."""


def _warm(
    timeout_s: float, matrix_types: MatrixTypes | None
) -> tuple[KernelEnvironment, int, list[dict[str, Any]]]:
    """Compile what is missing for `matrix_types`, None for all, as `scheduler.warm.steps` has them.

    Returns where it is kept, how many kernels are new, and what each step took. Raises StartFailed
    after `timeout_s`, and what a step raises.
    """
    from ....workers.kernels.cache import cache_root

    before = frozenset(cache_root().glob("kernels-*/*/*.nbc"))
    taken: list[dict[str, Any]] = []
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        environment = _run_steps(matrix_types, taken)
    except _TimedOut:
        last = taken[-1]["name"] if taken else "none"
        raise StartFailed(
            f"kernels not compiled after {timeout_s:g} s; last step that was done: {last}; "
            "what is compiled is kept for the next time"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return environment, len(environment.compiled() - before), taken


def _run_steps(matrix_types: MatrixTypes | None, taken: list[dict[str, Any]]) -> KernelEnvironment:
    """Run the steps of `scheduler.warm`, and append name and seconds of each that is done."""
    with StartProgress() as progress:
        progress.update(_PROOF, 0, 1)
        from ...processes.kernel_environment import prepare

        environment = prepare()
        progress.update(_PROOF, 1, 1)
        from ....scheduler.warm import ALL_MATRIX_TYPES, steps

        todo = steps(matrix_types or ALL_MATRIX_TYPES)
        progress.update("kernels", 0, len(todo))
        for done, (name, run) in enumerate(todo, start=1):
            began = time.monotonic()
            run()
            taken.append({"name": name, "seconds": time.monotonic() - began})
            progress.update("kernels", done, len(todo))
    return environment


def _on_alarm(number: int, frame: FrameType | None) -> NoReturn:
    raise _TimedOut


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)[xX](\d+)\s*", part)
        if match is None:
            raise UsageError(f"--shapes: expected ROWSxCOLUMNS such as 2048x1536, found {part!r}")
        found.append((_integer("--shapes", match[1], MAX_EXTENT), _integer("--shapes", match[2], MAX_EXTENT)))
    return tuple(dict.fromkeys(found))


def _integer(flag: str, text: str, largest: int) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= largest:
        raise UsageError(f"{flag}: expected an integer from 1 to {largest}, found {text!r}")
    return int(text)


def _formats(text: str | None, shapes: tuple[tuple[int, int], ...]) -> tuple[Format, ...]:
    """Return the formats to measure, each once; the file's name of a format counts too."""
    from ....workers.checkpoint.held.formats import Format
    from ....workers.checkpoint.held.samples import file_type_of
    from ....workers.checkpoint.types.table import TYPES_BY_NAME

    by_name = {name.lower(): form for form in Format for name in (file_type_of(form), form.name)}
    names = list(by_name) if text is None else [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in by_name:
            known = ", ".join(form.name for form in Format)
            raise UsageError(f"--formats: {name!r} is unknown; expected some of {known}")
    chosen = tuple(dict.fromkeys(by_name[name] for name in names))
    for form in chosen:
        block = max(TYPES_BY_NAME[file_type_of(form)].block_elements, 4)
        for rows, columns in shapes:
            if columns % block:
                raise UsageError(
                    f"--shapes: {rows}x{columns}: {form.name} needs columns that are a multiple of {block}"
                )
    return chosen


def _matrix_types(formats: tuple[Format, ...]) -> MatrixTypes:
    """Return the (file type, format) pairs that are measured."""
    from ....workers.checkpoint.held.samples import file_type_of

    return [(file_type_of(form), int(form)) for form in formats]


def _print_report(report: dict[str, Any]) -> None:
    """Print tables: with rich on a terminal, else as Markdown."""
    from ...bench.report import summary, tables
    from ..render import grid

    for line in summary(report):
        click.echo(line)
    if not sys.stdout.isatty():
        for table in tables(report):
            click.echo(f"\n{table.title}\n\n{grid(table.head, table.rows)}")
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in tables(report):
        shown = RichTable(title=table.title, title_justify="left")
        for i, name in enumerate(table.head):
            shown.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
