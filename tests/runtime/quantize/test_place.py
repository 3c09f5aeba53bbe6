"""`sterna quantize` and files that are in its way, inputs that it cannot convert, and the command itself."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sterna.runtime.cli import main
from sterna.runtime.cli.commands.quantize import _stoppable, _warn
from sterna.runtime.quantize.convert import quantize
from sterna.runtime.quantize.plan import TYPES, Wanted
from sterna.shm.errors import (
    AlreadyRunning,
    ModelFileError,
    ModelReadError,
    OutOfResources,
    UsageError,
)
from sterna.workers.checkpoint.file.gguf import GgufFile

from .source import write_source

TERNARY = Wanted(type="TQ2_0")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("quantize") / "in.gguf")


@pytest.fixture
def file(source: Path) -> Iterator[GgufFile]:
    with GgufFile.open(source) as file:
        yield file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


def left(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()}


@pytest.mark.parametrize("side", ["", ".part", ".part.journal", ".part.imatrix"])
@pytest.mark.parametrize("restart", [False, True])
def test_the_input_is_never_written_to(source: Path, out: Path, side: str, restart: bool) -> None:
    path = out.with_name("out.gguf" + side)
    path.write_bytes(source.read_bytes())
    with GgufFile.open(path) as file, pytest.raises(UsageError, match="input and output are the same file"):
        quantize(file, out, TERNARY, force=True, restart=restart)
    assert path.read_bytes() == source.read_bytes()
    assert left(out) == {path.name}


@pytest.mark.parametrize(
    ("side", "message"), [(".part", "without a journal; --restart"), (".part.journal", "damaged; --restart")]
)
def test_files_of_others_stay(file: GgufFile, out: Path, side: str, message: str) -> None:
    path = out.with_name("out.gguf" + side)
    path.write_bytes(b"notes\n")
    with pytest.raises(UsageError, match=message):
        quantize(file, out, TERNARY, force=True)
    assert path.read_bytes() == b"notes\n"
    quantize(file, out, TERNARY, restart=True)
    assert left(out) == {"out.gguf"}


def test_a_run_that_ended_before_the_lock_is_not_written_over(
    file: GgufFile, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def late(fd: int, how: int) -> None:  # the other one finishes between open and lock
        flock(fd, how)
        out.with_name("out.gguf.part").rename(out)

    out.with_name("out.gguf.part").write_bytes(b"a whole file")
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(AlreadyRunning):
        quantize(file, out, TERNARY, restart=True)
    assert out.read_bytes() == b"a whole file"


def test_weights_are_found_when_nothing_else_is_in_the_way(
    file: GgufFile, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights() -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        raise AssertionError("found too early")

    def refused(error: type[Exception], wanted: Wanted = TERNARY) -> None:
        with pytest.raises(error):
            quantize(file, out, wanted, weights=weights)  # type: ignore[arg-type]

    refused(ModelFileError, Wanted(type="F32"))
    part = out.with_name("out.gguf.part")
    part.write_bytes(b"notes")
    refused(UsageError)
    part.unlink()
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    refused(OutOfResources)


# ---- weights and files that cannot be converted ----


@pytest.mark.parametrize("name", sorted(set(TYPES) - {"F32", "BF16"}))
def test_a_weight_that_is_no_number_is_named(source: Path, out: Path, name: str) -> None:
    spoilt = out.with_name("in.gguf")
    spoilt.write_bytes(source.read_bytes())
    with GgufFile.open(spoilt) as file, spoilt.open("r+b") as opened:
        info = file.tensors["blk.10.ffn_up.3.weight"]
        opened.seek(info.offset + 4 * (7 * 256 + 3))
        opened.write(np.float32(np.nan).tobytes())
        opened.flush()
        where = rf"in\.gguf: tensor 'blk\.10\.ffn_up\.3\.weight': type {name}: row 7: a weight that is not "
        with pytest.raises(ModelFileError, match=where):
            quantize(file, out, Wanted(type=name, overrides=((info.name, name), ("*", None))))


@pytest.mark.parametrize("name", ["output.weight", "blk.0.ffn_down_exps.weight"])
def test_an_input_that_shrinks_is_an_error(source: Path, out: Path, name: str) -> None:
    """Where the mapping kills the process; `name` is copied or converted."""
    shrunk = out.with_name("in.gguf")
    shrunk.write_bytes(source.read_bytes())
    with GgufFile.open(shrunk) as file:

        def shrink() -> dict[str, np.ndarray]:  # type: ignore[type-arg]
            os.truncate(shrunk, file.tensors[name].offset)
            return {}

        with pytest.raises(ModelReadError, match=r"in\.gguf: byte \d+: the file ends here, it has shrunk"):
            quantize(file, out, TERNARY, weights=shrink)


# ---- the command ----


def test_what_the_command_refuses(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["quantize", str(source), str(out), "--type", "tq2_0", "--dry-run", "--json"]) == 0
    groups = {group["name"]: group for group in json.loads(capsys.readouterr().out)["groups"]}
    assert groups["blk.*.ffn_down_exps.weight"]["nbytes_after"] == 4 * 512 * 66
    assert groups["output.weight"]["kept"] == "no matrix to convert"
    assert left(out) == set()
    assert main.run(["quantize", str(source), str(out), "--type", "Q8_0", "--scales", "absmean"]) == 64
    assert "--scales absmean is for TQ1_0 and TQ2_0" in capsys.readouterr().err
    assert main.run(["quantize", str(source), str(out), "--type", "Q9"]) == 64
    assert "'Q9' is not one of" in capsys.readouterr().err
    for option in ("--calibrate", "--imatrix"):
        override = ["--tensor-type", "*=F16"]
        assert main.run(["quantize", str(source), str(out), "--type", "Q8_0", *override, option, "x"]) == 64
        assert f"{option} is for Q6_K, Q5_K, Q4_K, Q3_K, Q2_K, TQ1_0, TQ2_0" in capsys.readouterr().err
    both = ["--calibrate", str(source), "--imatrix", str(source)]
    assert main.run(["quantize", str(source), str(out), "--type", "Q4_K", *both]) == 64
    assert "--calibrate and --imatrix are two ways to say the same" in capsys.readouterr().err
    text = out.with_name("out.gguf.part.imatrix")
    text.write_text("a text")
    assert main.run(["quantize", str(source), str(out), "--type", "Q4_K", "--calibrate", str(text)]) == 64
    assert f"{text}: input and output are the same file" in capsys.readouterr().err
    assert text.read_text() == "a text"


def test_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["quantize", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"--type TYPE Type of the matrices: {', '.join(TYPES)}." in text
    assert "--calibrate FILE Run this text" in text
    assert "<=" not in text
    assert ">=" not in text


def test_who_stops_the_command_is_told_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def run(calibrates: bool, phase: str) -> None:
        with _stoppable(calibrates=calibrates) as progress:
            if phase:
                progress(phase, 1, 2)
            raise KeyboardInterrupt

    for calibrates, phase, told in (
        (True, "calibrating", "starts the calibration anew"),
        (False, "", "begins anew"),
        (True, "converting", "goes on from here"),
    ):
        with pytest.raises(KeyboardInterrupt):
            run(calibrates, phase)
        assert f"sterna: stopped; the same command {told}\n" in capsys.readouterr().err


def test_who_makes_float_weights_ternary_is_warned(
    file: GgufFile, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _warn(quantize(file, out, replace(TERNARY, overrides=(("*_exps*", "Q8_0"),))))
    err = capsys.readouterr().err
    warning = (
        r"sterna: warning: blk\.\*\.\S+ has an error of 4\d% as TQ2_0, so do 2 other groups of tensors: "
    )
    assert re.search(warning, err)
    assert "ternary types are for weights that were trained as ternary; --type Q4_K is for others" in err
    _warn(quantize(file, out, Wanted(type="Q2_K"), force=True))
    assert not capsys.readouterr().err


def test_the_command(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "sterna.runtime.cli.main",
        "quantize",
        str(source),
        str(out),
        "--type",
        "TQ2_0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "read back and compared" in done.stdout
    assert "sterna: warning: blk." in done.stderr
    assert "| blk.*.ffn_down_exps.weight " in done.stdout
    assert main.run(["quantize", str(source), str(out), "--type", "TQ2_0"]) == 64
    message = "there is such a file already; --force replaces it when the new one is done"
    assert capsys.readouterr().err == f"sterna: error: {out}: {message}\n"
