"""What the plan counts is what is allocated, to the byte: all arrays of a running engine are looked up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sterna.runtime.memory.buffers import scheduler_nbytes
from sterna.scheduler.decoder.crew import Crew
from sterna.scheduler.experts.runner import ExpertRunner
from sterna.scheduler.kv import StreamMemory
from sterna.scheduler.model.plan import ModelPlan
from sterna.workers.buffers import batch_nbytes
from sterna.workers.checkpoint.held.formats import Storage
from sterna.workers.serve import ExpertWorker

from ...families.tiny_files import write
from ...families.tiny_models import tiny_model
from ...scheduler.local_engine import LocalEngine

TOKENS, THREADS = 48, 2
# Counted by others: the lane and expert memory (not arrays of a step), arenas, and the crew's board.
ELSEWHERE = (ExpertRunner, StreamMemory, ModelPlan, Crew)


def arrays(root: object) -> list[npt.NDArray[Any]]:
    """Return the arrays that own memory and can be reached from `root`, each once."""
    found: dict[int, npt.NDArray[Any]] = {}
    seen: set[int] = set()

    def look(value: object) -> None:
        if id(value) in seen or isinstance(value, ELSEWHERE):
            return
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            found[id(value)] = value
            return
        for each in parts(value):
            look(each)

    look(root)
    return list(found.values())


def parts(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif type(value).__module__.startswith("sterna."):
        yield from getattr(value, "__dict__", {}).values()
        for base in type(value).__mro__:
            for name in getattr(base, "__slots__", ()):
                yield getattr(value, name, None)


def held(engine: LocalEngine) -> int:
    """Return the bytes of the engine's arrays, without those over arenas and constants of modules."""
    arenas = {id(root) for root in arrays([engine.slots, engine.streams.kv, engine.dense])}
    return sum(array.nbytes for array in arrays(engine.engine) if id(array) not in arenas)


@pytest.mark.parametrize(
    ("name", "types", "experts"),
    [
        ("deepseek2-lite", "Q8_0", "Q4_K"),
        ("deepseek2-v3", "F16", "Q8_0"),
        ("gpt-oss", "Q8_0", "MXFP4"),
        ("qwen3", "Q4_K", None),
        ("qwen2moe", "Q6_K", "Q8_0"),
        ("glm4moe", "F32", "Q5_K"),
        ("bitnet", "TQ2_0", None),
        ("granitemoe-shared", "Q3_K", "Q3_K"),
    ],
)
def test_the_plan_counts_what_the_scheduler_holds(
    tmp_path: Path, name: str, types: str, experts: str | None
) -> None:
    path = write(tiny_model(name, 256), tmp_path / "m.gguf", types, experts)
    engine = LocalEngine(path, max_batch_tokens=TOKENS, context=200, streams=3, crew=Crew(THREADS))
    engine.run([list(range(1, 60)), [5, 6, 7]], 3)
    assert held(engine) == scheduler_nbytes(engine.plan, engine.streams.shape, TOKENS, THREADS)


def test_also_with_one_scale_a_token(tmp_path: Path) -> None:
    path = write(tiny_model("bitnet", 256), tmp_path / "m.gguf", "TQ2_0")
    storage = Storage(per_token=True)
    engine = LocalEngine(path, max_batch_tokens=TOKENS, context=64, streams=1, storage=storage)
    engine.run([[5, 6, 7]], 2)
    assert held(engine) == scheduler_nbytes(engine.plan, engine.streams.shape, TOKENS, 1)


def test_a_worker_holds_what_its_largest_batch_needs(tmp_path: Path) -> None:
    path = write(tiny_model("qwen3moe", 256), tmp_path / "m.gguf", "Q8_0")
    engine = LocalEngine(path, max_batch_tokens=TOKENS)
    engine.run([list(range(1, 1 + TOKENS))], 1)
    worker: ExpertWorker = engine.lane.workers[0]
    scratch, h = worker._scratch, engine.plan.hyper
    assert scratch.pairs == TOKENS * h.experts_used
    assert sum(a.nbytes for a in arrays(scratch)) == batch_nbytes(scratch.pairs, h.d_model, h.d_ff_expert)
