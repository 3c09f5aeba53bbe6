"""`sterna inspect`, and the choices that it and the daemon make alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sterna.runtime.cli.main import cli
from sterna.runtime.config import embedded_model
from sterna.runtime.examine.groups import groups
from sterna.runtime.memory.budget import Wants
from sterna.runtime.memory.choice import choose, weights_nbytes
from sterna.scheduler.model import storage
from sterna.scheduler.model.storage import ActivationError, measure_activations
from sterna.shm.errors import ModelFileError
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.held.formats import Format, Storage
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME

from ...scheduler import altered_model as altered
from ...workers.checkpoint.types import ternary_bytes

AMPLE = 2**40
WANTS = Wants(workers=1, threads=1, max_batch_tokens=64, streams=2, context=128)


def test_the_embedded_model_as_json() -> None:
    result = CliRunner().invoke(cli, ["inspect", "--json"], standalone_mode=False)
    facts = json.loads(result.stdout)
    assert (facts["architecture"], facts["layers"], facts["experts"]) == ("deepseek2", 6, 16)
    assert facts["file_bytes"] == embedded_model().stat().st_size
    types = {row["type"]: row for row in facts["types"]}
    assert types["TQ2_0"]["held_as"] == "TL1"
    assert types["TQ2_0"]["activations"] == "Q8_256"
    assert sum(row["file_bytes"] for row in facts["types"]) < facts["file_bytes"]
    assert facts["activations"] == "one scale per block: no ternary weights with row scales"
    assert facts["activation_error"] is None


def test_ternary_bits_as_set_and_as_memory_allows() -> None:
    with GgufFile.open(embedded_model()) as file:
        wide, small = (choose(file, AMPLE, WANTS, bits) for bits in ("2", "1.6"))
        assert (wide.plan.storage.small, small.plan.storage.small) == (False, True)
        assert ("TQ2_0", Format.B3) in small.plan.matrix_types
        needed = wide.decision.total
        assert weights_nbytes(small.plan) < weights_nbytes(wide.plan)
        assert not choose(file, needed, WANTS).plan.storage.small
        tight = choose(file, needed - 2**19, WANTS)
        assert tight.plan.storage.small
        assert tight.ternary.startswith("1.6 bits: ")


def test_table_on_stdout_names_each_type() -> None:
    result = CliRunner().invoke(cli, ["inspect", "--ternary", "1.6"], standalone_mode=False)
    assert "| TQ2_0 |" in result.stdout
    assert "1.6 bits, as set" in result.stdout
    assert " B3 " in result.stdout


def test_groups_say_where_they_are_kept() -> None:
    quarter = replace(WANTS, resident="25%")
    with GgufFile.open(embedded_model()) as file:
        choice = choose(file, AMPLE, quarter)
        every = groups(file, file.tensors.keys(), choice.plan, choice.decision)
    rows = {row["group"]: row for row in every}
    assert rows["experts"]["place"] == "paged, 20 of 80 in memory"
    assert rows["experts"]["held_as"] == ["TL1"]
    assert (rows["attention"]["place"], rows["attention"]["held_as"]) == ("in memory", ["Q8"])
    assert rows["attention"]["types"] == {"Q8_0": 36}
    dense = sum(row["memory_bytes"] for name, row in rows.items() if name != "experts")
    assert choice.plan.dense_nbytes - 64 * len(choice.plan.dense) < dense <= choice.plan.dense_nbytes
    assert sum(row["tensors"] for row in every) == len(file.tensors)


def test_a_broken_file_is_named() -> None:
    with pytest.raises(ModelFileError, match="pyproject"):
        CliRunner().invoke(cli, ["inspect", "pyproject.toml"], standalone_mode=False, catch_exceptions=False)


# ---- one scale a token, or one a block ----


def test_outliers_argue_for_blocks() -> None:
    """Even rows cost nothing; one huge value spoils the whole row but only its own block."""
    rng = np.random.default_rng(1)
    w = rng.integers(-1, 2, (64, 1024)).astype(np.float32)
    for outlier, expected in ((0.0, True), (200.0, False)):
        x = rng.standard_normal((16, 1024)).astype(np.float32)
        x[:, 5] += outlier
        # The value itself is exact either way: leave its column out of the products.
        w[:, 5] = 0
        exact = x @ w.T
        size = np.square(exact).sum()
        block, token = (
            float(np.square(storage._quantised(x, width) @ w.T - exact).sum() / size) for width in (256, 1024)
        )
        assert ActivationError(block=block, token=token, matrices=1).per_token is expected


def test_row_scaled_matrices_are_measured_and_said(tmp_path: Path) -> None:
    name = "blk.1.ffn_gate_shexp.weight"
    values = altered.values(name)
    codes = (np.sign(values) + 1).astype(np.uint8)
    scales = np.abs(values).max(axis=1).astype(np.float32)
    data = ternary_bytes.iq2_bn(codes, scales).reshape(len(values), -1)
    up = name.replace("gate", "up")
    change = altered.converted((name, up), lambda each: (data, altered.Type.I8))
    path = altered.write(tmp_path / "rows.gguf", change=change)
    altered.retyped(path, {name: values.shape[1], up: values.shape[1]}, TYPES_BY_NAME["IQ2_BN"].id)
    with GgufFile.open(path) as file:
        error = measure_activations(file)
        assert error is not None
        assert error.matrices == 2
        assert error.token == error.block  # rows of 256: a block is a token
        assert choose(file, AMPLE, WANTS).plan.storage == Storage(per_token=True)
        assert choose(file, AMPLE, WANTS, activations="block").plan.storage == Storage()
    result = CliRunner().invoke(cli, ["inspect", str(path)], standalone_mode=False)
    assert "one scale per token: NMSE" in result.stdout
    assert "TL1_TOKEN" in result.stdout
