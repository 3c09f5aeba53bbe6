"""Nothing is compiled while a request runs: the nursery's warm-up covers every signature."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import sterna.workers.kernels as kernels
from sterna.scheduler import warm

from .local_engine import LocalEngine


def _signatures() -> dict[str, int]:
    found = {}
    for module in pkgutil.walk_packages([str(Path(kernels.__file__).parent)], kernels.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if hasattr(value, "nopython_signatures"):
                found[f"{module.name}.{name}"] = len(value.nopython_signatures)
    return found


def test_a_warm_engine_compiles_nothing() -> None:
    for _, step in warm.steps():
        step()
    before = _signatures()
    engine = LocalEngine(workers=2, max_batch_tokens=16)
    engine.run([list(range(1, 40)), [5, 6, 7]], 3)
    compiled = {name: count - before[name] for name, count in _signatures().items() if count != before[name]}
    assert compiled == {}
