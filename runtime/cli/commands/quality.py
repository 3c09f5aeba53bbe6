"""The commands `sterna perplexity`, `calibrate` and `trace`: a text through a daemon of its own.

In here: arguments, progress and printing. Not in here: scoring and search (`quality/perplexity.py`), what a
budget means afterwards (`quality/calibration.py`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ....shm.errors import StartFailed, UsageError
from ...config import SETTINGS, flag_of, load_config
from ..options import (
    JSON_OPTION,
    Command,
    FractionRange,
    NumberRange,
    SpelledOption,
    fraction,
    model_path,
    quality_option,
    setting_options,
    window_option,
)
from ..reading import read_file
from ..render import grid, table
from ..signals import exit_on_sigterm

if TYPE_CHECKING:
    from ...client.client import Client
    from ...quality.calibration import BudgetTable, Point
    from ...quality.perplexity import How, Progress, Scores

MAX_TEXT_BYTES = 16 * 2**20
DEFAULT_BUDGET = 0.005
PRESETS = "0.5%,1%,3%"
WINDOW = 512
# A window of a large model on a slow disk takes minutes; liveness is the pings' matter.
ANSWER_TIMEOUT_S = 86_400.0
# Of the daemon's settings, those that decide how a model is held and run.
_SETTINGS = (
    "memory",
    "preset",
    "resident_experts",
    "prefetch",
    "workers",
    "threads",
    "ternary",
    "activations",
    "precision",
    "step_timeout_s",
    "start_timeout_s",
)


def _model_options(command: Command) -> Command:
    """Give a command the arguments [MODEL] TEXT, --ctx-size for windows, and the flags of _SETTINGS."""

    @functools.wraps(command)
    def with_model(words: tuple[str, ...], **options: Any) -> int:  # noqa: ANN401 - of any option
        if len(words) > 2:
            raise UsageError(f"expected MODEL and TEXT, or TEXT alone, found {len(words)} arguments")
        return command(model=None if len(words) == 1 else words[0], text=words[-1], **options)

    with_options = window_option(WINDOW)(setting_options(_SETTINGS)(with_model))
    return click.argument("words", metavar="[MODEL] TEXT", nargs=-1, required=True)(with_options)


@click.command()
@_model_options
@click.option(
    "--routing",
    type=click.Choice(SETTINGS["routing"].choices),
    help="How experts are chosen [budget if one is given, else exact].",
)
@quality_option("0.5% with --routing budget")
@click.option(
    "--lost-mass",
    type=FractionRange(0, 1),
    metavar="X",
    help="Gate mass to lose at most, instead of a budget.",
)
@click.option(
    "--stepped/--no-stepped", default=None, help="Compute one token per step [--stepped with a budget]."
)
@click.option("--tokens", type=NumberRange(2), metavar="N", help="Tokens of the text that are scored [all].")
@click.option("--kl", is_flag=True, help="Score exactly as well, and compare.")
@JSON_OPTION
def perplexity(
    model: str | None,
    text: str,
    ctx: int | None,
    routing: str | None,
    quality_budget: float | None,
    lost_mass: float | None,
    stepped: bool | None,
    tokens: int | None,
    kl: bool,
    as_json: bool,
    **flags: str | None,
) -> int:
    """Print the perplexity of TEXT, a file, under MODEL.

    MODEL is a GGUF file, by default the embedded one. TEXT is cut into windows, and every token of a window
    but its first is scored. llama-perplexity scores only the second half of each window, where every token
    has much context: its figures are lower, and not comparable with these.
    """
    from ...quality.perplexity import How, score, windows

    lossy = _routing(routing, quality_budget, lost_mass)
    stepped = lossy if stepped is None else stepped
    if lossy and lost_mass is None and quality_budget is None:
        quality_budget = DEFAULT_BUDGET
    how = (
        How(stepped=stepped, lost_mass=lost_mass, quality_budget=quality_budget)
        if lossy
        else How(stepped=stepped)
    )
    with _scoring(model, text, flags) as (client, content, progress):
        parts = windows(client, content, _window(client, ctx), tokens)
        if not parts:
            raise UsageError(f"{text}: expected at least two tokens to score, found fewer")
        exact = score(client, parts, How(stepped=stepped), "scoring, exact", progress) if kl else None
        scores = score(client, parts, how, "scoring", progress)
    facts = _facts(scores, how, exact)
    click.echo(json.dumps(facts) if as_json else table(facts))
    return 0


def _routing(routing: str | None, quality_budget: float | None, lost_mass: float | None) -> bool:
    """Return whether a budget is in force; raises UsageError for options that contradict each other."""
    given = quality_budget is not None or lost_mass is not None
    if quality_budget is not None and lost_mass is not None:
        raise UsageError("--quality-budget and --lost-mass are two ways to say the same: give one")
    if routing == "exact" and given:
        raise UsageError("--routing exact spends no --quality-budget or --lost-mass")
    return given or routing == "budget"


def _facts(scores: Scores, how: How, exact: Scores | None) -> dict[str, Any]:
    from ...quality.perplexity import mean_difference, rise

    facts: dict[str, Any] = {
        "perplexity": scores.perplexity,
        "nats_per_token": scores.nats,
        "tokens": len(scores.logprobs),
        "tokens_per_second": len(scores.logprobs) / max(scores.seconds, 1e-9),
        "stepped": how.stepped,
        "hit_rate": scores.hit_rate,
        "routing": scores.routing.shown() if scores.routing else "exact",
    }
    if exact is not None:
        delta, error = rise(exact.logprobs, scores.logprobs)
        facts["exact"] = {
            "perplexity": exact.perplexity,
            "tokens_per_second": len(exact.logprobs) / max(exact.seconds, 1e-9),
            "hit_rate": exact.hit_rate,
            "rise": delta,
            "rise_error": error if error < float("inf") else None,
            "mean_abs_difference_nats": mean_difference(exact.logprobs, scores.logprobs),
        }
    return facts


@click.command()
@_model_options
@click.option(
    "--budgets",
    cls=SpelledOption,
    also=("--presets",),
    default=PRESETS,
    metavar="LIST",
    help=f"Quality budgets to measure [{PRESETS}].",
)
@click.option(
    "--tokens",
    type=NumberRange(64),
    default=2048,
    metavar="N",
    help="Tokens of the text that are scored [2048].",
)
@click.option("--no-margin", is_flag=True, help="Do not keep one standard error away from a budget.")
@click.option(
    "-o", "--output", metavar="FILE", help="Store there; MODEL's name with .calibration.json comes along."
)
@JSON_OPTION
def calibrate(
    model: str | None,
    text: str,
    ctx: int | None,
    budgets: str,
    tokens: int,
    no_margin: bool,
    output: str | None,
    as_json: bool,
    **flags: str | None,
) -> int:
    """Measure what each quality budget allows MODEL to lose.

    The result is stored, and the daemon uses it. MODEL is by default the embedded one. TEXT is scored one
    token per step, exactly and with several budgets; the memory settings decide how many experts are in
    memory. Ctrl-C keeps what was measured.
    """
    from ...quality.calibration import cache_path, store

    wanted = [fraction(part.strip(), "--budgets") for part in budgets.split(",")]
    path = model_path(model)
    _require_experts(path, "calibrate")
    target = Path(output) if output else cache_path(path)
    measured: list[BudgetTable] = []
    try:
        with _scoring(model, text, flags) as (client, content, progress):
            for found in _measure(client, content, ctx, tokens, wanted, not no_margin, progress):
                measured[:] = [found]
    finally:  # also after Ctrl-C or SIGTERM
        if measured:
            store(target, path, measured[0])
            _print_table(measured[0], wanted, target, as_json)
    return 0


def _measure(
    client: Client,
    text: str,
    ctx: int | None,
    tokens: int,
    budgets: list[float],
    margin: bool,
    progress: Progress,
) -> Iterator[BudgetTable]:
    """Yield the table after each epsilon that was measured; the last one is the whole."""
    from ...quality.calibration import SHARE_DIGITS, BudgetTable
    from ...quality.perplexity import How, point, resident_share, score, search, windows

    share = round(resident_share(client), SHARE_DIGITS)
    if share >= 1:
        raise UsageError("all experts are in memory, so that a budget saves nothing: give --resident-experts")
    parts = windows(client, text, _window(client, ctx), tokens)
    if not parts:
        raise UsageError("TEXT: expected at least two tokens to score, found fewer")
    exact = score(client, parts, How(stepped=True), "scoring, exact", progress)

    def measure(epsilon: float) -> Point:
        how = How(stepped=True, lost_mass=epsilon)
        return point(epsilon, exact, score(client, parts, how, f"scoring, lost mass {epsilon:g}", progress))

    for points in search([budget for budget in budgets if budget > 0], measure, margin=margin):
        yield BudgetTable(
            resident_share=share,
            tokens=len(exact.logprobs),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            perplexity=exact.perplexity,
            margin=margin,
            points=points,
        )


def _print_table(found: BudgetTable, budgets: list[float], target: Path, as_json: bool) -> None:
    import msgspec

    chosen = {f"{budget:.2%}": found.epsilon(budget) for budget in sorted(budgets)}
    if as_json:
        click.echo(json.dumps({**msgspec.to_builtins(found), "budgets": chosen, "stored": str(target)}))
        return
    rows = [
        (
            f"{p.epsilon:.4f}",
            f"{p.delta:+.2%} +- {p.error:.2%}",
            "-" if p.misses is None else f"{p.misses:.2f}",
            f"{p.swap_share:.1%}",
            f"{p.lost_mass:.2%}",
        )
        for p in found.points
    ]
    click.echo(grid(("epsilon", "perplexity", "misses of exact", "swapped", "lost mass"), rows))
    click.echo("\n" + grid(("budget", "epsilon"), [(name, f"{value:.4f}") for name, value in chosen.items()]))
    click.echo(
        f"\n{found.tokens} tokens, perplexity {found.perplexity:.4f} when exact, "
        f"{found.resident_share:.0%} of the experts in memory; stored in {target}"
    )


@click.command()
@_model_options
@click.option("-o", "--output", required=True, metavar="FILE", help="CSV file to make; it must not exist.")
@click.option(
    "--tokens", type=NumberRange(1), default=512, metavar="N", help="Tokens of the text that are read [512]."
)
@click.option(
    "--generate", "answer", type=NumberRange(0), default=0, metavar="N", help="Tokens to generate [0: none]."
)
def trace(
    model: str | None, text: str, ctx: int | None, output: str, tokens: int, answer: int, **flags: str | None
) -> int:
    """Record which experts the tokens of TEXT go to.

    The trace is for `sterna simulate`. MODEL is by default the embedded one. TEXT is computed one token per
    step, as an answer is; with --generate it is a prompt instead.
    """
    from ...quality.perplexity import How, score, windows

    path = Path(output).absolute()
    if path.exists():
        raise UsageError(f"{path}: there is such a file already")
    _require_experts(model_path(model), "trace")
    with _scoring(model, text, {**flags, "trace": str(path)}) as (client, content, progress):
        size = _window(client, ctx)
        if answer:
            ids = client.tokenize(content)[: min(tokens, max(1, size - answer))]
            client.generate(token_ids=ids, max_tokens=answer, temperature=0.0, ignore_eos=True)
        else:
            score(client, windows(client, content, size, tokens), How(stepped=True), "tracing", progress)
    if not path.exists():
        raise StartFailed(f"the daemon wrote no trace to {path}")
    click.echo(f"{path}: {path.stat().st_size} bytes")
    return 0


# ---- what the commands share ----


def _require_experts(path: Path, purpose: str) -> None:
    """Raise UsageError for a dense model: it has no experts to `purpose`. Raises the file's errors, too."""
    from ....scheduler.model.families.family import read_hyperparameters
    from ....workers.checkpoint.file.gguf import GgufFile

    with GgufFile.open(path) as file:
        if not read_hyperparameters(file).moe_layers:
            raise UsageError(f"{file.label}: a dense model has no experts to {purpose}")


