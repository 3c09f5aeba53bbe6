"""`sterna quantize`: what becomes of which tensor, going on after each kind of stop, the check at the end."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sterna.runtime import cli
from sterna.runtime.config import embedded_model
from sterna.runtime.quantize import quantize
from sterna.runtime.quantize_plan import TYPES, Wanted, choose, parse_override
from sterna.shm.errors import (
    AlreadyRunning,
    ModelFileError,
    ModelReadError,
    NotPermitted,
    OutOfResources,
    UsageError,
)
from sterna.workers.checkpoint.gguf import GgufFile
from sterna.workers.checkpoint.recode import WRITABLE
from sterna.workers.checkpoint.types import TYPES_BY_NAME, dequantize
from sterna.workers.checkpoint.writer import lay_out, string_value, uint32_value

TERNARY = Wanted(type="TQ2_0")
SHAPES = {
    "token_embd.weight": (32, 512),
    "output.weight": (32, 512),
    "output_norm.weight": (512,),
    "rope_freqs.weight": (64,),
    "blk.0.attn_q.weight": (512, 512),
    "blk.0.attn_k_b.weight": (2, 64, 96),
    "blk.0.attn_sinks.weight": (8,),
    "blk.0.attn_q.bias": (512,),
    "blk.0.ffn_gate_inp.weight": (4, 512),
    "blk.0.exp_probs_b.bias": (4,),
    "blk.0.ffn_gate_up_exps.weight": (4, 256, 512),
    "blk.0.ffn_down_exps.weight": (4, 512, 256),
    "blk.0.ffn_down_shexp.weight": (512, 256),
    "blk.10.ffn_up.3.weight": (64, 256),
}
EXPERTS = {"blk.0.ffn_gate_up_exps.weight", "blk.0.ffn_down_exps.weight", "blk.10.ffn_up.3.weight"}
MATRICES = {"blk.0.attn_q.weight", "blk.0.ffn_down_shexp.weight"} | EXPERTS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float file with every kind of tensor; no model, but nobody here computes with it."""
    path = tmp_path_factory.mktemp("quantize") / "in.gguf"
    keys = [
        ("general.architecture", string_value("llama")),
        ("general.file_type", uint32_value(0)),
        ("general.license", string_value("CC0-1.0")),
        ("split.count", uint32_value(1)),
    ]
    layout = lay_out(keys, [(n, shape, TYPES_BY_NAME["F32"]) for n, shape in SHAPES.items()], 32)
    random = np.random.default_rng(1)
    image = bytearray(layout.header.ljust(layout.nbytes, b"\0"))
    for info in layout.tensors:
        image[info.offset : info.offset + info.nbytes] = (
            random.standard_normal(info.shape).astype(np.float32).tobytes()
        )
    path.write_bytes(image)
    return path


@pytest.fixture
def file(source: Path) -> Iterator[GgufFile]:
    with GgufFile.open(source) as file:
        yield file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


def values(path: Path, name: str) -> np.ndarray:  # type: ignore[type-arg]
    with GgufFile.open(path) as file:
        info = file.tensors[name]
        return dequantize(info.type, file.data(info), info.shape)


def stop_at(share: float, error: type[BaseException] = KeyboardInterrupt) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if what == "converting" and done > share * total:
            raise error

    return progress


def left(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()}


# ---- what becomes of what ----


def test_every_type_has_a_number_and_an_encoder() -> None:
    assert set(TYPES) == set(WRITABLE)


def test_which_tensors_change(file: GgufFile) -> None:
    def changed(wanted: Wanted) -> set[str]:
        return {choice.info.name for choice in choose(file, wanted) if not choice.kept}

    assert changed(TERNARY) == MATRICES
    assert changed(replace(TERNARY, experts_only=True)) == EXPERTS
    assert changed(Wanted(type="Q8_0")) == MATRICES | {"blk.0.attn_k_b.weight"}
    kept = {choice.info.name: choice.kept for choice in choose(file, TERNARY)}
    assert kept["blk.0.attn_k_b.weight"] == "96 columns are no whole blocks of 256"
    with pytest.raises(ModelFileError, match=r"nothing to change: every tensor is kept .*is F32 already"):
        choose(file, Wanted(type="F32"))


def test_patterns_come_first(file: GgufFile) -> None:
    overrides = ("*_shexp.weight", "Q8_0"), ("*_exps*", None), ("token_embd*", "Q6_K"), ("*", "F16")
    types = {c.info.name: c.target.name for c in choose(file, replace(TERNARY, overrides=overrides))}
    assert types["blk.0.ffn_down_shexp.weight"] == "Q8_0"
    assert types["blk.0.ffn_down_exps.weight"] == "F32"
    assert types["token_embd.weight"] == "Q6_K"  # noqa: S105 - a name of a tensor
    assert types["output_norm.weight"] == "F16"
    with pytest.raises(UsageError, match=r"--tensor-type nothing.*: .* has no tensor of such a name"):
        choose(file, replace(TERNARY, overrides=(("nothing*", "F16"),)))
    assert parse_override("a=b=q4_k") == ("a=b", "Q4_K")
    assert parse_override("a=keep") == ("a", None)
    for text in ("a", "=F16", "a=", "a=Q9"):
        with pytest.raises(UsageError, match="expected PATTERN=TYPE"):
            parse_override(text)


