"""Mean squares of activations: laws that they must obey, products done again in numpy, and their file."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from sterna.runtime.config import embedded_model
from sterna.runtime.memory.room import Room
from sterna.runtime.quantize import activations, column_weights
from sterna.runtime.quantize.activations import measure
from sterna.runtime.quantize.convert import quantize
from sterna.runtime.quantize.imatrix import ColumnSums
from sterna.runtime.quantize.plan import Wanted
from sterna.runtime.text.tokenizer import Tokenizer
from sterna.shm.errors import ModelFileError, OutOfResources, UsageError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.held.encode import Encoder
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME, dequantize

TEXT = "Once upon a time there was a king who had three daughters, and the youngest of them was so fair. " * 4
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@pytest.fixture(scope="module")
def file() -> Iterator[GgufFile]:
    with GgufFile.open(embedded_model()) as file:
        yield file


@pytest.fixture(scope="module")
def ids(file: GgufFile) -> list[int]:
    return Tokenizer.from_metadata(file.metadata, file.label).encode(TEXT)


@pytest.fixture(scope="module")
def sums(file: GgufFile, ids: list[int]) -> dict[str, tuple[Floats, Floats]]:
    return measure(file, ids, lambda what, done, total: None)._sums  # type: ignore[return-value]


def tensor(file: GgufFile, name: str) -> Floats:
    info = file.tensors[name]
    return dequantize(info.type, file.data(info), info.shape).astype(np.float64)


def test_every_matrix_is_seen_as_often_as_it_is_used(
    file: GgufFile, ids: list[int], sums: dict[str, tuple[Floats, Floats]]
) -> None:
    used = {"exps": 2 * len(ids), "ffn_gate_inp": len(ids)}
    wanted = [name for name, info in file.tensors.items() if len(info.shape) > 1 and name.startswith("blk.")]
    assert set(sums) >= set(wanted)
    for name in wanted:
        values, counts = sums[name]
        role = next((count for part, count in used.items() if part in name), len(ids))
        # All heads of a tensor read their own part of each row.
        assert counts.sum() == role * (len(counts) if "attn_" in name else 1), name
        assert values.shape == (len(counts), file.tensors[name].shape[-1])
        assert (values >= 0).all()


@pytest.mark.parametrize(
    ("name", "norm"),
    [("attn_q_a", "attn_norm"), ("ffn_gate_shexp", "ffn_norm"), ("attn_q_b", "attn_q_a_norm")],
)
def test_what_comes_out_of_a_norm_has_its_length(
    file: GgufFile, ids: list[int], sums: dict[str, tuple[Floats, Floats]], name: str, norm: str
) -> None:
    """An RMS norm leaves rows whose squares, without its weights, have the mean 1."""
    values, _ = sums[f"blk.3.{name}.weight"]
    whole = (values[0] / tensor(file, f"blk.3.{norm}.weight") ** 2).mean()
    assert whole == pytest.approx(len(ids), rel=2e-3)


def test_experts_read_what_shared_experts_read(
    ids: list[int], sums: dict[str, tuple[Floats, Floats]]
) -> None:
    """Each token goes to two experts; what they read is the same, but for being rounded to int8."""
    routed, shared = (sums[f"blk.2.ffn_up_{suffix}.weight"][0].sum(axis=0) for suffix in ("exps", "shexp"))
    np.testing.assert_allclose(routed, 2 * shared, rtol=0.02)
    assert (sums["blk.2.ffn_gate_exps.weight"][0] == sums["blk.2.ffn_up_exps.weight"][0]).all()


def test_the_middle_is_what_numpy_makes_of_the_input(
    file: GgufFile, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[Floats, Floats]] = []

    class Watched(activations._Model):
        def _see_expert(self, layer: int, expert: int, x: Floats, middle: Floats) -> None:  # type: ignore[override]
            if layer == 4 and len(found) < 5:
                wide = x.astype(np.float64)
                gate, up = (
                    wide @ tensor(file, f"blk.4.ffn_{half}_exps.weight")[expert].T for half in ("gate", "up")
                )
                found.append((gate / (1 + np.exp(-gate)) * up, middle.copy()))  # type: ignore[arg-type]

    monkeypatch.setattr(activations, "_Model", Watched)
    measure(file, ids[:20], lambda what, done, total: None)
    assert len(found) == 5
    for expected, middle in found:
        np.testing.assert_allclose(middle, expected, atol=1e-4 * np.abs(expected).max())


def test_what_was_measured_on_one_text_lowers_the_error_on_another(
    file: GgufFile, sums: dict[str, tuple[Floats, Floats]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "blk.2.attn_q_b.weight"
    read: list[Floats] = []

    class Watched(activations._Model):
        def _see_dense(self, key: str, rows: Floats) -> None:  # type: ignore[override]
            if self._plan.dense[key].tensor.name == name:
                read.append(rows[0].astype(np.float64))

    monkeypatch.setattr(activations, "_Model", Watched)
    other = Tokenizer.from_metadata(file.metadata, file.label).encode(
        "The fox ran over the hill, and he sang."
    )
    measure(file, other, lambda what, done, total: None)
    values, whole = tensor(file, name).astype(np.float32), ColumnSums()
    whole._sums = {name: sums[name]}  # type: ignore[dict-item]
    file_type, losses = TYPES_BY_NAME["Q2_K"], []
    for weights in (None, whole.weights(file)[name]):
        out = np.zeros(file_type.nbytes(values.shape), np.uint8)
        Encoder().encode(values, file_type, out, weights)
        losses.append(np.square(read[0] @ (dequantize(file_type, out, values.shape) - values).T).sum())
    print(f"error of products: {(losses[1] / losses[0]) ** 0.5:.3f} of that without calibration")
    assert losses[1] < 0.8 * losses[0]


def test_importance_matrices_are_those_of_llama_cpp(
    tmp_path: Path, file: GgufFile, sums: dict[str, tuple[Floats, Floats]]
) -> None:
    whole = ColumnSums()
    whole._sums = sums  # type: ignore[assignment]
    path = tmp_path / "x.imatrix"
    whole.save(path, "a text")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    shapes = {t.name: tuple(t.shape) for t in reader.tensors}
    assert shapes["blk.1.ffn_down_exps.weight.in_sum2"] == (256, 16)
    assert shapes["blk.1.ffn_down_exps.weight.counts"] == (1, 16)
    again = ColumnSums.load(path, "a text")
    assert again is not None
    assert ColumnSums.load(path, "another text") is None
    before, after = whole.weights(file), again.weights(file)
    assert set(before) == set(after)
    for name, values in before.items():
        assert (values > 0).all()
        np.testing.assert_allclose(values, after[name], rtol=1e-5)
    assert before["blk.1.attn_k_b.weight"].shape == (4, 32)
    assert before["blk.1.attn_q_a.weight"].shape == (256,)


def test_experts_that_few_tokens_went_to_borrow_from_the_others(file: GgufFile) -> None:
    sums = ColumnSums()
    rows = np.random.default_rng(1).standard_normal((1000, 256)).astype(np.float32)
    rows[:, 0] = 0
    sums.add("blk.1.ffn_up_exps.weight", rows, 3, 16)
    sums.add("blk.1.ffn_up_exps.weight", rows[:1] * 10, 4, 16)
    sums.add("blk.2.ffn_up_exps.weight", rows * 0, 0, 16)
    weights = sums.weights(file)
    found = weights["blk.1.ffn_up_exps.weight"]
    assert found.shape == (16, 256)
    np.testing.assert_allclose(found[3, 1:].mean(), 1, rtol=0.05)
    np.testing.assert_allclose(found[0], found[15])
    assert found[4].max() < 100
    assert (found[:, 0] > 0).all()
    assert (weights["blk.2.ffn_up_exps.weight"] == 1).all()
    sums.add("blk.1.ffn_down_exps.weight", rows[:, :128], 0, 16)
    with pytest.raises(
        ModelFileError, match="expected 128 columns in 16 matrices as in the importance matrix"
    ):
        sums.weights(file)


def test_a_run_that_goes_on_does_not_measure_again(
    tmp_path: Path, file: GgufFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    seen: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append(what)

    calibration = column_weights.from_text(file, TEXT, 24, out, progress)
    assert (seen, list(tmp_path.iterdir())) == ([], [])
    first = calibration.weights()
    assert set(seen) == {"calibrating"}
    monkeypatch.setattr(column_weights, "measure", None)
    again = column_weights.from_text(file, TEXT, 24, out, progress)
    second = again.weights()
    for name, values in first.items():
        assert (second[name] == values).all()
    assert again.kept_at is not None
    assert calibration.source == again.source
    from_file = column_weights.from_imatrix(file, again.kept_at)
    assert set(from_file.weights()) == set(first)
    quantize(
        file, out, Wanted(type="Q4_K", experts_only=True), weights=again.weights, calibration=again.source
    )
    again.drop()
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_what_was_measured_is_for_one_input(tmp_path: Path) -> None:
    copy, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    copy.write_bytes(Path(embedded_model()).read_bytes())

    def measured() -> bool:
        seen: set[str] = set()
        with GgufFile.open(copy) as file:
            column_weights.from_text(file, TEXT, 2, out, lambda what, done, total: seen.add(what)).weights()
        return bool(seen)

    assert [measured(), measured()] == [True, False]
    os.utime(copy)
    assert measured()
    kept = tmp_path / "out.gguf.part.imatrix"
    kept.write_bytes(b"notes")
    with pytest.raises(UsageError, match=r"out\.gguf\.part\.imatrix: .*; --restart throws it away"):
        measured()
    assert kept.read_bytes() == b"notes"
    with GgufFile.open(copy) as file:
        quantize(file, out, Wanted(type="TQ1_0", experts_only=True), restart=True)
    assert not kept.exists()


def test_what_was_measured_has_no_room(tmp_path: Path) -> None:
    sums = ColumnSums()
    sums.add("blk.1.ffn_up_exps.weight", np.ones((2, 256), np.float32), 0, 64)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OutOfResources, match=r"x\.imatrix: writing failed: File too large"):
            sums.save(tmp_path / "x.imatrix", "a text")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_model_that_memory_does_not_hold(file: GgufFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def room(mebibytes: int) -> None:
        found = Room(available=mebibytes << 20, total=1 << 30, reserve=0, source="", limited=True)
        monkeypatch.setattr(activations, "read_room", lambda: found)

    room(1)
    with pytest.raises(
        OutOfResources, match=r"--calibrate runs the model in .* MiB or more, and 1 MiB can be"
    ):
        measure(file, [1, 2], lambda what, done, total: None)
    room(1 << 10)
    assert len(measure(file, [1, 2], lambda what, done, total: None))


def test_what_cannot_be_measured(file: GgufFile) -> None:
    with pytest.raises(UsageError, match="at least two tokens"):
        measure(file, [1], lambda what, done, total: None)
    with pytest.raises(ModelFileError, match="no importance matrix"):
        ColumnSums.load(embedded_model())
