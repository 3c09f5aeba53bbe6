"""The command `sterna quantize`: arguments, progress and the report. The work is in `quantize/`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ....shm.errors import UsageError
from ...quantize.plan import SCALES, TERNARY, TYPES, WEIGHTED, Wanted, choose, parse_override
from ..options import JSON_OPTION, NumberRange, model_path
from ..reading import read_file
from ..render import grid, one_line
from ..signals import exit_on_sigterm

if TYPE_CHECKING:
    from ....workers.checkpoint.file.gguf import GgufFile
    from ...quantize.column_weights import ColumnWeights
    from ...quantize.convert import Conversion
    from ...quantize.report import Group

Progress = Callable[[str, int, int], None]

MAX_THREADS = 256
MAX_TEXT_BYTES = 16 * 2**20
TOKENS = 8192
LARGE_ERROR = 0.3  # of a ternary tensor: what was trained as ternary has next to none


class _TensorTypeOption(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """One of TYPES, in any case of its letters."""

    name = "type"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the type's name; fails with a hint for a mix of types such as Q4_K_M."""
        wanted = value.upper()
        if wanted in TYPES:
            return wanted
        base = wanted.rpartition("_")[0]
        hint = f"; {wanted} is a mix of types, try {base}" if base in TYPES else ""
        return self.fail(f"{value!r} is not one of {', '.join(TYPES)}{hint}", param, ctx)