# ---- the file ----


@pytest.mark.parametrize("name", TYPES)
def test_the_whole_way(file: GgufFile, out: Path, name: str) -> None:
    wanted = Wanted(type=name, overrides=(("output.weight", "F16"),))
    report = quantize(file, out, wanted, threads=2)
    assert left(out) == {"out.gguf"}
    with GgufFile.open(out) as made:
        assert list(made.tensors) == list(SHAPES)
        assert made.size_bytes == report.nbytes
        assert made.require("general.license", str) == "CC0-1.0"
        assert "split.count" not in made.metadata
        assert made.require("general.file_type", int) != 0 or name == "F32"
        assert ("general.quantization_version" in made.metadata) == (name not in ("F32", "F16", "BF16"))
        for choice in choose(file, wanted):
            info = made.tensors[choice.info.name]
            assert info.type is choice.target
            if choice.kept:
                assert (made.data(info) == file.data(choice.info)).all()
    group = next(group for group in report.groups if group.name == "blk.*.attn_q.weight")
    if name == "F32":
        assert group.error is None
        return
    before, after = (values(path, "blk.0.attn_q.weight") for path in (Path(file.path), out))
    error = float(((after - before) ** 2).sum() / (before**2).sum()) ** 0.5
    assert group.error == pytest.approx(error, rel=0.02)


def test_threads_change_no_byte(file: GgufFile, out: Path) -> None:
    quantize(file, out, TERNARY, threads=1)
    one = out.read_bytes()
    quantize(file, out, TERNARY, threads=3, force=True)
    assert out.read_bytes() == one


def test_weights_of_columns_and_of_experts(file: GgufFile, out: Path) -> None:
    plain = quantize_bytes(file, out, "blk.0.ffn_down_exps.weight")
    per_expert = np.ones((4, 256), np.float32)
    per_expert[2, :128] = 40
    weights = {"blk.0.ffn_down_exps.weight": per_expert}
    quantize(file, out, TERNARY, weights=weights, calibration="x", threads=2, force=True)
    found = quantize_bytes(None, out, "blk.0.ffn_down_exps.weight")
    assert (found[[0, 1, 3]] == plain[[0, 1, 3]]).all()
    assert (found[2] != plain[2]).any()
    wanted = values(Path(file.path), "blk.0.ffn_down_exps.weight")[2, :, :128]
    kind = TYPES_BY_NAME["TQ2_0"]
    losses = [((dequantize(kind, raw[2], (512, 256))[:, :128] - wanted) ** 2).sum() for raw in (plain, found)]
    assert losses[1] < 0.995 * losses[0]


def quantize_bytes(file: GgufFile | None, out: Path, name: str) -> np.ndarray:  # type: ignore[type-arg]
    if file is not None:
        quantize(file, out, TERNARY)
    with GgufFile.open(out) as made:
        return np.array(made.data(made.tensors[name])).reshape(4, -1)


@pytest.mark.parametrize("rule", ["lloyd-max", "least-squares", "absmean"])
def test_ternary_experts_lose_nothing_with_any_rule(tmp_path: Path, rule: str) -> None:
    """The embedded model's experts, at 1.7 bits and back: the bytes that they had."""
    small, back = tmp_path / "small.gguf", tmp_path / "back.gguf"
    with GgufFile.open(embedded_model()) as file:
        quantize(file, small, Wanted(type="TQ1_0", scales=rule, experts_only=True))
        with GgufFile.open(small) as again:
            quantize(again, back, Wanted(type="TQ2_0", scales=rule, experts_only=True))
        with GgufFile.open(back) as made:
            assert made.require("tokenizer.ggml.model", str) == file.require("tokenizer.ggml.model", str)
            for info in file.tensors.values():
                assert (made.data(made.tensors[info.name]) == file.data(info)).all(), info.name


# ---- stopping and going on ----


def straight(file: GgufFile, folder: Path) -> bytes:
    path = folder / "straight.gguf"
    quantize(file, path, TERNARY)
    image = path.read_bytes()
    path.unlink()
    return image


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_run_goes_on_where_one_was_stopped(file: GgufFile, out: Path, share: float) -> None:
    wanted = straight(file, out.parent)
    with pytest.raises(KeyboardInterrupt):
        quantize(file, out, TERNARY, progress=stop_at(share))
    assert left(out) == {"out.gguf.part", "out.gguf.part.journal"}
    report = quantize(file, out, TERNARY)
    assert (report.resumed > 0) == (share > 0)
    assert out.read_bytes() == wanted
    assert left(out) == {"out.gguf"}
    assert all(group.error is not None for group in report.groups if not group.kept)