@contextlib.contextmanager
def _scoring(
    model: str | None, text: str, flags: dict[str, str | None]
) -> Iterator[tuple[Client, str, Progress]]:
    """Yield a client of a daemon of our own with these settings, what the file `text` holds, and progress."""
    from ...client.client import Client
    from ..private_daemon import print_note, private_daemon
    from ..progress import StartProgress

    exit_on_sigterm()
    content = read_file(text, MAX_TEXT_BYTES)
    path = model_path(model)
    # Checked here too, so that a wrong value is this command's error and no daemon's.
    config = load_config(None, os.environ, {**flags, "model": str(path)})
    given = [word for name, value in flags.items() if value is not None for word in (flag_of(name), value)]
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(StartProgress()).update
        url = stack.enter_context(
            private_daemon([str(path), *given], config.start_timeout_s, progress, print_note)
        )
        yield stack.enter_context(Client(url, timeout_s=ANSWER_TIMEOUT_S)), content, progress


def _window(client: Client, ctx: int | None) -> int:
    """Return the tokens of a window; a request keeps one position of the context for its answer."""
    most = client.connect().model.context_length - 1
    if ctx is not None and ctx > most:
        raise UsageError(f"--ctx-size is {ctx}; the daemon's context leaves {most} tokens for a window")
    return min(ctx or WINDOW, most)