@click.command()
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "type_name",
    required=True,
    type=_TensorTypeOption(),
    metavar="TYPE",
    help=f"Type of the matrices: {', '.join(TYPES)}.",
)
@click.option(
    "--scales",
    type=click.Choice(SCALES),
    default=SCALES[0],
    metavar="RULE",
    help=f"How a ternary block gets its scale: {', '.join(SCALES)} [{SCALES[0]}].",
)
@click.option(
    "--calibrate",
    "text",
    metavar="FILE",
    help="Run this text through IN first, to know which columns of a matrix matter most.",
)
@click.option(
    "--tokens",
    type=NumberRange(2),
    default=TOKENS,
    metavar="N",
    help=f"Tokens of that text, at most [{TOKENS}].",
)
@click.option("--imatrix", metavar="FILE", help="Take the same from a file of llama.cpp's `llama-imatrix`.")
@click.option("--experts-only", is_flag=True, help="Change routed experts and nothing else.")
@click.option(
    "--tensor-type",
    "overrides",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Another type for tensors whose names match (`*`, `?`); `keep` leaves them. The first match counts.",
)
@click.option(
    "--threads",
    type=NumberRange(1, MAX_THREADS),
    metavar="N",
    help="Threads [one for each CPU].",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
@click.option(
    "--restart", is_flag=True, help="Begin anew; do not go on with what an earlier run has written."
)
@click.option("--dry-run", is_flag=True, help="Print what would become of each tensor, and write nothing.")
@JSON_OPTION
def quantize(
    source: str,
    out: Path,
    type_name: str,
    scales: str,
    text: str | None,
    tokens: int,
    imatrix: str | None,
    experts_only: bool,
    overrides: tuple[str, ...],
    threads: int | None,
    force: bool,
    restart: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Write the model IN to OUT with other tensor types.

    Routers, norms, biases, embeddings and the head stay as they are. IN may be `embedded`. After a signal
    or with a full disk the same command goes on where it was. OUT appears when it is complete and checked.
    """
    from ....workers.checkpoint.file.gguf import GgufFile

    exit_on_sigterm()
    wanted = Wanted(
        type=type_name,
        scales=scales,
        experts_only=experts_only,
        overrides=tuple(parse_override(text) for text in overrides),
    )
    _check_options(wanted, text, imatrix)
    content = None if text is None else read_file(text, MAX_TEXT_BYTES)
    with GgufFile.open(model_path(source)) as file:
        if dry_run:
            return _show_choices(file, wanted, as_json)
        from ...quantize.journal import check_output

        check_output([*file.paths, *(path for path in (text, imatrix) if path is not None)], out, force=force)
        with _stoppable(calibrates=text is not None) as progress:
            from ...processes.kernel_environment import prepare

            prepare()
            from ...quantize.convert import quantize as convert

            calibration = _calibration(file, content, tokens, imatrix, out, progress)
            report = convert(
                file,
                out,
                wanted,
                weights=calibration.weights,
                calibration=calibration.source,
                threads=threads or len(os.sched_getaffinity(0)),
                force=force,
                restart=restart,
                progress=progress,
            )
            calibration.drop()
    _print(report, as_json)
    _warn(report)
    return 0


def _show_choices(file: GgufFile, wanted: Wanted, as_json: bool) -> int:
    """Print what would become of each tensor."""
    from ...quantize.report import groups

    found = groups(choose(file, wanted))
    click.echo(_json(found, {}) if as_json else _table(found))
    return 0


def _check_options(wanted: Wanted, text: str | None, imatrix: str | None) -> None:
    """Raise UsageError for options that say nothing about the types wanted, or the same twice."""
    if wanted.scales != SCALES[0] and not wanted.types & set(TERNARY):
        raise UsageError(f"--scales {wanted.scales} is for {' and '.join(TERNARY)}")
    if (text is not None or imatrix is not None) and not wanted.types & set(WEIGHTED):
        raise UsageError(f"{'--imatrix' if text is None else '--calibrate'} is for {', '.join(WEIGHTED)}")
    if text is not None and imatrix is not None:
        raise UsageError("--calibrate and --imatrix are two ways to say the same: give one")


@contextlib.contextmanager
def _stoppable(*, calibrates: bool) -> Iterator[Progress]:
    """Yield what shows progress on stderr; who stops the command is told whether it can go on."""
    from ..progress import StartProgress

    phase = ""
    try:
        with StartProgress() as shown:

            def progress(what: str, done: int, total: int) -> None:
                nonlocal phase
                phase = what
                shown.update(what, done, total)

            yield progress
    except (KeyboardInterrupt, SystemExit):
        how = "starts the calibration anew" if calibrates else "begins anew"
        if phase in ("converting", "checking"):
            how = "goes on from here"
        click.echo(f"sterna: stopped; the same command {how}", err=True)
        raise


def _calibration(
    file: GgufFile, content: str | None, tokens: int, imatrix: str | None, out: Path, progress: Progress
) -> ColumnWeights:
    from ...quantize.column_weights import ColumnWeights, from_imatrix, from_text

    if content is not None:
        return from_text(file, content, tokens, out, progress)
    return ColumnWeights() if imatrix is None else from_imatrix(file, Path(imatrix))


def _print(report: Conversion, as_json: bool) -> None:
    facts: dict[str, Any] = {
        "path": str(report.path),
        "bytes": report.nbytes,
        "seconds": report.seconds,
        "converted_bytes": report.recoded_nbytes,
        "resumed_tensors": report.resumed,
    }
    if as_json:
        click.echo(_json(report.groups, facts))
        return
    click.echo(_table(report.groups))
    speed = report.recoded_nbytes / 1e6 / max(report.seconds, 1e-9)
    resumed = f", {report.resumed} tensors from an earlier run" if report.resumed else ""
    click.echo(
        f"\n{report.path}: {report.nbytes / 1e6:.1f} MB in {report.seconds:.1f} s"
        f" ({speed:.0f} MB/s converted{resumed}), read back and compared"
    )


def _warn(report: Conversion) -> None:
    """Tell who made weights ternary that were not trained for it."""
    lost = [
        group
        for group in report.groups
        if group.after in TERNARY and group.error is not None and group.error > LARGE_ERROR
    ]
    if lost:
        worst = max(lost, key=lambda group: group.error or 0.0)
        more = f", so do {len(lost) - 1} other groups of tensors" if len(lost) > 1 else ""
        click.echo(
            f"sterna: warning: {one_line(worst.name)} has an error of {worst.error:.0%} as {worst.after}"
            f"{more}: ternary types are for weights that were trained as ternary; --type Q4_K is for others",
            err=True,
        )


def _json(found: tuple[Group, ...], facts: dict[str, Any]) -> str:
    return json.dumps({**facts, "groups": [dataclasses.asdict(group) for group in found]})


def _table(found: tuple[Group, ...]) -> str:
    rows = [
        (
            group.name,
            str(group.tensors),
            group.before,
            f"{group.nbytes_before / 1e6:.1f}",
            group.after,
            f"{group.nbytes_after / 1e6:.1f}",
            "-" if group.error is None else f"{group.error:.2%}",
            group.kept and f"kept: {group.kept}",
        )
        for group in found
    ]
    return grid(("tensors", "number", "from", "MB", "to", "MB", "error", ""), rows)
