"""Quality budgets on the command line: what is sent, what is refused before any daemon is started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.runtime.cli import main, render
from sterna.runtime.cli.options import fraction
from sterna.runtime.protocol import messages as m
from sterna.shm.errors import UsageError

from ...families.tiny_files import write
from ...families.tiny_models import tiny_model
from ..client.peer import Peer


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with Peer(tmp_path) as peer:
        yield peer


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "tale.txt"
    path.write_text("Once upon a time")
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main.run(list(arguments))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sterna: error: ")
    assert captured.err.count("\n") == 1
    return code, captured.err.removeprefix("sterna: error: ").rstrip("\n")


def test_generate_passes_a_budget_on(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "abc", "--socket", peer.url, "--quality-budget", "0.5%", "--json"]) == 0
    assert '"routing": null' in capsys.readouterr().out
    assert main.run(["generate", "abc", "--socket", peer.url]) == 0
    budget, none = peer.messages(m.Generate)
    assert isinstance(budget, m.Generate)
    assert isinstance(none, m.Generate)
    assert (budget.quality_budget, none.quality_budget) == (0.005, None)


@pytest.mark.parametrize("text", ["0.005", "11%", "-1%", "%", "much", "nan%"])
def test_budget_is_a_percentage(text: str) -> None:
    assert fraction("10%", "x") == 0.1
    with pytest.raises(
        UsageError, match=r"^--quality-budget: expected a share from 0% to 10%, such as 0\.5%"
    ):
        fraction(text, "--quality-budget")


def test_line_on_an_answer() -> None:
    facts = m.RoutingFacts(
        epsilon=0.03, basis="uncalibrated", events=100, changed=30, swaps=40, lost_mass=0.0288,
        swap_share=0.2, agreement=0.7, credit_left=0.01,
    )  # fmt: skip
    assert render.routing_line(facts) == (
        "experts traded 20.0%, selections unchanged 70.0%, gate mass lost 2.880% of at most 3.000% "
        "(not calibrated for this model)"
    )


def test_what_contradicts_itself_is_refused(capsys: pytest.CaptureFixture[str], text: str) -> None:
    both = ["--quality-budget", "1%", "--lost-mass", "0.1"]
    code, line = refusal(capsys, "perplexity", "embedded", text, *both)
    assert (code, line) == (64, "--quality-budget and --lost-mass are two ways to say the same: give one")
    code, line = refusal(capsys, "perplexity", "embedded", text, "--routing", "exact", "--lost-mass", "0.1")
    assert (code, line) == (64, "--routing exact spends no --quality-budget or --lost-mass")
    code, line = refusal(capsys, "calibrate", "embedded", text, "--budgets", "1%,2")
    assert code == 64
    assert line.startswith("--budgets: expected a share")


def test_texts_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    assert refusal(capsys, "perplexity", "embedded", str(missing)) == (
        64,
        f"{missing}: No such file or directory",
    )
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"ab\xff")
    code, line = refusal(capsys, "calibrate", "embedded", str(broken))
    assert (code, line) == (64, f"{broken}: expected UTF-8 text, found the byte 0xff at 2")


def test_trace_overwrites_nothing(capsys: pytest.CaptureFixture[str], text: str) -> None:
    code, line = refusal(capsys, "trace", "embedded", text, "-o", text)
    assert (code, line) == (64, f"{text}: there is such a file already")
    assert Path(text).read_text() == "Once upon a time"


@pytest.mark.parametrize("command", ["calibrate", "trace"])
def test_a_dense_model_is_refused_before_a_daemon_is_started(
    capsys: pytest.CaptureFixture[str], text: str, tmp_path: Path, command: str
) -> None:
    model, output = write(tiny_model("qwen3"), tmp_path / "dense.gguf"), tmp_path / "made"
    code, line = refusal(capsys, command, str(model), text, "-o", str(output))
    assert (code, line) == (64, f"{model}: a dense model has no experts to {command}")
    assert not output.exists()