def test_a_journal_cut_in_a_line_and_a_lost_file(file: GgufFile, out: Path) -> None:
    wanted = straight(file, out.parent)
    journal = out.with_name("out.gguf.part.journal")
    with pytest.raises(KeyboardInterrupt):
        quantize(file, out, TERNARY, progress=stop_at(0.5))
    journal.write_bytes(journal.read_bytes()[:-3])
    quantize(file, out, TERNARY)
    assert out.read_bytes() == wanted
    with pytest.raises(KeyboardInterrupt):
        quantize(file, out, TERNARY, force=True, progress=stop_at(0.5))
    out.with_name("out.gguf.part").unlink()
    assert quantize(file, out, TERNARY, force=True).resumed == 0
    assert out.read_bytes() == wanted


def test_another_input_or_other_arguments_do_not_mix(file: GgufFile, source: Path, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(file, out, TERNARY, progress=stop_at(0.5))
    for other, what in (
        (Wanted(type="TQ1_0"), "input and type"),
        (replace(TERNARY, scales="absmean"), "scales"),
        (replace(TERNARY, experts_only=True), "input and choice of experts"),
    ):
        with pytest.raises(UsageError, match=f"begun with another {what}; give the same again"):
            quantize(file, out, other)
    os.utime(source)
    with pytest.raises(UsageError, match="begun with another input; give the same again"):
        quantize(file, out, TERNARY)
    journal = out.with_name("out.gguf.part.journal")
    journal.write_bytes(b"{}\n[1]\n")
    with pytest.raises(UsageError, match="damaged; --restart begins anew"):
        quantize(file, out, TERNARY)
    assert quantize(file, out, Wanted(type="TQ1_0"), restart=True).resumed == 0


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(file: GgufFile, out: Path) -> None:
    wanted = straight(file, out.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(wanted) // 2, limits[1]))
    try:
        with pytest.raises(
            OutOfResources, match=r"out\.gguf\.part: writing failed: .*; the same command goes on"
        ):
            quantize(file, out, TERNARY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert quantize(file, out, TERNARY).resumed > 0
    assert out.read_bytes() == wanted


def test_a_byte_that_changes_on_the_medium_is_found(file: GgufFile, out: Path) -> None:
    part = out.with_name("out.gguf.part")

    def spoil(what: str, done: int, total: int) -> None:
        if what == "checking" and part.stat().st_size and done < total // 2:
            with part.open("r+b") as opened:
                opened.seek(-100, os.SEEK_END)
                opened.write(b"\xff" * 8)

    with pytest.raises(
        ModelReadError, match=r"tensor 'blk\.10\.ffn_up\.3\.weight' reads back as something else"
    ):
        quantize(file, out, TERNARY, progress=spoil)
    assert not out.exists()
    assert quantize(file, out, TERNARY).resumed == 0


def test_what_is_in_the_way(file: GgufFile, source: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="input and output are the same file"):
        quantize(file, source, TERNARY, force=True)
    with pytest.raises(UsageError, match="is no regular file"):
        quantize(file, out.parent, TERNARY, force=True)
    with pytest.raises(NotPermitted, match="No such file or directory"):
        quantize(file, out / "nowhere" / "x.gguf", TERNARY)
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="there is such a file already; --force replaces it"):
        quantize(file, out, TERNARY)
    with out.with_name("out.gguf.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunning, match="another `sterna quantize` is writing it"):
            quantize(file, out, TERNARY, force=True)
    assert out.read_bytes() == b"mine"
    quantize(file, out, TERNARY, force=True)
    assert out.read_bytes()[:4] == b"GGUF"


# ---- the command ----


def test_the_command(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["quantize", str(source), str(out), "--type", "tq2_0", "--dry-run", "--json"]) == 0
    groups = {group["name"]: group for group in json.loads(capsys.readouterr().out)["groups"]}
    assert groups["blk.*.ffn_down_exps.weight"]["nbytes_after"] == 4 * 512 * 66
    assert groups["output.weight"]["kept"] == "no matrix to convert"
    assert left(out) == set()
    assert cli.run(["quantize", str(source), str(out), "--type", "Q8_0", "--scales", "absmean"]) == 64
    assert "--scales absmean is for TQ1_0 and TQ2_0" in capsys.readouterr().err
    assert cli.run(["quantize", str(source), str(out), "--type", "Q9"]) == 64
    assert "'Q9' is not one of" in capsys.readouterr().err
    both = ["--calibrate", str(source), "--imatrix", str(source)]
    assert cli.run(["quantize", str(source), str(out), "--type", "Q4_K", *both]) == 64
    assert "--calibrate and --imatrix are two ways to say the same" in capsys.readouterr().err
    command = [
        sys.executable,
        "-m",
        "sterna.runtime.cli",
        "quantize",
        str(source),
        str(out),
        "--type",
        "TQ2_0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "read back and compared" in done.stdout
    assert "| blk.*.ffn_down_exps.weight " in done.stdout
    assert cli.run(["quantize", str(source), str(out), "--type", "TQ2_0"]) == 64
    message = "there is such a file already; --force replaces it when the new one is done"
    assert capsys.readouterr().err == f"sterna: error: {out}: {message}\n"
