"""What is said while a daemon starts: kernels are compiled only if one was stored meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from sterna.runtime.cli.progress import COMPILING, PHASES, StartProgress


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kernels-0123456789abcdef" / "module_1"
    folder.mkdir(parents=True)
    (folder / "old.nbc").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return folder


def test_kernels_that_are_there_are_loaded(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StartProgress() as progress:
        for done in range(3):
            progress.update("kernels", done, 3)
    assert capsys.readouterr().err == f"sterna: {PHASES['kernels']}\n" == "sterna: loading kernels\n"


def test_a_kernel_that_is_stored_was_compiled(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StartProgress() as progress:
        (cache / "new.nbc").touch()
        for done in range(3):
            progress.update("kernels", done, 3)
        progress.update("experts", 0, 1)
    assert capsys.readouterr().err == f"sterna: {COMPILING}\nsterna: loading experts\n"


def test_a_terminal_is_shown_bars(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with StartProgress() as progress:
        progress.update("kernels", 1, 3)
        assert progress._bars is not None
        assert progress._bars.tasks[0].description == "loading kernels"
        (cache / "new.nbc").touch()
        progress.update("kernels", 2, 3)
        assert (progress._bars.tasks[0].description, progress._bars.tasks[0].completed) == (COMPILING, 2)
        progress.stop()
