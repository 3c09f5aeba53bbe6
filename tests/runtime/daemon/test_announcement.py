"""What is told of a context that memory made shorter, at the start and in an error."""

from __future__ import annotations

import pytest

from sterna.runtime.config import Config, embedded_model
from sterna.runtime.daemon.announcement import Announcement, context_shortage, wished_context
from sterna.scheduler.model.hyper import Hyperparameters
from sterna.scheduler.model.planner import read_plan
from sterna.workers.checkpoint.file.gguf import GgufFile


@pytest.fixture(scope="module")
def hyper() -> Hyperparameters:
    with GgufFile.open(embedded_model()) as file:
        return read_plan(file).hyper


def test_the_context_that_is_wished_for(hyper: Hyperparameters) -> None:
    assert hyper.context_length == 512
    assert wished_context(Config(), hyper) == 512
    assert wished_context(Config(ctx_size=100), hyper) == 100


def test_a_shorter_context_is_explained(hyper: Hyperparameters) -> None:
    assert context_shortage(Config(), hyper, 512) == ""
    assert context_shortage(Config(ctx_size=100), hyper, 100) == ""
    assert context_shortage(Config(), hyper, 256) == (
        " (512 with more memory: raise memory, or set ctx_size, which is then kept)"
    )


def test_the_line_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    Announcement(socket="ipc:///run/s", name="m", context=1, wished_context=2).print_ready()
    assert capsys.readouterr().out == "ready socket=ipc:///run/s\n"
