"""Nothing is compiled while a request runs: the nursery's warm-up covers every signature."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import sterna.workers.kernels as kernels
from sterna.scheduler import warm
from sterna.scheduler.model.planner import read_plan
from sterna.workers.checkpoint.file.gguf import GgufFile

from ..families.tiny_files import write
from ..families.tiny_models import tiny_model
from . import altered_model as altered
from .local_engine import LocalEngine


def _signatures() -> dict[str, int]:
    found = {}
    for module in pkgutil.walk_packages([str(Path(kernels.__file__).parent)], kernels.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if hasattr(value, "nopython_signatures"):
                found[f"{module.name}.{name}"] = len(value.nopython_signatures)
    return found


def test_converting_experts_compiles_nothing(tmp_path: Path) -> None:
    path = altered.write(tmp_path / "q8.gguf", change=altered.converted(altered.EXPERTS, altered.exact_q8))
    precisions = ("file", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
    with GgufFile.open(path) as file:
        matrix_types = sorted(read_plan(file, precisions=precisions).matrix_types)
    for _, step in warm.steps(matrix_types, conversion=True):
        step()
    before = _signatures()
    assignment = [key % 5 for key in range(80)]
    engine = LocalEngine(path, workers=2, resident=40, precisions=precisions, assignment=assignment)
    engine.run([list(range(1, 40)), [5, 6, 7]], 3)
    compiled = {name: count - before[name] for name, count in _signatures().items() if count != before[name]}
    assert compiled == {}


def test_a_warm_engine_compiles_nothing() -> None:
    for _, step in warm.steps():
        step()
    before = _signatures()
    engine = LocalEngine(workers=2, max_batch_tokens=16)
    engine.run([list(range(1, 40)), [5, 6, 7]], 3)
    compiled = {name: count - before[name] for name, count in _signatures().items() if count != before[name]}
    assert compiled == {}


@pytest.mark.parametrize("name", ["deepseek2-lite", "qwen3"])
def test_a_float32_cache_compiles_nothing(name: str, tmp_path: Path) -> None:
    """Latent and grouped attention."""
    path = write(tiny_model(name), tmp_path / "tiny.gguf")
    with GgufFile.open(path) as file:
        matrix_types = sorted(read_plan(file).matrix_types)
    for _, step in warm.steps(matrix_types, value_nbytes=4):
        step()
    before = _signatures()
    LocalEngine(path, max_batch_tokens=16, value_nbytes=4).run([list(range(1, 40)), [5, 6, 7]], 3)
    compiled = {name: count - before[name] for name, count in _signatures().items() if count != before[name]}
    assert compiled == {}
