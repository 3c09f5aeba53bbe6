"""Types without a kernel: told by `inspect` and `plan`, with what they cost and what to use instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sterna.runtime.cli.main import cli
from sterna.runtime.config import embedded_model
from sterna.runtime.examine.describe import describe
from sterna.runtime.examine.slow_types import nearest_native
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME

from ...families.tiny_files import write
from ...families.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("name", "width", "native"),
    [
        ("Q4_1", 576, "Q4_0"),
        ("Q4_1", 512, "Q4_K"),
        ("Q5_1", 512, "Q5_K"),
        ("IQ2_XXS", 512, "Q2_K"),
        ("IQ3_S", 512, "Q3_K"),
        ("IQ4_XS", 512, "Q4_K"),
        ("Q4_1", 33, ""),
    ],
)
def test_nearest_type_with_a_kernel(name: str, width: int, native: str) -> None:
    assert nearest_native(TYPES_BY_NAME[name], {width}) == native


def test_inspect_and_plan_name_them(tmp_path: Path) -> None:
    path = write(tiny_model("qwen3"), tmp_path / "slow.gguf", "Q4_1")
    (line,) = describe(path)["slow"]
    assert " matrices of type Q4_1 are held as F16, " in line
    assert "`sterna quantize IN OUT --type Q4_" in line
    inspected = CliRunner().invoke(cli, ["inspect", str(path)], standalone_mode=False).stdout
    assert f"slow: {line}" in inspected
    planned = CliRunner().invoke(cli, ["plan", str(path)], standalone_mode=False).stdout
    assert f"slow              {line}" in planned
    assert planned.startswith("fits: a dense model, all of it stays in memory")
    assert "expert" not in planned


def test_a_model_without_them_has_no_such_line() -> None:
    assert describe(embedded_model())["slow"] == []
