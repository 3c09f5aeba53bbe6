"""`sterna quantize`: what becomes of which tensor, going on after each sort of stop, the check at the end."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sterna.runtime.config import embedded_model
from sterna.runtime.quantize import convert as conversion
from sterna.runtime.quantize.convert import quantize
from sterna.runtime.quantize.plan import TYPES, WEIGHTED, Wanted, choose, parse_override
from sterna.shm.errors import (
    AlreadyRunning,
    ModelFileError,
    ModelReadError,
    NotPermitted,
    OutOfResources,
    UsageError,
)
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.file.names import EXPERT_ROLES, LAYER_ROLES, MODEL_ROLES, candidates
from sterna.workers.checkpoint.file.writer import lay_out
from sterna.workers.checkpoint.held.encode import ENCODED
from sterna.workers.checkpoint.held.recode import WRITABLE
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME, dequantize

from ...workers.checkpoint.types.ternary_bytes import i2_s, iq2_bn
from .source import SHAPES, write_source

TERNARY = Wanted(type="TQ2_0")
EXPERTS = {"blk.0.ffn_gate_up_exps.weight", "blk.0.ffn_down_exps.weight", "blk.10.ffn_up.3.weight"}
MATRICES = {"blk.0.attn_q.weight", "blk.0.ffn_down_shexp.weight"} | EXPERTS


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
    assert set(WEIGHTED) == set(ENCODED)


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


def test_every_matrix_of_every_role_is_converted_and_nothing_else(tmp_path: Path) -> None:
    matrices = {
        f"attn_{name}" for name in ("q", "k", "v", "q_a", "q_b", "kv_a_mqa", "k_b", "v_b", "kv_b", "output")
    }
    matrices |= {f"ffn_{half}{of}" for half in ("gate", "up", "down") for of in ("", "_exps", "_shexp")}
    matrices |= {"ffn_gate_up_exps"}
    assert matrices <= {*LAYER_ROLES, *EXPERT_ROLES}
    roles = {name: role for role in LAYER_ROLES for name in candidates(role, 11)}
    roles |= {name: role for role in EXPERT_ROLES for name in candidates(role, 3, 12)}
    roles |= {name: role for role in MODEL_ROLES for name in candidates(role)}
    layout = lay_out([], [(name, (2, 256), TYPES_BY_NAME["F32"]) for name in roles], 32)
    path = tmp_path / "roles.gguf"
    path.write_bytes(layout.header.ljust(layout.nbytes, b"\0"))
    with GgufFile.open(path) as file:
        for only, expected in ((False, matrices), (True, {role for role in matrices if "exps" in role})):
            choices = choose(file, Wanted(type="Q4_K", experts_only=only))
            for choice in choices:
                assert bool(choice.kept) == (roles[choice.info.name] not in expected), choice.info.name


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
    quantize(file, out, TERNARY, weights=lambda: weights, calibration="x", threads=2, force=True)
    found = quantize_bytes(None, out, "blk.0.ffn_down_exps.weight")
    assert (found[[0, 1, 3]] == plain[[0, 1, 3]]).all()
    assert (found[2] != plain[2]).any()
    wanted = values(Path(file.path), "blk.0.ffn_down_exps.weight")[2, :, :128]
    file_type = TYPES_BY_NAME["TQ2_0"]
    losses = [
        ((dequantize(file_type, raw[2], (512, 256))[:, :128] - wanted) ** 2).sum() for raw in (plain, found)
    ]
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


def test_types_that_are_decoded_whole(tmp_path: Path, out: Path) -> None:
    """One with no slices, copied and converted; experts of another, one after the other."""
    random = np.random.default_rng(3)
    codes, scales = random.integers(0, 3, (512, 256)).astype(np.uint8), np.full((512, 1), 0.5, np.float32)
    tensors = {
        "blk.0.attn_q.weight": ("I2_S", (512, 256), i2_s(codes, 0.25), 0.25),
        "blk.0.attn_k.weight": ("I2_S", (512, 256), i2_s(codes[::-1], 2.0), 2.0),
        "blk.0.ffn_up_exps.weight": ("IQ2_BN", (4, 128, 256), iq2_bn(codes, scales), 0.5),
    }
    layout = lay_out(
        [], [(n, shape, TYPES_BY_NAME[type_name]) for n, (type_name, shape, *_) in tensors.items()], 32
    )
    path = tmp_path / "in.gguf"
    image = bytearray(layout.header.ljust(layout.nbytes, b"\0"))
    for info in layout.tensors:
        image[info.offset : info.offset + info.nbytes] = tensors[info.name][2].tobytes()
    path.write_bytes(image)
    with GgufFile.open(path) as file:
        quantize(file, out, Wanted(type="F16", overrides=(("*attn_k*", None),)), threads=2)
    with GgufFile.open(out) as made:
        assert made.tensors["blk.0.attn_k.weight"].type.name == "I2_S"
        assert (made.data(made.tensors["blk.0.attn_k.weight"]) == tensors["blk.0.attn_k.weight"][2]).all()
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"):
        expected = (codes.astype(np.float32) - 1) * tensors[name][3]
        assert (values(out, name).reshape(512, 256) == expected).all()


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


def test_what_is_begun_otherwise_and_has_no_tensor_yet_is_nothing(file: GgufFile, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(file, out, TERNARY, progress=stop_at(0.0))
    journal = out.with_name("out.gguf.part.journal")
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    assert quantize(file, out, Wanted(type="Q8_0")).resumed == 0


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


def test_another_input_or_other_arguments_do_not_mix(
    file: GgufFile, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(file, out, TERNARY, progress=stop_at(0.5))
    for other, what in (
        (Wanted(type="TQ1_0"), "type"),
        (replace(TERNARY, scales="absmean"), "scales"),
        (replace(TERNARY, experts_only=True), "choice of experts"),
    ):
        with pytest.raises(UsageError, match=f"begun with another {what}; give the same again"):
            quantize(file, out, other)
    monkeypatch.setattr(conversion, "__version__", "0.0.0")
    with pytest.raises(UsageError, match="begun with another version of Sterna; give the same again"):
        quantize(file, out, TERNARY)
    monkeypatch.undo()
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
    assert (part.stat().st_size, left(out)) == (0, {part.name})
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
